"""Data: read once, whole and right, or refused with the row that is wrong."""

from __future__ import annotations

import io
import os
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


def write_rows(folder, images, labels, kind="int64"):
    datasets = pytest.importorskip("datasets")
    folder.mkdir(exist_ok=True)
    parquet = pytest.importorskip("pyarrow.parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    # Not by `to_parquet`, which reads the files that rows name and writes their bytes.
    parquet.write_table(table.data.table, folder / "train.parquet")


@pytest.mark.parametrize("how", ["absolute", "above", "link", "linked folder", "none", "pipe"])
def test_a_row_names_files_of_the_data_only(png, tmp_path, config, how):
    outside, folder = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    folder.mkdir()
    (outside / "secret.png").write_bytes(png(np.zeros((8, 8))))
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "links").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    named = {
        "absolute": str(outside / "secret.png"),
        "above": "../outside/secret.png",
        "link": str(folder / "link.png"),
        "linked folder": "links/secret.png",
        "none": "https://example.org/secret.png",
        "pipe": "pipe.png",
    }
    write_rows(folder, [{"bytes": None, "path": named[how]}], [0])
    with pytest.raises(ValueError, match=r"image '.*png' \(row 0\) (lies outside|cannot be read)"):
        ImageData(config)


@pytest.mark.parametrize("relative", [True, False])
def test_a_row_may_name_a_file_of_the_data(png, tmp_path, config, relative):
    folder, linked = tmp_path / "real", tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    linked.symlink_to(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8))
    (folder / "pictures" / "one.png").write_bytes(png(pixels))
    name = "pictures/one.png" if relative else str(linked / "pictures" / "one.png")
    write_rows(folder, [{"bytes": None, "path": name}], [0])
    assert torch.equal(ImageData(config).images[0, 0], torch.from_numpy(pixels).to(torch.uint8))


def test_a_folder_of_pictures_is_data(png, tmp_path, config, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for label in ("a", "b"):
        folder = tmp_path / "data" / "train" / label
        folder.mkdir(parents=True)
        (folder / "one.png").write_bytes(png(np.full((8, 8), ord(label))))
    data = ImageData(config)
    assert data.labels.tolist() == [0, 1]
    assert data.images[:, 0, 0, 0].tolist() == [ord("a"), ord("b")]


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("string", ["0", "1"]),
        ("float32", [0.0, 1.5]),
        ("int64", [0, None]),
        ("int64", [0, -1]),
        ("int64", [0, 2**40]),
        ("bool", [False, True]),
    ],
)
def test_labels_that_are_no_classes_are_named(png, tmp_path, config, kind, labels):
    write_rows(
        tmp_path / "data", [{"bytes": png(np.zeros((8, 8))), "path": None}] * 2, labels, kind
    )
    with pytest.raises(ValueError, match=r"row [01] has .* in column 'label'; legal: whole"):
        ImageData(config)


def test_labels_beyond_the_classes_are_named(write_parquet, png, tmp_path, config):
    write_parquet(tmp_path / "data", [png(np.zeros((8, 8)))] * 3, [0, 2, 3])
    data = ImageData(config)
    data.check_labels(4)
    with pytest.raises(ValueError, match=r"row 1 has the label 2; legal: 0\.\.1"):
        data.check_labels(2)


@pytest.mark.parametrize("damage", ["cut", "emptied", "noise", "middle"])
def test_a_damaged_file_of_data_is_named(write_parquet, png, tmp_path, config, damage):
    write_parquet(tmp_path / "data", [png(np.zeros((8, 8)))] * 3, [0, 1, 2])
    path = tmp_path / "data" / "train.parquet"
    content = path.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "emptied": b"", "noise": bytes(range(256)) * 9}
    damaged["middle"] = content[:20] + b"\xff" * 200 + content[220:]
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"data set '.*data'.* cannot be read"):
        ImageData(config)


def test_a_column_that_holds_no_pictures_is_named(write_parquet, png, tmp_path, config):
    write_parquet(tmp_path / "data", [png(np.zeros((8, 8)))], [0])
    with pytest.raises(ValueError, match=r"data set '.*data'.* cannot be read"):
        ImageData(replace(config, image_column="label"))
    with pytest.raises(ValueError, match="column 'image'"):
        ImageData(replace(config, label_column="image"))


def test_a_picture_that_is_a_bomb_is_refused_unread(png, tmp_path, config):
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, format="PNG")
    write_rows(tmp_path / "data", [{"bytes": bomb.getvalue(), "path": None}], [0])
    with pytest.raises(ValueError, match=r"row 0\) (cannot be read|is 30000x30000)"):
        ImageData(config)
