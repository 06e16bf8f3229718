"""Memory that a process keeps: asked of the system once, unless somebody has said otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ditdial.measure import memory

SIZE = 2**26
PROGRAM = f"""
import resource, runpy, sys

memory = runpy.run_path(sys.argv[1])
told = memory["keep_freed_memory"]() if sys.argv[2] == "keep" else False
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * {SIZE}
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks the C library glibc")


def faults(how, **environment):
    """Whether the library was told, and how many pages a third large piece was given anew."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM, memory.__file__, how]
    found = subprocess.run(
        command, check=True, capture_output=True, text=True, env=ours | environment
    )
    told, pages = found.stdout.split()
    return told == "True", int(pages)


@glibc
def test_freed_memory_is_kept():
    told, pages = faults("keep")
    assert told
    assert pages < 10 < faults("default")[1]


@glibc
def test_settings_of_the_environment_have_precedence():
    assert not faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()


TINY = """
import sys, torch
from ditdial.measure.memory import flush_denormals

told = flush_denormals() if sys.argv[1] == "flush" else False
tiny = torch.full((2**20,), 1e-30) * 1e-9  # enough numbers for all threads
print(told, int(tiny.count_nonzero()))
"""
x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="asks a processor of the x86 family"
)


@x86
@pytest.mark.parametrize(("how", "expected"), [("flush", "True 0"), ("keep", f"False {2**20}")])
def test_numbers_below_the_smallest_normal_one_are_0(how, expected):
    command = [sys.executable, "-c", TINY, how]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == expected
