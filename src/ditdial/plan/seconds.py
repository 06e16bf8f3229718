"""The seconds that a step takes on one device, as plain data."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ditdial.plain.checks import require, whole
from ditdial.plain.kinds import checked_fields
from ditdial.plan.choice import Choice, is_number
from ditdial.plan.mode import FULL


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds of one model call on one device.

    Args:
        device: as `ditdial.host.device.device_name` tells it.
        rows: pictures in the batch.
        alone: of one branch, by name of the mode.
        together: of both branches in one call of the same mode; None where the pipeline calls the
            model once per branch.

    Raises:
        ValueError: seconds that are no numbers above zero, or none of full mode; or no device.
    """

    device: str
    rows: int
    alone: Mapping[str, float]
    together: Mapping[str, float] | None = None

    @checked_fields
    def __post_init__(self) -> None:
        require(isinstance(self.device, str), "device", self.device, "a device's name")
        whole("rows", self.rows, 1, sys.maxsize)
        for name in ("alone", "together"):
            found = getattr(self, name)
            if not ((name == "together" and found is None) or _are_seconds(found)):
                raise ValueError(f"seconds {name} = {found}; legal: > 0, with those of full mode")

    def of(self, step: Choice, *, guided: bool) -> float:
        """Seconds of one step."""
        mode, guide = step.mode.name, step.guide_mode.name
        if not guided or step.gain == 0:
            return self.alone[mode]
        if self.together is not None and guide == mode and step.gain == 1:
            return self.together[mode]
        return self.alone[mode] + self.alone[guide]


def _are_seconds(found: object) -> bool:
    """Whether something has the seconds of modes, full mode among them."""
    if not isinstance(found, Mapping) or FULL.name not in found:
        return False
    return all(is_number(each) and 0 < each < math.inf for each in found.values())
