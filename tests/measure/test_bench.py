"""Interleaving runs everything in every round and compares within rounds."""

from __future__ import annotations

import os
import time

import pytest

from ditdial.measure.bench import Timing, beside, in_fresh_processes, interleave


def test_every_run_has_every_round_and_order_rotates():
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleave(runs, rounds=3, warmup=1)
    assert all(len(t.seconds) == 3 for t in timings.values())
    assert [order[i : i + 3] for i in range(3, 12, 3)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_ratio_is_taken_within_rounds():
    assert Timing((2.0, 20.0, 4.0)).ratio_to(Timing((1.0, 10.0, 2.0))) == 2.0


def test_it_tells_slow_from_fast():
    runs = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)}
    timings = interleave(runs, rounds=3, warmup=0)
    assert timings["slow"].ratio_to(timings["fast"]) > 1.5


def test_preparations_come_first_and_are_not_timed():
    order: list[str] = []

    def prepare(name):
        order.append(f"before {name}")
        time.sleep(0.02)

    timings = interleave({"a": lambda: order.append("a")}, rounds=2, warmup=0, prepare=prepare)
    assert order == ["before a", "a"] * 2
    assert max(timings["a"].seconds) < 0.01


def test_each_measurement_has_a_process_of_its_own():
    found = list(in_fresh_processes(os.getpid, 2))
    assert len({*found, os.getpid()}) == 3


def test_bad_arguments():
    with pytest.raises(ValueError, match="processes = 0"):
        list(in_fresh_processes(os.getpid, 0))
    with pytest.raises(ValueError, match="rounds = 0"):
        interleave({"a": int}, rounds=0)
    with pytest.raises(ValueError, match="number of runs = 0"):
        interleave({})
    with pytest.raises(ValueError, match="rounds = 0"):
        beside(int, {"a": int}, rounds=0)


def test_the_baseline_runs_beside_every_run():
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    ratios = beside(lambda: order.append("-"), runs, rounds=2, warmup=0)
    assert order == ["-", "a", "-", "b", "b", "-", "a", "-"]
    assert all(len(own) == 2 for own in ratios.values())


def test_ratios_are_to_the_baseline_beside():
    pauses = iter([0.04, 0.08, 0.16])  # a machine that becomes slower and slower
    runs = {name: lambda: time.sleep(2 * pause[0]) for name in "abc"}
    pause = [0.0]

    def baseline():
        pause[0] = next(pauses)
        time.sleep(pause[0])

    found = beside(baseline, runs, rounds=1, warmup=0)
    assert all(1.5 < ratio < 2.5 for (ratio,) in found.values())
