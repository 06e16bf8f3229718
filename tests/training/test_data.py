"""Data: read once, whole and right, or refused with the row that is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ditdial.training.config import DataConfig
from ditdial.training.data import ImageData, sample_order

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def png():
    """``png(pixels)``: encoded bytes."""
    import io

    def encode(pixels):
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, format="PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def config(tmp_path):
    return DataConfig(path=str(tmp_path / "data"), image_size=8, channels=1, mean=0.2, std=0.4)


def test_pixels_and_labels_come_back(write_parquet, png, tmp_path, config):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8))
    write_parquet(tmp_path / "data", [png(x) for x in pixels], [4, 0, 2])
    data = ImageData(config)
    assert len(data) == 3
    assert torch.equal(data.images[:, 0], torch.from_numpy(pixels).to(torch.uint8))
    assert data.labels.tolist() == [4, 0, 2]
    images, labels = data.batch(0, 3, 0, CPU)
    order = sample_order(3, 0, 3, 0)
    expected = (torch.from_numpy(pixels)[order].float() / 255 - 0.2) / 0.4
    torch.testing.assert_close(images[:, 0], expected)
    assert labels.tolist() == data.labels[order].tolist()
    assert len(ImageData(config, limit=2)) == 2


def test_smaller_pictures_are_padded_in_the_middle(write_parquet, png, tmp_path, config):
    write_parquet(tmp_path / "data", [png(np.full((4, 6), 200))], [0])
    (image,) = ImageData(replace(config, pad_value=9)).images
    assert (image[0, 2:6, 1:7] == 200).all()
    assert image.sum() == 24 * 200 + 40 * 9


def test_colour_is_converted(write_parquet, png, tmp_path, config):
    colour = np.stack([np.full((8, 8), x) for x in (10, 20, 30)], axis=-1)
    write_parquet(tmp_path / "data", [png(colour), png(np.full((8, 8), 7))], [0, 1])
    images = ImageData(replace(config, channels=3)).images
    assert images[:, :, 0, 0].tolist() == [[10, 20, 30], [7, 7, 7]]


def test_flips_are_whole_pictures_and_repeatable(write_parquet, png, tmp_path, config):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8))
    write_parquet(tmp_path / "data", [png(x) for x in pixels], [0] * 16)
    plain = ImageData(config).batch(0, 16, 0, CPU)[0]
    data = ImageData(replace(config, horizontal_flip=True))
    flipped = data.batch(0, 16, 0, CPU)[0]
    which = [torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert 0 < sum(which) < 16
    expected = [a if same else a.flip(-1) for a, same in zip(plain, which, strict=True)]
    assert torch.equal(flipped, torch.stack(expected))
    assert torch.equal(data.batch(0, 16, 0, CPU)[0], flipped)


@pytest.mark.parametrize("seed", [0, 7])
def test_each_epoch_is_a_permutation_of_its_own(seed):
    epochs = [sample_order(50, 50 * e, 50, seed) for e in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(sample_order(50, 0, 50, seed + 1), epochs[0])


def test_order_does_not_depend_on_the_batch_split():
    whole = sample_order(30, 0, 100, 1)
    for sizes in ([100], [7] * 14 + [2], [33, 33, 34], [1] * 100):
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        parts = [sample_order(30, a, n, 1) for a, n in zip(starts, sizes, strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_missing_folder_is_named(config):
    with pytest.raises(FileNotFoundError, match=r"data.path = '.*data' is not a folder"):
        ImageData(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_column": "picture"}, r"has no column 'picture'; it has \['image', 'label'\]"),
        ({"label_column": "class"}, r"has no column 'class'; it has \['image', 'label'\]"),
        ({"split": "test"}, "test"),
    ],
)
def test_missing_columns_and_splits_are_named(write_parquet, png, tmp_path, config, changes, words):
    write_parquet(tmp_path / "data", [png(np.zeros((8, 8)))], [0])
    with pytest.raises(ValueError, match=words):
        ImageData(replace(config, **changes))


def test_an_empty_split_is_named(write_parquet, tmp_path, config):
    write_parquet(tmp_path / "data", [], [])
    with pytest.raises(ValueError, match=r"empty|no examples|correspond"):
        ImageData(config)


def test_a_broken_picture_is_named_by_its_row(write_parquet, png, tmp_path, config):
    good = png(np.random.default_rng(0).integers(0, 256, (8, 8)))
    for broken in (b"no picture at all", good[: len(good) // 2]):
        write_parquet(tmp_path / "data", [good, good, broken], [0, 1, 2])
        with pytest.raises(ValueError, match=r"image .*\(row 2\) cannot be read"):
            ImageData(config)


def test_a_missing_picture_is_named_by_its_row(write_parquet, png, tmp_path, config):
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "data", [png(np.zeros((8, 8)))], [0])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    items = {"image": [{"bytes": png(np.zeros((8, 8))), "path": None}, None], "label": [0, 1]}
    table = datasets.Dataset.from_dict(items, features=features)
    table.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"row 1\b"):
        ImageData(config)


@pytest.mark.parametrize("shape", [(9, 8), (8, 9), (20, 30)])
def test_a_picture_that_is_too_large_is_named(write_parquet, png, tmp_path, config, shape):
    write_parquet(tmp_path / "data", [png(np.zeros((8, 8))), png(np.zeros(shape))], [0, 1])
    words = rf"\(row 1\) is {shape[1]}x{shape[0]}; legal: at most data.image_size = 8"
    with pytest.raises(ValueError, match=words):
        ImageData(config)
