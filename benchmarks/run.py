"""Run every benchmark that suits this machine; `make bench` calls it.

Each benchmark is a script of its own and writes one JSON file under benchmarks/results/.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main() -> None:
    scripts = [["speed.py"], ["architectures.py", "--reduced"]]
    if torch.cuda.is_available():
        scripts.append(["architectures.py"])
    for script, *options in scripts:
        print(f"== {' '.join([script, *options])} ==", flush=True)
        command = [sys.executable, str(HERE / script), *options, *sys.argv[1:]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
