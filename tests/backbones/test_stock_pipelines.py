"""The stock pipelines around tiny models: everything through the real ``pipe(...)`` call."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from tests.backbones.pipes import (
    EMBEDDED,
    PIPES,
    PROMPTS,
    SEEDS,
    STEPS,
    PipeCase,
    flux,
    lumina2,
    sd3,
    wan_of_two,
)
from tests.elastic_models import run_as

from ditdial import FULL, DDiTController, Mode, Schedule, Segment, elastify, handle_of

WEAK = Mode(2)
cases = pytest.mark.parametrize("case", PIPES.values(), ids=PIPES)
WAN_OF_TWO = PipeCase(
    wan_of_two, PIPES["wan"].size, PIPES["wan"].grid, PIPES["wan"].text, two_calls=True
)
nameless = pytest.mark.parametrize(
    "case", [PIPES["chroma"], PIPES["lumina2"]], ids=["chroma", "lumina2"]
)
COMPONENTS = ("transformer", "transformer_2")
SANDWICH = Schedule(
    [
        Segment(start=1, stop=0.8),
        Segment(start=0.8, stop=0.4, mode=WEAK),
        Segment(start=0.4, stop=0),
    ]
)


@cache
def stock(case: PipeCase, *, guided: bool = True, steps: int = STEPS):
    """What the untouched pipeline gives."""
    return case.draw(case.pipe(), guided=guided, num_inference_steps=steps)


def used(case: PipeCase):
    """An untouched pipeline that ran once: contexts leave an (empty) hook registry behind."""
    pipe = case.pipe()
    case.draw(pipe)
    return pipe


def planned(case: PipeCase, handle, *, guided: bool = True, steps: int = STEPS, **changes):
    """Plan of a run, and the modes of its model calls ``(conditional, guidance)`` in order."""
    facts = {"grid": case.grid, "text_tokens": case.text} | changes
    plan = handle.plan(steps, guidance=guided, **facts)
    if not (case.two_calls and guided):
        return plan, [(step.mode, step.guide) for step in plan.steps]
    branches = [[(step.mode, None), (step.guide, None)] for step in plan.steps]
    return plan, [branch for step in branches for branch in step]


def assert_kept(case: PipeCase, handle, *, guided: bool = True, **facts):
    plan, modes = planned(case, handle, guided=guided, **facts)
    report = handle.report()
    assert [(call.mode, call.guide) for call in report.calls] == modes
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-6)
    levels = [step.level for step in plan.steps for _ in range(1 + (case.two_calls and guided))]
    assert [call.level for call in report.calls] == levels
    return plan


def differs(found, other) -> bool:
    return not torch.allclose(found, other, atol=1e-3 * other.std().item())


@cases
def test_full_mode_is_the_stock_picture_bit_for_bit(case, assert_stock):
    """The autoencoder included, before and after `remove`."""
    expected = case.draw(case.pipe(), output_type="pt")
    pipe = case.pipe()
    handle = case.elastic(pipe)
    assert torch.equal(case.draw(pipe, output_type="pt"), expected)
    assert_kept(case, handle)
    assert torch.equal(case.draw(pipe, guided=False), stock(case, guided=False))
    assert_kept(case, handle, guided=False)
    handle.schedule = Schedule.weak_first(0.5)
    assert differs(case.draw(pipe, output_type="pt"), expected)
    handle.remove()
    assert torch.equal(case.draw(pipe, output_type="pt"), expected)
    assert_stock(pipe.transformer, used(case).transformer)
    assert expected.std() > 0.02


@cases
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_the_plan_is_what_runs(case, guided):
    pipe = case.pipe()
    handle = case.elastic(pipe)
    for schedule in (
        Schedule.weak_first(0.5),
        Schedule.weak_first(0.2, guide_fraction=0.7),
        Schedule([Segment(start=1, stop=0.6, gain=0), Segment(start=0.6, stop=0)]),
    ):
        handle.schedule = schedule
        found = case.draw(pipe, guided=guided)
        plan = assert_kept(case, handle, guided=guided)
        expected = stock(case, guided=guided)
        assert found.shape == expected.shape
        assert found.isfinite().all()
        if plan.ratio < 1:
            assert differs(found, expected)


@cases
def test_modes_that_change_in_a_run_act_as_if_forced_call_by_call(case):
    pipe, other = case.pipe(), case.pipe()
    handle, forced = case.elastic(pipe), case.elastic(other)
    handle.schedule = SANDWICH
    found = case.draw(pipe)
    plan, modes = planned(case, handle)
    assert {FULL, WEAK} == {step.mode for step in plan.steps}
    rest = iter(modes)

    def force(*_):
        forced._engine.chooser.forced = next(rest)[0]

    other.transformer.register_forward_pre_hook(force)
    assert torch.equal(case.draw(other), found)


@cases
def test_weak_guidance_runs_full_conditional_and_weak_guidance_branches(case):
    """The weak mode sees the prompt, so the negative prompt changes nothing."""
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.0, guidance="weak")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no guidance branch")
        found = case.draw(pipe)
        assert torch.equal(case.draw(pipe), found)
    assert_kept(case, handle)
    if case.two_calls:
        names = ["cond", "uncond"] if case.contexts else [None, None]
        assert [c.branch for c in handle.report().calls] == names * STEPS
        assert [c.mode for c in handle.report().calls] == [FULL, WEAK] * STEPS
    else:
        assert [(c.mode, c.guide) for c in handle.report().calls] == [(FULL, WEAK)] * STEPS
    assert found.isfinite().all()
    assert differs(found, stock(case))
    if case.latent != "pt":  # DiT has no negative prompt
        other = case.draw(pipe, negative_prompt=["blue house"])
        assert torch.equal(other, found)
        assert differs(case.draw(case.pipe(), negative_prompt=["blue house"]), stock(case))


@cases
def test_without_guidance_no_branch_is_invented(case):
    """Two prompts are not taken for two branches, and one warning says what is not applied."""
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.0, guidance="weak")
    seeds = (SEEDS[0], SEEDS[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = case.draw(pipe, PROMPTS, seeds, guided=False)
        case.draw(pipe, PROMPTS, seeds, guided=False)
    assert sum("no guidance branch" in str(warning.message) for warning in caught) == 1
    assert [(c.mode, c.guide, c.rows) for c in handle.report().calls] == [(FULL, None, 2)] * STEPS
    assert torch.equal(found, case.draw(case.pipe(), PROMPTS, seeds, guided=False))


@cases
def test_a_second_run_repeats_the_first_whatever_ran_between(case):
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.5, guide_fraction=0.8)
    first = case.draw(pipe)
    assert torch.equal(case.draw(pipe), first)
    case.draw(pipe, num_inference_steps=7)
    assert_kept(case, handle, steps=7)
    case.draw(pipe, guided=False)
    scheduler, pipe.scheduler = pipe.scheduler, other_scheduler(pipe)
    case.draw(pipe, num_inference_steps=6)
    assert_kept(case, handle, steps=6)
    pipe.scheduler = scheduler
    assert torch.equal(case.draw(pipe), first)
    assert_kept(case, handle)


def other_scheduler(pipe):
    """Another scheduler of the same kind of noise."""
    facts = pipe.scheduler.config
    if "flow" in f"{type(pipe.scheduler)} {facts.get('prediction_type')}".lower():
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5)
    return diffusers.EulerDiscreteScheduler.from_config(facts)


@cases
def test_an_interrupted_run_leaves_nothing_behind(case):
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.0, guidance="weak")
    first, calls = case.draw(pipe), len(handle.report().calls)

    def interrupt(*_):
        if len(handle.report().calls) == calls - 1:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.draw(pipe, num_inference_steps=STEPS + 1)
    hook.remove()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no guidance branch")
        assert torch.equal(case.draw(pipe), first)
    assert_kept(case, handle)


@cases
def test_a_schedule_set_in_the_middle_of_a_run_acts_from_the_next_call(case):
    pipe = case.pipe()
    handle = case.elastic(pipe)

    def switch(*_):
        if len(handle.report().calls) == 2:
            handle.schedule = Schedule.constant(WEAK)

    pipe.transformer.register_forward_hook(switch)
    found = case.draw(pipe, guided=False)
    assert [call.mode for call in handle.report().calls] == [FULL, FULL, WEAK, WEAK]
    assert differs(found, stock(case, guided=False))


@cases
@pytest.mark.parametrize("guidance", ["cfg", "weak"])
def test_packed_branches_give_the_same_picture(case, guidance):
    pipe = case.pipe()
    handle = case.elastic(pipe)
    if handle.backbone.packed is None:
        pytest.skip("its branches run one after the other")
    handle.schedule = Schedule.weak_first(0.2, guide_fraction=0.7, guidance=guidance)
    split = case.draw(pipe)
    run_as(handle, packed=True)
    packed = case.draw(pipe)
    assert_kept(case, handle)
    scale = max(1.0, split.std().item())
    torch.testing.assert_close(packed, split, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "guided"),
    [
        pytest.param(case, guided, id=f"{name}-{'guided' if guided else 'unguided'}")
        for name, case in EMBEDDED.items()
        for guided in (True, False)
        if case.guided or not guided
    ],
)
def test_pipelines_that_are_given_embeddings(case, guided):
    """Full mode is the stock latent bit for bit, and the plan is what runs."""
    expected = stock(case, guided=guided)
    pipe = case.pipe()
    handle = case.elastic(pipe)
    assert torch.equal(case.draw(pipe, guided=guided), expected)
    assert_kept(case, handle, guided=guided)
    for schedule in (
        Schedule.weak_first(0.5),
        Schedule.weak_first(0.2, guide_fraction=0.7),
        Schedule([Segment(start=1, stop=0.6, gain=0), Segment(start=0.6, stop=0)]),
        Schedule.weak_first(0.0, guidance="weak" if guided else "cfg"),
    ):
        handle.schedule = schedule
        found = case.draw(pipe, guided=guided)
        plan = assert_kept(case, handle, guided=guided)
        assert found.shape == expected.shape
        assert found.isfinite().all()
        if plan.ratio < 1:
            assert differs(found, expected)
    handle.remove()
    assert torch.equal(case.draw(pipe, guided=guided), expected)


@nameless
def test_the_same_noise_in_the_next_run_is_no_guidance_call(case):
    """Its first call repeats latent, noise level and all of a run of one step."""
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.constant(FULL, guide=WEAK)
    latents = torch.randn_like(stock(case))
    for _ in range(2):
        case.draw(pipe, guided=False, num_inference_steps=1, latents=latents)
        assert [call.mode for call in handle.report().calls] == [FULL]


def test_guidance_that_stops_early():
    case = PIPES["lumina2"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.constant(FULL, guide=WEAK)
    case.draw(pipe, cfg_trunc_ratio=0.5)
    assert [c.mode for c in handle.report().calls] == [FULL, WEAK, FULL, WEAK, FULL, FULL]


def test_skip_layer_guidance_adds_conditional_calls():
    """A third call of some steps, of the conditional rows only."""
    case = PIPES["sd3"]
    arguments = {
        "prompts": PROMPTS,
        "seeds": (SEEDS[0], SEEDS[0]),
        "skip_guidance_layers": [0],
        "skip_layer_guidance_stop": 0.6,
    }
    expected = case.draw(case.pipe(), **arguments)
    pipe = case.pipe()
    handle = case.elastic(pipe)
    assert torch.equal(case.draw(pipe, **arguments), expected)
    handle.schedule = Schedule.constant(FULL, guide=WEAK)
    case.draw(pipe, **arguments)
    guides = [(call.guide, call.rows) for call in handle.report().calls]
    guided, skipping = (WEAK, 4), (None, 2)
    assert guides == [guided, guided, skipping, guided, skipping, guided]


@cases
@pytest.mark.parametrize("guidance", ["cfg", "weak"])
def test_a_batch_of_prompts_is_the_prompts_one_by_one(case, guidance):
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.5, guide_fraction=1.0, guidance=guidance)
    together = case.draw(pipe, PROMPTS, **case.alike)
    assert differs(together[0], together[1])
    for index in range(2):
        alone = case.draw(pipe, PROMPTS[index : index + 1], SEEDS[index : index + 1], **case.alike)
        scale = max(1.0, alone.std().item())
        torch.testing.assert_close(together[index], alone[0], atol=1e-4 * scale, rtol=1e-4)


@cases
def test_elastic_again_replaces_and_remove_restores(case, assert_stock):
    pipe = case.pipe()
    first = case.elastic(pipe)
    second = case.elastic(pipe, scales=(4,))
    assert handle_of(pipe).modes == second.modes == (FULL, Mode(4))
    with pytest.raises(RuntimeError, match="elastify again"):
        first.report()
    second.schedule = Schedule.constant(Mode(4))
    assert differs(case.draw(pipe), stock(case))
    first.remove()  # of a handle that was replaced: nothing
    assert handle_of(pipe) is not None
    second.remove()
    assert handle_of(pipe) is None
    assert torch.equal(case.draw(pipe), stock(case))
    assert_stock(pipe.transformer, used(case).transformer)


@cases
def test_a_saved_pipeline_is_the_stock_one(case, tmp_path):
    """Saved before, or while it is elastic; an adapter folder fits what was loaded."""
    pipe = case.pipe()
    pipe.save_pretrained(tmp_path / "before")
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.5)
    elastic_picture = case.draw(pipe)
    pipe.save_pretrained(tmp_path / "while")
    folder = handle.adapter().save_pretrained(tmp_path / "adapter")
    for name in ("before", "while"):
        again = loaded(type(pipe), tmp_path / name)
        assert type(again.transformer) is getattr(diffusers, type(pipe.transformer).__name__)
        assert torch.equal(case.draw(again), stock(case))
        other = elastify(again, folder)
        assert other.schedule == handle.schedule
        assert torch.equal(case.draw(again), elastic_picture)
        other.remove()
        assert torch.equal(case.draw(again), stock(case))


def loaded(pipeline_class, folder):
    """A pipeline from disk, with weights of its own.

    Loaded tensors are views of their file, at addresses where products may differ in the last bit.
    """
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                parameter.data = parameter.data.clone()
    return pipe


@pytest.mark.parametrize("build", [flux, sd3, lumina2])
@pytest.mark.parametrize("facts", [{}, {"shift": 1.0, "use_dynamic_shifting": False}])
def test_plans_know_how_a_pipeline_asks_for_its_timesteps(build, facts):
    """FLUX gives sigmas of its own, SD3 does not, and Lumina 2 miscounts its tokens."""
    name = build.__name__
    facts = facts or {"use_dynamic_shifting": True}
    case = replace(PIPES[name], build=lambda: build(**facts))
    pipe = case.pipe()
    handle = case.elastic(pipe)
    for fraction in (0.3, 0.5, 0.7):
        handle.schedule = Schedule.weak_first(fraction)
        case.draw(pipe, guided=False, num_inference_steps=10)
        assert_kept(case, handle, guided=False, steps=10)


def test_a_time_rounded_to_the_latents_dtype_does_not_change_the_plan():
    """FLUX casts its time to bfloat16, which moves 0.755 to 0.758."""
    case = PIPES["flux"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    pipe.to(torch.bfloat16)
    levels = [step.level for step in planned(case, handle, steps=10)[0].steps]
    for level in levels[1:]:
        for edge in (level * (1 - 1e-4), level * (1 + 1e-4)):
            handle.schedule = Schedule.weak_first(1 - edge)
            case.draw(pipe, guided=False, num_inference_steps=10)
            assert_kept(case, handle, guided=False, steps=10)


def test_a_copied_pipeline_has_noise_levels_of_its_own():
    """The original's timesteps are near enough to be taken for rounded ones."""
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.5)
    case.draw(pipe)
    other = copy.deepcopy(pipe)
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.01)
    before = handle.report()
    case.draw(other)
    own = [level / 1000 for level in other.scheduler.timesteps.tolist()]
    assert [call.level for call in handle_of(other).report().calls] == own
    assert [call.level for call in before.calls][1:] != own[1:]
    assert handle.report() == before
    scheduled = handle_of(other).plan(STEPS, scheduler=other.scheduler, grid=case.grid)
    assert [step.level for step in scheduled.steps] == own


class TestTwoTransformers:
    """Wan 2.2: one for high noise, one for low."""

    @pytest.fixture
    def case(self):
        return WAN_OF_TWO

    def test_the_one_to_change_has_to_be_named(self, case):
        pipe = case.pipe()
        legal = "legal for this WanPipeline: 'transformer', 'transformer_2'"
        for call in (lambda **x: case.elastic(pipe, **x), lambda **x: handle_of(pipe, **x)):
            with pytest.raises(ValueError, match=f"component = None; {legal}"):
                call()
            with pytest.raises(ValueError, match=f"component = 'unet'; {legal}"):
                call(component="unet")
        assert all(handle_of(pipe, component=name) is None for name in COMPONENTS)

    def test_one_transformer_needs_no_name(self):
        case = PIPES["wan"]
        pipe = case.pipe()
        handle = case.elastic(pipe, "transformer")
        assert handle_of(pipe).model is handle_of(pipe, component="transformer").model
        with pytest.raises(ValueError, match=r"'transformer_2'; legal .*'transformer'$"):
            handle_of(pipe, component="transformer_2")
        with pytest.raises(ValueError, match="component = 'transformer'; legal for a bare model"):
            handle_of(handle.model, component="transformer")
        second = wan_of_two()
        second.register_modules(transformer=None)
        assert case.elastic(second).model is second.transformer_2

    @pytest.mark.parametrize("boundary", [0.8, 0.5, None])
    @pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
    def test_each_has_a_plan_of_the_steps_it_is_called_at(self, case, boundary, guided):
        pipe = case.pipe()
        pipe.register_to_config(boundary_ratio=boundary)
        handles = {name: case.elastic(pipe, name) for name in COMPONENTS}
        expected = case.draw(copy_of(case, boundary), guided=guided, num_inference_steps=6)
        draw = lambda: case.draw(pipe, guided=guided, num_inference_steps=6)  # noqa: E731
        assert torch.equal(draw(), expected)
        edge = 1.0 if boundary is None else boundary
        handles["transformer"].schedule = Schedule.weak_first((1 - edge) / 2)
        handles["transformer_2"].schedule = Schedule.weak_first(0.5)
        if boundary is None:
            handles["transformer"].schedule = Schedule.weak_first(0.5)
        assert differs(draw(), expected)
        first = assert_kept(case, handles["transformer"], guided=guided, steps=6)
        if boundary is None:
            assert len(first.steps) == 6
            with pytest.raises(ValueError, match="num_inference_steps = 6; at none of them"):
                handles["transformer_2"].plan(6)
            return
        second = assert_kept(case, handles["transformer_2"], guided=guided, steps=6)
        levels = [step.level for plan in (first, second) for step in plan.steps]
        assert len(levels) == 6
        assert levels == sorted(levels, reverse=True)
        assert min(step.level for step in first.steps) >= boundary
        assert max(step.level for step in second.steps) < boundary

    @pytest.mark.parametrize("boundary", [0.8, 0.5])
    @pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
    def test_a_cap_and_a_budget_hold_for_each(self, case, boundary, share):
        """Each plans for its own calls alone: eight and two of ten, or five and five."""
        pipe = copy_of(case, boundary)
        handles = [case.elastic(pipe, name, scales=(2,)) for name in COMPONENTS]
        for handle in handles:
            handle.controller = DDiTController(
                tau=0.0, order=1, coarse=(WEAK,), cap=share, start=WEAK
            )
        case.draw(pipe, num_inference_steps=10)
        assert sum(len(handle.report().calls) for handle in handles) == 2 * 10
        levels = [call.level for handle in handles for call in handle.report().calls[::2]]
        assert levels == sorted(levels, reverse=True)
        for handle in handles:
            self.assert_held(handle, share, branches=2)  # a controller's step has one mode
            handle.budget = share
        case.draw(pipe, num_inference_steps=10)
        for handle in handles:
            self.assert_held(handle, share, branches=1)
            assert_kept(case, handle, steps=10)

    @staticmethod
    def assert_held(handle, share, branches):
        """A run costs what it may, to what the smallest part of it would cost more."""
        shares = [call.macs / call.full_macs for call in handle.report().calls]
        left = len(shares) * share - sum(shares)
        assert min(shares) < 0.5  # the budget asks for some coarse calls
        assert -1e-9 <= left < branches * (1 - min(shares))

    def test_changing_one_leaves_the_other_alone(self, case, assert_stock):
        pipe, expected = case.pipe(), stock(case)
        handle = case.elastic(pipe, "transformer_2")
        handle.schedule = Schedule.constant(WEAK)
        assert differs(case.draw(pipe), expected)
        assert_kept(case, handle)
        assert_stock(pipe.transformer, used(case).transformer)
        other = case.elastic(pipe, "transformer")
        assert handle_of(pipe, component="transformer").model is pipe.transformer
        handle.remove()
        assert_stock(pipe.transformer_2, used(case).transformer_2)
        assert handle_of(pipe, component="transformer") is not None
        other.remove()
        assert torch.equal(case.draw(pipe), expected)

    def test_both_weakly_guided_and_run_again(self, case):
        pipe = case.pipe()
        for name in COMPONENTS:
            case.elastic(pipe, name).schedule = Schedule.weak_first(0.0, guidance="weak")
        first = case.draw(pipe, num_inference_steps=6)
        case.draw(pipe, num_inference_steps=5)
        assert torch.equal(case.draw(pipe, num_inference_steps=6), first)
        for name in COMPONENTS:
            assert_kept(case, handle_of(pipe, component=name), steps=6)

    def test_saved_while_both_are_elastic(self, case, tmp_path):
        pipe = case.pipe()
        handles = {name: case.elastic(pipe, name) for name in COMPONENTS}
        for name, handle in handles.items():
            handle.schedule = Schedule.weak_first(0.9)
            handle.adapter().save_pretrained(tmp_path / name)
        picture = case.draw(pipe)
        pipe.save_pretrained(tmp_path / "pipe")
        again = loaded(diffusers.WanPipeline, tmp_path / "pipe")
        assert torch.equal(case.draw(again), stock(case))
        for name in COMPONENTS:
            elastify(again, tmp_path / name, component=name)
        assert torch.equal(case.draw(again), picture)


def copy_of(case: PipeCase, boundary: float | None):
    """The stock pipeline with another boundary."""
    pipe = case.pipe()
    pipe.register_to_config(boundary_ratio=boundary)
    return pipe
