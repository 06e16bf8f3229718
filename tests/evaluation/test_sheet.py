"""Contact sheets: every image is where it belongs, bit for bit, and PNG files round-trip."""

import numpy as np
import pytest
import torch
from PIL import Image

from ditdial.evaluation.sheet import GAP, GAP_VALUE, contact_sheet, save_png


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns", "rows"), [(5, 3, 2), (6, 3, 2), (1, 1, 1), (2, 4, 1)])
def test_tiles_stand_where_they_belong(channels, count, columns, rows) -> None:
    pixels = torch.randint(
        0, 256, (count, channels, 4, 6), generator=torch.Generator().manual_seed(0)
    )
    sheet = contact_sheet(pixels / 255, columns)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (rows * (4 + GAP) - GAP, columns * (6 + GAP) - GAP, channels)
    unused = np.ones(sheet.shape, dtype=bool)
    for index in range(count):
        top, left = index // columns * (4 + GAP), index % columns * (6 + GAP)
        place = np.s_[top : top + 4, left : left + 6]
        assert np.array_equal(sheet[place], pixels[index].permute(1, 2, 0).numpy())
        unused[place] = False
    assert (sheet[unused] == GAP_VALUE).all()


def test_illegal_sheets_are_refused() -> None:
    with pytest.raises(ValueError, match="columns = 0"):
        contact_sheet(torch.rand(2, 1, 4, 4), 0)
    with pytest.raises(ValueError, match="range"):
        contact_sheet(torch.rand(2, 1, 4, 4) * 2 - 3, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_replaces_and_leaves_nothing_else(channels, tmp_path) -> None:
    path = tmp_path / "sheet.png"
    path.write_text("an older file")
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    save_png(path, array)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image).reshape(array.shape), array)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3))]
)
def test_png_refuses_other_arrays(array, tmp_path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        save_png(tmp_path / "sheet.png", array)
    assert not list(tmp_path.iterdir())
