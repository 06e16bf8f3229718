"""Plans, schedules, reports, frontiers and offers print as tables, in a terminal and a notebook."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ditdial import FULL, Mode, Plan, Report, Schedule, Segment
from ditdial.host.device import Stopwatch
from ditdial.plain.tables import WIDTH
from ditdial.plan.frontier import SHOWN, Frontier
from ditdial.plan.report import CallRecord
from ditdial.plan.solved import Offer, Offers

WEAK = Mode(2)
LONG = Mode((2, 1, 1), token_grid=(3, 4), width=0.5, token_keep=0.8)
COSTS = {FULL: 7e11, WEAK: 2e11, LONG: 1e10}
LEVELS = [0.9, 0.7, 0.5, 0.3, 0.1]


def macs_of(mode, level=None):
    return COSTS[mode]


def plan_of(schedule, **facts):
    return Plan.bind(schedule, LEVELS, macs_of, **{"guidance": True, **facts})


def a_report():
    watch = Stopwatch(torch.device("cpu")).stop()
    facts = {"rows": 2, "macs": 1e9, "full_macs": 2e9, "watch": watch}
    return Report((CallRecord(level=0.5, mode=LONG, guide=LONG, **facts),), budget=0.6)


def test_a_plan_prints_every_step_the_total_and_what_it_assumed():
    plan = plan_of(Schedule.weak_first(0.4, guidance="weak"), budget=0.65, grid=(1, 64, 48))
    head, *rows, total, assumed = str(plan).splitlines()
    assert head.split() == ["step", "level", "mode", "guide", "MACs", "of", "full"]
    assert len(rows) == 5
    assert rows[0].split() == ["0", "0.900", "patch2", "patch2", "400.0", "GMACs", "28.6", "%"]
    assert rows[4].split() == ["4", "0.100", "full", "patch2", "900.0", "GMACs", "64.3", "%"]
    assert total == "50.0 % of the full cost (of 65.0 % allowed), 3.50 TMACs for one picture"
    assert assumed == "for 5 steps, with guidance, 1 x 64 x 48 base tokens"
    alone = str(plan_of(Schedule.constant(), guidance=False, text_tokens=77))
    assert alone.splitlines()[1].split()[2:4] == ["full", "-"]
    assert alone.endswith("for 5 steps, without guidance, 77 text tokens")


def test_a_plan_is_plain_data():
    schedule = Schedule.weak_first(0.4, guidance="weak")
    plan = plan_of(schedule, budget=0.65, grid=(1, 64, 48), text_tokens=77)
    data = json.loads(plan.to_json())
    assert data == plan.to_dict()
    assert Schedule.from_dict(data["schedule"]) == schedule
    assert [Mode.parse(row["mode"]) for row in data["steps"]] == [x.mode for x in plan.steps]
    assert sum(row["macs"] for row in data["steps"]) == data["macs"] == plan.macs
    assert data["ratio"] == data["macs"] / data["full_macs"]
    assert (data["budget"], data["guidance"], data["grid"]) == (0.65, True, [1, 64, 48])
    assert data["text_tokens"] == 77


def test_a_schedule_prints_its_stretches():
    schedule = Schedule(
        [
            Segment(start=1, stop=0.6, mode=WEAK, gain=0),
            Segment(start=0.6, stop=0.25, guide=WEAK, guidance="weak", gain=0.4),
            Segment(start=0.25, stop=0),
        ]
    )
    head, *rows, legend = str(schedule).splitlines()
    assert head.split() == ["from", "to", "mode", "guide", "guidance", "gain"]
    assert [row.split() for row in rows] == [
        ["1", "0.6", "patch2", "-", "none", "0"],
        ["0.6", "0.25", "full", "patch2", "weak", "0.4"],
        ["0.25", "0", "full", "full", "cfg", "1"],
    ]
    assert legend == "from and to are noise levels: 1 is pure noise, 0 is data"


def test_a_frontier_prints_a_page():
    generator = np.random.default_rng(0)
    frontier = Frontier.of(generator.random((12, 4)), generator.random(4) / 12)
    _, *rows, count = str(frontier).splitlines()
    assert len(frontier) > SHOWN == len(rows)
    assert count == f"{len(frontier)} plans, {SHOWN} of them shown"
    assert rows[0].split()[2] == f"{frontier.damages[0]:.3g}"
    assert rows[-1].split()[2] == f"{frontier.damages[-1]:.3g}"
    _, row, count = str(Frontier.of(np.zeros((2, 1)), [0.5])).splitlines()
    assert (row.split(), count) == (["100.0", "%", "0"], "1 plan")


def test_offers_print_what_they_cost_and_run():
    cheap = Offer(0.25, 1.5, Schedule.constant(WEAK))
    offers = Offers([cheap, Offer(1.0, 0.0, Schedule.weak_first(0.2))])
    head, *rows, legend = str(offers).splitlines()
    assert head.split() == ["cost", "damage", "runs"]
    assert rows[0].split() == ["25.0", "%", "1.5", "1", "patch2/patch2"]
    assert rows[1].endswith("0 1 patch2/patch2, 0.8 full/full")
    assert "mode/guide" in legend
    assert offers[1:] == (offers[1],)
    assert [offer.ratio for offer in offers] == [0.25, 1.0]


PRINTED = {
    "plan": lambda: plan_of(Schedule.weak_first(0.4, LONG)),
    "schedule": lambda: Schedule.weak_first(0.4, LONG),
    "report": a_report,
    "frontier": lambda: Frontier.of(np.ones((3, 2)), [0.1, 0.3]),
    "offers": lambda: Offers([Offer(0.5, 0.1, Schedule.weak_first(0.4, LONG))]),
}


@pytest.mark.parametrize("name", PRINTED)
def test_lines_fit_a_terminal_and_notebooks_show_the_same_rows(name):
    thing = PRINTED[name]()
    lines = str(thing).splitlines()
    assert max(map(len, lines)) <= WIDTH
    html = thing._repr_html_()
    assert html.count("<tr>") == len(thing.table.rows) + 1 == len(lines) - len(thing.table.below)
    assert html.count("<td>") == len(thing.table.rows) * len(thing.table.headings)
    if name != "frontier":
        assert LONG.name in html  # cut off in the terminal alone
