"""Schedules cover the noise levels exactly; plans know modes and cost before a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ditdial import FULL, Mode, Plan, Schedule, Segment
from ditdial.plan.choice import WEAK_GUIDANCE_GAIN, Choice

WEAK = Mode(2)
COSTS = {FULL: 100.0, WEAK: 25.0, Mode(4): 8.0}
LEVELS = [0.9, 0.7, 0.5, 0.3, 0.1]


def macs_of(mode, level=None):
    return COSTS[mode]


def test_weak_first_is_weak_where_it_is_noisy():
    schedule = Schedule.weak_first(0.4)
    assert [schedule.at(x).mode for x in (1.0, 0.61, 0.6, 0.59, 0.0)] == [
        WEAK,
        WEAK,
        WEAK,
        FULL,
        FULL,
    ]
    assert all(s.guide_mode == s.mode and s.gain == 1 for s in schedule.segments)


@pytest.mark.parametrize(("fraction", "mode"), [(0, FULL), (1, WEAK)])
def test_ends_of_the_dial_are_constant(fraction, mode):
    schedule = Schedule.weak_first(fraction)
    assert len(schedule.segments) == 1
    assert schedule.modes == {mode}


def test_levels_beyond_the_ends_belong_to_them():
    schedule = Schedule.weak_first(0.5)
    assert schedule.at(1.2).mode == WEAK
    assert schedule.at(-0.1).mode == FULL


def test_branches_may_switch_at_different_levels():
    schedule = Schedule.weak_first(0.2, guide_fraction=0.6)
    found = [(s.start, s.stop, s.mode, s.guide_mode, s.gain) for s in schedule.segments]
    assert found == [(1, 0.8, WEAK, WEAK, 1), (0.8, 0.4, FULL, WEAK, 1), (0.4, 0, FULL, FULL, 1)]


def test_weak_guidance_acts_only_where_the_branches_differ():
    schedule = Schedule.weak_first(0.4, guidance="weak")
    noisy, clean = schedule.segments
    assert (noisy.mode, noisy.guide_mode, noisy.gain) == (WEAK, WEAK, 1.0)
    assert not noisy.weak_guidance
    assert (clean.mode, clean.guide_mode, clean.gain) == (FULL, WEAK, WEAK_GUIDANCE_GAIN)
    assert clean.weak_guidance
    assert WEAK_GUIDANCE_GAIN == 0.4


def test_weak_guidance_needs_a_coarser_guide():
    """`Segment`: elsewhere than where ``guide`` is coarser than ``mode``: ordinary CFG."""
    finer = Segment(start=1, stop=0, mode=WEAK, guide=FULL, guidance="weak")
    assert not finer.weak_guidance
    segment = Schedule.weak_first(0.8, guide_fraction=0.2, guidance="weak").at(0.5)
    assert (segment.mode, segment.guide_mode) == (WEAK, FULL)
    assert segment.gain == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.constant(),
        Schedule.weak_first(0.3, 4),
        Schedule.weak_first(1 / 3, guidance="weak"),
        Schedule.weak_first(0.2, guide_fraction=0.7, gain=0.3),
        Schedule([Segment(start=1, stop=0, mode=Mode((2, 1, 1)), gain=0)]),
    ],
)
def test_json_round_trip(schedule):
    again = Schedule.from_json(schedule.to_json())
    levels = [i / 97 for i in range(98)]
    for field in ("mode", "guide_mode", "weak_guidance", "gain", "start", "stop"):
        assert [getattr(again.at(x), field) for x in levels] == [
            getattr(schedule.at(x), field) for x in levels
        ]
    assert again.to_json() == schedule.to_json()
    assert again == schedule


def any_schedule(seed):
    """Any number of stretches with random edges, modes, guides, kinds of guidance and gains."""
    generator = np.random.default_rng(seed)
    edges = [1, *sorted(generator.random(int(generator.integers(0, 6))).tolist())[::-1], 0]
    modes = [FULL, WEAK, Mode(4), Mode((2, 1, 1)), Mode(token_grid=8), Mode(2, width=0.57)]

    def pick(values):
        return values[int(generator.integers(len(values)))]

    return Schedule(
        Segment(
            start=start,
            stop=stop,
            mode=pick(modes),
            guide=pick([None, *modes]),
            guidance=pick(["cfg", "weak"]),
            gain=pick([0, 1, 1.0, float(generator.random()), float(generator.exponential(1e3))]),
        )
        for start, stop in zip(edges, edges[1:], strict=False)
    )


@pytest.mark.parametrize("seed", range(50))
def test_any_schedule_comes_back_from_json_as_it_was(seed):
    schedule = any_schedule(seed)
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [segment.guide for segment in again.segments] == [x.guide for x in schedule.segments]


def test_a_segment_is_a_choice_for_some_levels():
    segment = Segment(start=0.9, stop=0.2, mode=WEAK, guide=Mode(4), guidance="weak", gain=0.5)
    assert segment.choice == Choice(mode=WEAK, guide=Mode(4), guidance="weak", gain=0.5)
    assert Segment.of(segment.choice, 0.9, 0.2) == segment
    assert segment.choice.runs_as(segment)
    assert segment.name == "patch2/patch4 weak 0.5"
    with pytest.raises(AttributeError):
        segment.mode = FULL


def test_a_plan_knows_modes_and_cost():
    plan = Plan.bind(Schedule.weak_first(0.4), LEVELS, macs_of, guidance=True)
    assert [s.mode for s in plan.steps] == [WEAK, WEAK, FULL, FULL, FULL]
    assert plan.macs == 2 * (2 * 25 + 3 * 100)
    assert plan.ratio == 350 / 500
    alone = Plan.bind(Schedule.weak_first(0.4), LEVELS, macs_of, guidance=False)
    assert alone.macs == 350
    assert alone.ratio == 350 / 500
    assert all(s.guide is None for s in alone.steps)


def test_a_schedule_means_the_same_for_other_step_counts():
    for count in (10, 50, 250):
        levels = [1 - (i + 0.5) / count for i in range(count)]
        plan = Plan.bind(Schedule.weak_first(0.4), levels, macs_of, guidance=True)
        assert plan.ratio == pytest.approx(0.7)


def test_a_gain_of_zero_costs_one_branch():
    schedule = Schedule(
        [Segment(start=1, stop=0.5, mode=WEAK, gain=0), Segment(start=0.5, stop=0, mode=FULL)]
    )
    plan = Plan.bind(schedule, LEVELS, macs_of, guidance=True)
    assert [s.guide for s in plan.steps] == [None, None, None, FULL, FULL]
    assert plan.macs == 3 * 25 + 2 * 200
    assert plan.full_macs == 5 * 200


def test_a_plan_needs_timesteps():
    with pytest.raises(ValueError, match="at least one timestep"):
        Plan.bind(Schedule.constant(), [], macs_of, guidance=True)


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), float("inf")])
def test_illegal_fractions_are_named(value):
    with pytest.raises(ValueError, match=rf"fraction = {value}; legal: \[0, 1\]"):
        Schedule.weak_first(value)
    with pytest.raises(ValueError, match=rf"guide_fraction = {value}; legal: \[0, 1\]"):
        Schedule.weak_first(0.5, guide_fraction=value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"start": 0.5, "stop": 0.5}, "from 0.5 to 0.5; legal: 0 <= stop < start <= 1"),
        ({"start": 0.2, "stop": 0.5}, "from 0.2 to 0.5"),
        ({"start": 1.5, "stop": 0}, "from 1.5 to 0"),
        ({"start": 1, "stop": -0.1}, "from 1 to -0.1"),
        ({"start": float("nan"), "stop": 0}, "from nan to 0"),
        ({"start": 1, "stop": 0, "guidance": "auto"}, "guidance = 'auto'; legal: 'cfg', 'weak'"),
        ({"start": 1, "stop": 0, "gain": -1}, "gain = -1; legal: a number >= 0"),
        ({"start": 1, "stop": 0, "gain": float("nan")}, "gain = nan"),
        ({"start": 1, "stop": 0, "gain": float("inf")}, "gain = inf"),
        ({"start": 1, "stop": 0, "gain": "1"}, "gain = '1'; legal: a number >= 0"),
        ({"start": 1, "stop": 0, "gain": True}, "gain = True; legal: a number >= 0"),
        ({"start": "1", "stop": 0}, "start = '1'; legal: a number"),
        ({"start": 1, "stop": 0, "mode": "patch2"}, r"mode = 'patch2'; legal: a Mode, as in Mode"),
        ({"start": 1, "stop": 0, "mode": None}, "mode = None; legal: a Mode"),
        ({"start": 1, "stop": 0, "mode": 2}, "mode = 2; legal: a Mode"),
        ({"start": 1, "stop": 0, "guide": "full"}, "guide = 'full'; legal: None, or a Mode"),
    ],
)
def test_illegal_segments_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        Segment(**fields)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([(1, 0.6), (0.5, 0)], "gap between noise levels 0.6 and 0.5"),
        ([(1, 0.5), (0.6, 0)], "overlap between noise levels 0.5 and 0.6"),
        ([(0.9, 0)], "covers noise levels 0.9 to 0; legal: 1 to 0"),
        ([(1, 0.1)], "covers noise levels 1 to 0.1; legal: 1 to 0"),
        ([(0.5, 0), (1, 0.5)], "legal: 1 to 0"),
        ([], "at least one segment"),
    ],
)
def test_illegal_schedules_are_named(levels, words):
    with pytest.raises(ValueError, match=words):
        Schedule([Segment(start=a, stop=b) for a, b in levels])


def test_weak_guidance_below_a_level():
    above, below = Schedule.weak_guidance_below(0.8).segments
    assert above == Segment(start=1, stop=0.8)
    assert below == Segment(start=0.8, stop=0, guide=Mode(2), guidance="weak", gain=0.4)
    assert below.weak_guidance
    assert Schedule.weak_guidance_below(0) == Schedule.constant()
    (throughout,) = Schedule.weak_guidance_below(1, Mode(4), gain=0.7).segments
    assert (throughout.guide, throughout.gain) == (Mode(4), 0.7)
    for level in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"level = {level}; legal: \[0, 1\]"):
            Schedule.weak_guidance_below(level)


def test_between_cuts_segments_off():
    schedule = Schedule([Segment(start=1, stop=0.6, mode=Mode(2)), Segment(start=0.6, stop=0)])
    assert schedule.between(1, 0) == schedule.segments
    edges = [(segment.start, segment.stop) for segment in schedule.between(0.8, 0.3)]
    assert edges == [(0.8, 0.6), (0.6, 0.3)]
    assert schedule.between(0.6, 0.3) == (Segment(start=0.6, stop=0.3),)
    assert schedule.between(1, 1) == schedule.between(0, 0) == ()
    assert Schedule([*schedule.between(1, 0.7), *schedule.between(0.7, 0)]).segments[0].stop == 0.7


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule.constant("patch2"),
        lambda: Schedule.weak_first(0.5, "patch2"),
        lambda: Schedule.weak_first(0.5, "patch2", guidance="weak"),
        lambda: Schedule.weak_guidance_below(0.5, "patch2"),
    ],
)
def test_a_name_is_no_mode(make):
    with pytest.raises(ValueError, match=r"mode = 'patch2'; legal: a Mode"):
        make()


def test_a_mode_is_no_segment():
    with pytest.raises(ValueError, match=r"segments hold Mode.*; legal: Segment\(start=, stop="):
        Schedule([Mode(2)])


ROW = {"start": 1, "stop": 0, "mode": "full"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object with a list 'segments'"),
        ("{}", "must be an object with a list 'segments'"),
        ('{"segments": 3}', "must be an object with a list 'segments'"),
        ('{"segments": []}', "at least one segment"),
        ('{"segments": [1]}', "segment 1; legal: start, stop, mode"),
        (json.dumps({"segments": [{"start": 1, "stop": 0}]}), "legal: start, stop, mode"),
        (json.dumps({"segments": [{**ROW, "colour": 1}]}), "'colour': 1}; legal: start, stop"),
        (json.dumps({"segments": [{**ROW, "mode": "weak"}]}), "unknown mode 'weak'; legal: 'full'"),
        (json.dumps({"segments": [{**ROW, "guide": "x"}]}), "unknown mode 'x'"),
        (json.dumps({"segments": [{**ROW, "start": "1"}]}), "start = '1'; legal: a number"),
        (json.dumps({"segments": [{**ROW, "gain": True}]}), "gain = True; legal: a number"),
        (json.dumps({"segments": [{**ROW, "guidance": 3}]}), "guidance = 3; legal: 'cfg', 'weak'"),
        (json.dumps({"segments": [{**ROW, "stop": 0.5}]}), "legal: 1 to 0"),
    ],
)
def test_illegal_json_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        Schedule.from_json(text)
