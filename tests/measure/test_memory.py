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
