"""The rows of a benchmark's results file: what is there is kept, what is new is written at once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reference_table import SETS, Row, known_rows

from ditdial.measure.provenance import write_results

RESULTS = Path(__file__).parent / "results"
CONTROLS = ("base", "static/", "fewer-steps/")


def parser_of(doc: str) -> argparse.ArgumentParser:
    """What the tables of trained adapters let one choose."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--name", default="mnist")
    parser.add_argument("--static", type=Path, default=Path("runs/mnist-dydit-static/export"))
    parser.add_argument("--adapter", type=Path, default=None, help="the shipped one by default")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--tune-images", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--time", action="store_true", help="time the rows that are there again")
    return parser


class Rows:
    """Rows by key, in a results file.

    Args:
        path: of the file.
        arguments: as parsed by `parser_of`.
        compare: adds to all rows what depends on the others.
        controls: results file of another table with the same controls, pictures and seeds, whose
            rows need not be measured again.
    """

    def __init__(
        self,
        path: Path,
        arguments: argparse.Namespace,
        steps: int,
        compare: Callable[[list[Row]], None],
        controls: Path | None = None,
    ) -> None:
        self.path, self.compare, self.again = path, compare, arguments.time
        self.facts: dict[str, Any] = {
            "images": arguments.images,
            "tune_images": arguments.tune_images,
            "steps": steps,
            "dtype": arguments.dtype,
            "sets": SETS,
        }
        self.rows = known_rows(path, restart=arguments.restart)
        if not self.rows and controls is not None and controls.exists():
            table = json.loads(controls.read_text())
            if all(table[name] == value for name, value in self.facts.items()):
                others = known_rows(controls, restart=False)
                self.rows = [row for row in others if row["key"].startswith(CONTROLS)]

    def keep(
        self, key: str, make: Callable[[], Row], time: Callable[[], float] | None = None
    ) -> Row:
        """The row of a key, made if it is not there.

        Args:
            time: measures its ``time_ratio`` alone.
        """
        found = next((row for row in self.rows if row["key"] == key), None)
        if found is None:
            found = {**make(), "key": key}
            self.rows.append(found)
        elif self.again and time is not None:
            found["time_ratio"] = time()
        self.compare(self.rows)
        write_results(self.path, {**self.facts, "rows": self.rows})
        names = ("ratio", "time_ratio", "scale", "frechet", "accuracy", "loss")
        print(key, {k: round(found[k], 3) for k in names if k in found}, flush=True)
        return found
