"""Importing is quick and without side effects; names are looked up when they are first used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

import ditdial

# torchmetrics is a core dependency, but only those who compare pictures should wait for it.
EXTRAS = ("datasets", "torchmetrics", "matplotlib", "tensorboard", "torch_fidelity", "torchvision")
CODE = f"""
import torch
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
import ditdial, sys
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
assert all(hasattr(ditdial, name) for name in ditdial.__all__)
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
loaded = [name for name in {EXTRAS!r} if name in sys.modules]
assert not loaded, loaded
"""


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_no_extra():
    python(CODE)


def test_cost_command_needs_no_extra():
    python(CODE + "import ditdial.cli.app, ditdial.reference\nassert 'datasets' not in sys.modules")


def test_the_package_itself_loads_neither_torch_nor_diffusers():
    code = "import ditdial, sys; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    python(code + "; assert set(ditdial.__all__) <= set(dir(ditdial))")


def test_the_command_line_loads_them_inside_commands_only():
    python(
        "import ditdial.cli.app, sys\n"
        "assert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)"
    )


def test_a_star_import_brings_every_name():
    names: dict[str, object] = {}
    exec("from ditdial import *", names)
    assert set(ditdial.__all__) <= set(names)
    assert all(names[name] is getattr(ditdial, name) for name in ditdial.__all__)


def test_each_name_comes_from_one_module():
    listed = [name for names in ditdial.MODULES.values() for name in names]
    assert sorted(listed) == sorted(ditdial.__all__)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(AttributeError, match="module 'ditdial' has no attribute 'elastic'"):
        _ = ditdial.elastic
    with pytest.raises(ImportError, match="cannot import name 'elastic' from 'ditdial'"):
        exec("from ditdial import elastic")


FIRST = (
    "import ditdial.elastify",
    "from ditdial.elastify import handle_of",
    "from ditdial import handle_of",
    "import ditdial.demo",
    "import ditdial; ditdial.elastify",
)
EACH_IN_A_FORK = """
import os, sys
import diffusers, torch  # slow, and once is enough for all
for first in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(first)
        import ditdial
        from ditdial import elastify
        from ditdial.elastify import elastify as same
        assert elastify is same is ditdial.elastify and callable(same)
        assert sys.modules["ditdial.elastify"].elastify is same
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_elastify_is_the_function_whatever_is_imported_first():
    """Its module has the same name, which the import system binds in the package."""
    python(EACH_IN_A_FORK, *FIRST)


SHARE = """
import json, sys, time
started = time.perf_counter()
import torch
from diffusers import DiTTransformer2DModel
needed = time.perf_counter() - started
before, started = set(sys.modules), time.perf_counter()
import ditdial
ditdial.elastify
ours = time.perf_counter() - started
others = [n for n in set(sys.modules) - before if n.split(".")[0] not in ("ditdial", "numpy")]
print(json.dumps({"needed": needed, "ours": ours, "others": others}))
"""


def test_elastify_imports_little_beside_torch_and_a_diffusers_model():
    """3 to 5 % of their time where it was measured; the bound is for a busy machine."""
    facts = json.loads(python(SHARE).splitlines()[-1])
    print(f"torch and a model {facts['needed']:.2f} s, elastify {facts['ours']:.2f} s more")
    assert facts["others"] == []
    assert facts["ours"] < 0.2 * facts["needed"]


def test_help_is_quick():
    """A fifth of a second where it was measured; the best of three, for a busy machine."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ditdial", "--help"], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    print(f"ditdial --help: {min(taken):.2f} s")
    assert min(taken) < 1.5
