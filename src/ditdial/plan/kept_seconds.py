"""What the modes of an adapter take on this user's devices, where its own folder is not the user's.

Adapters that ship with the package lie in the installation, which nobody's measurement may change.
Their seconds are kept in ``ditdial/seconds`` below ``XDG_CACHE_HOME`` (``~/.cache`` by default), a
file for each calibration, and are added to it when the adapter is read.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ditdial.plain import json_files
from ditdial.plan.calibration import Calibration
from ditdial.plan.seconds import Seconds


def keep(calibration: Calibration) -> Path:
    """Keep the seconds of a calibration for this user.

    Returns:
        The file.
    """
    rows = [asdict(each) for each in calibration.seconds]
    return json_files.write(_file(calibration), {"seconds": rows})


def added(calibration: Calibration) -> Calibration:
    """A calibration with what this user has kept of it; of a device in both, what was kept.

    Raises:
        ValueError: a file that is not understood.
    """
    path = _file(calibration)
    for each in json_files.read(path, "kept seconds", _seconds) if path.exists() else ():
        calibration = calibration.with_seconds(each)
    return calibration


def _file(calibration: Calibration) -> Path:
    """Of all calibrations with these errors, whatever their seconds."""
    errors = json_files.dumps({**calibration.to_dict(), "seconds": []})
    name = hashlib.sha256(errors.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ditdial" / "seconds" / f"{name}.json"


def _seconds(data: Any) -> list[Seconds]:
    try:
        return [Seconds(**row) for row in data["seconds"]]
    except (TypeError, KeyError) as error:
        raise ValueError(f"kept seconds have missing or unknown entries: {error!r}") from error
