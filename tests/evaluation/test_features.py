"""Feature networks: saving round-trips, rows are independent, wrong input is refused."""

import importlib.util
import json

import pytest
import torch

from ditdial.evaluation import features
from ditdial.evaluation.features import SmallClassifier, check_images, load_features


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier() -> SmallClassifier:
    torch.manual_seed(0)
    return SmallClassifier(in_channels=1, num_classes=5, width=8, feature_dim=12).eval()


def test_default_size_and_shapes() -> None:
    model = SmallClassifier(in_channels=3, num_classes=10)
    assert model.num_parameters() < 500_000
    images = torch.rand(2, 3, 32, 32)
    assert model.stages(images).shape[-2:] == (4, 4)
    assert model.features(images).shape == (2, 64)
    assert model(images).shape == (2, 10)


def test_save_and_load_round_trip(classifier, images, tmp_path) -> None:
    classifier.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = SmallClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded(images), classifier(images))

    network, name = load_features(str(tmp_path))
    assert name == str(tmp_path)
    assert network.num_features == 12
    assert torch.equal(network(images), classifier.features(images))
    assert not any(p.requires_grad for p in network.parameters())


def test_a_row_in_a_batch_equals_the_row_alone(classifier, images) -> None:
    alone = torch.cat([classifier.features(row[None]) for row in images])
    torch.testing.assert_close(classifier.features(images), alone)


def test_reference_is_the_shipped_folder(classifier, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(features, "REFERENCE", tmp_path / "classifier")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_features("reference")
    classifier.save_pretrained(tmp_path / "classifier")
    network, name = load_features("reference")
    assert name == "reference"
    assert torch.equal(network(images), classifier.features(images))


@pytest.mark.parametrize("name", ["inception-v3", "dinov2", "dinov2:", "no/such/folder"])
def test_unknown_name_lists_the_legal_ones(name) -> None:
    with pytest.raises(ValueError, match=r"'reference'.*dinov2:.*'inception'"):
        load_features(name)


def test_folder_of_another_model_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel.*SmallClassifier"):
        load_features(str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "match"), [((2, 3, 32, 32), "each image"), ((2, 1, 28, 28), "each image")]
)
def test_classifier_features_refuse_other_shapes(classifier, tmp_path, shape, match) -> None:
    classifier.save_pretrained(tmp_path)
    network, _ = load_features(str(tmp_path))
    with pytest.raises(ValueError, match=match):
        network(torch.rand(shape))


@pytest.mark.parametrize(
    "broken",
    [
        torch.rand(1, 8, 8),
        torch.rand(1, 2, 8, 8),
        torch.rand(0, 1, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.rand(1, 1, 8, 8) - 1,
        torch.rand(1, 1, 8, 8) * 255,
        torch.full((1, 1, 8, 8), torch.nan),
    ],
    ids=["rank", "channels", "empty", "uint8", "negative", "bytes", "nan"],
)
def test_check_images_names_what_is_legal(broken) -> None:
    with pytest.raises(ValueError, match="legal"):
        check_images(broken)


@pytest.mark.parametrize("overrides", [{"width": 12}, {"in_channels": 2}, {"num_classes": 1}])
def test_classifier_refuses_illegal_sizes(overrides) -> None:
    with pytest.raises(ValueError, match=next(iter(overrides))):
        SmallClassifier(**{"in_channels": 1, "num_classes": 5} | overrides)


def test_dinov2_from_a_folder(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56
    )
    stock = transformers.Dinov2Model(config).eval()
    stock.save_pretrained(tmp_path)
    network, name = load_features(f"dinov2:{tmp_path}")
    assert name == f"dinov2:{tmp_path}"
    assert network.num_features == 16

    grey = torch.rand(2, 1, 224, 224)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = stock(pixel_values=(grey.repeat(1, 3, 1, 1) - mean) / std).pooler_output
    torch.testing.assert_close(network(grey), expected, rtol=1e-4, atol=1e-5)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 16)


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed"
)
def test_inception_without_its_extra_names_the_install_line() -> None:
    with pytest.raises(ImportError, match=r"pip install 'ditdial\[eval\]'"):
        load_features("inception")
