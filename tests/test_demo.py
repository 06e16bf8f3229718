"""The demo leaves a picture, a table and the numbers behind it."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ditdial.demo import run_demo


def test_demo(tmp_path):
    run_demo(tmp_path / "demo", images=40, batch_size=20, sets=2)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    ratios = [row["ratio"] for row in results["rows"]]
    assert ratios == pytest.approx([1.0, 0.64, 0.46, 0.30], abs=0.015)
    assert ratios == pytest.approx([row["ratio_measured"] for row in results["rows"]])
    assert {"commit", "device", "command"} <= results["provenance"].keys()
    with Image.open(tmp_path / "demo" / "samples.png") as picture:
        assert picture.width > 600
    table = (tmp_path / "demo" / "table.md").read_text()
    assert table.count("\n") == 4 + len(ratios)
    assert table.endswith("\n\nSteps at noise levels from 1 to 0.04.\n")
