"""How long does the command line take to answer, and the library to be imported?

    python benchmarks/start_up.py

Each figure is the median of several processes of their own. What `elastify` adds is a share of what
torch and a diffusers model take in the same process. Seconds are printed, and that share is written
to benchmarks/results/start-up-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ditdial.measure.provenance import write_results
from ditdial.plain import figures

RESULTS = Path(__file__).parent / "results"
IMPORTS = """
import json, sys, time
marks = [time.perf_counter()]
import torch
marks.append(time.perf_counter())
from diffusers import DiTTransformer2DModel
marks.append(time.perf_counter())
import ditdial
ditdial.elastify
marks.append(time.perf_counter())
torch_s, diffusers_s, ours = (b - a for a, b in zip(marks, marks[1:]))
print(json.dumps({"torch": torch_s, "diffusers_model": diffusers_s, "elastify": ours}))
"""
COMMANDS = {"help": ["--help"], "methods": ["methods"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=5)
    arguments = parser.parse_args()
    rounds = []
    for _ in range(arguments.processes):
        row = imports()
        row["share"] = row["elastify"] / (row["torch"] + row["diffusers_model"])
        row |= {name: seconds(words) for name, words in COMMANDS.items()}
        rounds.append(row)
    median = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    for name, value in median.items():
        write = figures.share if name == "share" else figures.seconds
        print(f"{name:16} {write(value)}")
    results = {"share": median["share"], "in_each_process": [row["share"] for row in rounds]}
    write_results(RESULTS / "start-up-cpu.json", results)


def imports() -> dict[str, float]:
    """Seconds of each import, one after the other in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def seconds(words: list[str]) -> float:
    """Of a command, in a process of its own."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ditdial", *words], check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
