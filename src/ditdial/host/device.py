"""A device: its name in results, and the seconds of its work."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """What seconds measured on a device are comparable on: the GPU, or processor and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Stopwatch:
    """Seconds of device work from creation to `stop`; on CUDA by events, without a wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._end: float | torch.cuda.Event = self._start

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Stopwatch:
        """Mark the end; returns itself."""
        self._end = self._mark()
        return self

    @property
    def seconds(self) -> float:
        """Elapsed seconds; waits for the device if it is still at work."""
        if isinstance(self._start, float) and isinstance(self._end, float):
            return self._end - self._start
        self._end.synchronize()  # pyrefly: ignore[missing-attribute]
        return self._start.elapsed_time(self._end) / 1000  # pyrefly: ignore[missing-attribute]
