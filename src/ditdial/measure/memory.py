"""What the C library does with memory that is freed, and the processor with tiny numbers."""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``."""

KEPT = 2**30
"""Bytes of freed memory that a process keeps."""


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the rest of the process, where it is glibc.

    By default it gives large pieces back to the system and gets them anew, page by page. On a CPU
    that can take a third of the time of a run with large activations. What the environment says of
    these settings (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``, ...) has precedence.

    Returns:
        Whether it was told to.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    options = (TRIM_THRESHOLD, MMAP_THRESHOLD)
    return all([ctypes.CDLL(None).mallopt(option, KEPT) for option in options])


def flush_denormals() -> bool:
    """Let torch take numbers below the smallest normal one for 0, for the rest of the process.

    Processors of the x86 family take a hundred times as long for such numbers; inside GELU's tanh
    they come up wherever activations are strongly negative. It must be called before torch's first
    computation: threads that have started go on as before.

    Returns:
        Whether the processor can.
    """
    import torch  # not at the top: the command line imports this file before it needs torch

    return torch.set_flush_denormal(True)
