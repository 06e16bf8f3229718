"""Two threads, one model: requests that run at once each give the picture that they give alone."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from tests.backbones.pipes import EMBEDDED, PIPES
from tests.wild.pictures import quiet

from ditdial import Schedule

ALL = PIPES | EMBEDDED
REQUESTS = ((3, 11), (4, 12))
"""Steps and seed of each."""
AT_ONCE = 1e-5
"""Seconds after which Python lets another thread work; 5e-3 by default."""
PATIENCE = 120.0


def two_pipelines(case):
    """One model in two pipelines; what stock pipelines cannot share each has for itself."""
    first = case.pipe()
    parts = {
        # A tokenizer keeps how long its last prompt was padded to.
        name: copy.deepcopy(part) if name.startswith(("scheduler", "tokenizer")) else part
        for name, part in first.components.items()
    }
    parts |= {x: first.config[x] for x in ("expand_timesteps",) if x in first.config}
    return first, quiet(type(first)(**parts))


def draw(case, pipe, request):
    steps, seed = request
    return case.draw(pipe, seeds=(seed,), num_inference_steps=steps)


def at_once(case, pipes):
    """What both requests give; errors come back in the place of pictures."""
    found, start = {}, threading.Barrier(len(pipes))

    def work(index):
        start.wait(PATIENCE)
        try:
            found[index] = draw(case, pipes[index], REQUESTS[index])
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(pipes))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(AT_ONCE)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(interval)
    return [found.get(i, TimeoutError("a run did not end")) for i in range(len(pipes))]


def rightly_at_once(name, times):
    """How many of so many double requests give both pictures, bit for bit."""
    case, schedule = ALL[name], Schedule.weak_first(0.5)
    expected = []
    for request in REQUESTS:
        alone = case.pipe()
        case.elastic(alone).schedule = schedule
        expected.append(draw(case, alone, request))
    pipes = two_pipelines(case)
    case.elastic(pipes[0]).schedule = schedule
    right = 0
    for _ in range(times):
        found = at_once(case, pipes)
        for error in (x for x in found if isinstance(x, Exception)):
            raise error
        right += all(map(torch.equal, found, expected))
    return right


@pytest.mark.parametrize("name", ALL)
def test_requests_at_once_on_every_class(name):
    assert rightly_at_once(name, 1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwenimage", "flux", "sd3", "wan", "chroma"])
def test_forty_of_forty(name):
    assert rightly_at_once(name, 40) == 40
