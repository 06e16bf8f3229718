"""The log of a training run: one JSON object per line, cut back where a run goes on."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditdial.plain import files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Log:
    """A file of records, each with the ``step`` it was written after.

    Args:
        path: of the file; it need not exist yet.
    """

    path: Path

    def append(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: no space, or a link in the file's place.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(self.path, flags, 0o666), "a") as file:
            file.write(json.dumps(record) + "\n")

    def truncate(self, step: int) -> None:
        """Drop the records that come after the checkpoint a run goes on from.

        Lines that are no records go too, with a warning: a run that was killed leaves half a line.
        """
        if not self.path.is_file():
            return
        kept, damaged = [], 0
        for line in self.path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, TypeError, LookupError, RecursionError):
                damaged += 1
        if damaged:
            logger.warning("%d lines of %s are damaged and were left out", damaged, self.path)
        files.write(self.path, b"".join(kept))
