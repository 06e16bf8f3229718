"""The log of a training run: one JSON object per line, cut back where a run goes on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Log:
    """A file of records, each with the ``step`` it was written after.

    Args:
        path: of the file; it need not exist yet.
    """

    path: Path

    def append(self, record: dict[str, Any]) -> None:
        """Add a record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def truncate(self, step: int) -> None:
        """Drop the records that come after the checkpoint a run goes on from."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the process was killed while writing this line
            if record["step"] <= step:
                kept.append(line)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, self.path)
