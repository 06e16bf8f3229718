"""The wheel is small, and all it needs to run the demo are the package's core dependencies.

``python scripts/check_wheel.py dist`` looks at the wheel in a folder. ``--demo`` installs it into
an empty environment, without an extra, and runs the demo there, away from the source tree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 15_000_000
"""Bytes a wheel may have. It is mostly the reference model, in float32."""

LINES = 4
"""Lines of the demo's table."""


def only_wheel(folder: Path) -> Path:
    """The one wheel in a folder.

    Raises:
        ValueError: none or several.
    """
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"wheels in {folder} = {len(wheels)}; legal: 1")
    return wheels[0]


def run_demo(wheel: Path, folder: Path) -> None:
    """Install the wheel into a new environment in ``folder`` and run its demo there.

    Raises:
        subprocess.CalledProcessError: a command failed.
        ValueError: the demo left no picture or another table.
    """
    venv.create(folder / "venv", with_pip=True)
    binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    # The package must come from the wheel, whatever the caller's environment says.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, wheel], check=True, cwd=folder, env=kept)
    demo = [binaries / "ditdial", "demo", "--images", "80", "--output", "demo"]
    subprocess.run(demo, check=True, cwd=folder, env={**kept, "HF_HUB_OFFLINE": "1"})
    rows = json.loads((folder / "demo" / "results.json").read_text())["rows"]
    if len(rows) != LINES or not (folder / "demo" / "samples.png").stat().st_size:
        raise ValueError(f"lines of the demo = {len(rows)}; legal: {LINES}, and a picture")


def main() -> int:
    """Check the size, and run the demo if asked to."""
    parser = argparse.ArgumentParser(description="Check a built wheel.")
    parser.add_argument("folder", type=Path, help="where the wheel is")
    parser.add_argument("--demo", action="store_true", help="install it elsewhere, run the demo")
    options = parser.parse_args()
    wheel = only_wheel(options.folder.resolve())
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        print(f"size = {size} bytes; legal: at most {LIMIT}", file=sys.stderr)
        return 1
    if options.demo:
        with tempfile.TemporaryDirectory() as folder:
            run_demo(wheel, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
