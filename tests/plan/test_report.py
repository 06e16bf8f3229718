"""Reports: sums, plain data and a table of what was run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import torch

from ditdial import FULL, Mode, Report, Schedule
from ditdial.host.device import Stopwatch
from ditdial.plan.report import CallRecord

WEAK = Mode(2)


def record(mode, macs, *, guide=None, level=0.5, rows=2, branch=None):
    watch = Stopwatch(torch.device("cpu")).stop()
    return CallRecord(
        level=level,
        mode=mode,
        guide=guide,
        branch=branch,
        rows=rows,
        macs=macs,
        full_macs=100.0,
        watch=watch,
    )


def test_sums():
    report = Report((record(WEAK, 25.0), record(FULL, 100.0, guide=FULL), record(WEAK, 25.0)))
    assert report.macs == 150
    assert report.ratio == 0.5
    assert report.seconds == sum(call.watch.seconds for call in report.calls) >= 0


def test_an_empty_run():
    assert (Report(()).macs, Report(()).ratio, Report(()).seconds) == (0, 1.0, 0)
    assert "100.0 % of the full cost" in str(Report(()))


def test_json_and_table_say_the_same():
    report = Report((record(WEAK, 2.5e9, guide=FULL, level=0.75), record(FULL, 1e9, level=None)))
    data = json.loads(report.to_json())
    assert [row["mode"] for row in data["calls"]] == ["patch2", "full"]
    assert [row["guide"] for row in data["calls"]] == ["full", None]
    assert [row["level"] for row in data["calls"]] == [0.75, None]
    assert (data["macs"], data["ratio"]) == (report.macs, report.ratio)
    first, second = str(report).splitlines()[1:3]
    assert first.split()[:6] == ["0", "0.750", "patch2", "full", "2", "2.50"]
    assert second.split()[:5] == ["1", "-", "full", "-", "2"]


def test_what_was_allowed_stands_beside_what_was_spent():
    report = Report((record(WEAK, 25.0),), budget=0.3)
    assert json.loads(report.to_json())["budget"] == 0.3
    assert "25.0 % of the full cost (of 30.0 % allowed)" in str(report)
    assert "allowed" not in str(Report((record(WEAK, 25.0),)))


def test_calls_of_one_branch_say_which_and_may_have_run_nothing():
    report = Report((record(WEAK, 25.0, branch="cond"), record(None, 0.0, branch="uncond")))
    rows = json.loads(report.to_json())["calls"]
    assert [(row["branch"], row["mode"]) for row in rows] == [("cond", "patch2"), ("uncond", None)]
    assert str(report).splitlines()[2].split()[:5] == ["1", "0.500", "-", "-", "2"]
    assert report.ratio == 0.125


def test_a_stopwatch_stops():
    watch = Stopwatch(torch.device("cpu")).stop()
    seconds = watch.seconds
    assert seconds >= 0
    assert watch.seconds == seconds


def test_a_bare_models_run_starts_where_the_level_rises(make_elastic, make_call, output):
    handle = make_elastic()
    handle.schedule = Schedule.weak_first(0.5)
    for _ in range(2):
        for time in (900, 600, 600, 300):
            output(handle.model, make_call(2, time))
        calls = handle.report().calls
        assert [c.level for c in calls] == [0.9, 0.6, 0.6, 0.3]
        assert [c.mode for c in calls] == [WEAK, WEAK, WEAK, FULL]


def test_a_report_is_a_snapshot(make_elastic, make_call, output):
    handle = make_elastic()
    output(handle.model, make_call(2, 900))
    report = handle.report()
    output(handle.model, make_call(2, 500))
    assert len(report.calls) == 1
    assert len(handle.report().calls) == 2


def test_forced_calls_are_recorded(make_elastic, make_call, output):
    handle = make_elastic()
    with handle.using(WEAK):
        output(handle.model, make_call(3, guided=True))
    (call,) = handle.report().calls
    assert (call.level, call.mode, call.guide, call.rows) == (None, WEAK, None, 6)
    assert call.macs == 6 * handle.shape.macs(WEAK)


def test_other_resolutions_cost_what_they_cost(make_elastic, make_call, output):
    handle = make_elastic()
    output(handle.model, make_call(1, side=64))
    larger = replace(handle.shape, grid=(1, 16, 16))
    assert handle.report().macs == larger.macs(FULL) > 4 * handle.shape.macs(FULL)


def test_reports_can_be_copied(make_elastic, make_call, output):
    handle = make_elastic()
    output(handle.model, make_call())
    assert copy.deepcopy(handle.report()).macs == handle.report().macs
