"""A user's LoRAs and `elastify` in every order that diffusers itself allows.

After each order the elastic model is compared with one that became elastic last, on a base with the
same LoRAs, and the restored model with a base that was never elastic. Where an adapter has its own
version of the base's weights, the elastic model is compared with one that became elastic first, and
its full mode with a base that has these weights and was never elastic.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import warnings
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from tests.backbones.pipes import PIPES
from tests.backbones.tiny import CASES
from tests.fuzz.drawn import drawn
from tests.methods.test_combined import shake
from torch import nn

from ditdial import (
    FULL,
    DDiT,
    DyDiT,
    Execution,
    FlexiDiT,
    Mode,
    Schedule,
    Segment,
    SparseDiT,
    elastify,
)

WEAK, GRID, HALF = Mode(2), Mode(token_grid=(3, 2)), Mode(width=0.5)
LONGEST = 4
JOINT = ("sd3", "flux")
DEPTHS = {
    "flux": {"num_layers": 2, "num_single_layers": 2},
    "sd3": {"num_layers": 4},
    "wan": {"num_layers": 4},
}
GRIDS = {"wan": (2, 6, 6)}


def sparsedit(name, recipe="lora"):
    plan = (0, 1) if name in JOINT else (1, 0)
    group, stages = (1, 1, 1, 0), ((0, (3, 2)),)
    return SparseDiT(
        pool=plan[0], modules=1, group=group, top=plan[1], stages=stages, recipe=recipe, rank=2
    )


METHODS = {
    "flexidit": lambda name: [FlexiDiT(scales=(2,), rank=3)],
    "ddit": lambda name: [DDiT(scales=(2,), rank=3)],
    "dydit": lambda name: [DyDiT(groups=2, recipe="td-lora", rank=2)],
    "sparsedit": lambda name: [sparsedit(name)],
    "combined": lambda name: [each(name)[0] for each in COMBINED],
    "flexidit-shared": lambda name: [FlexiDiT(scales=(2,), recipe="shared")],
    "dydit-full": lambda name: [DyDiT(groups=2, recipe="full")],
    "sparsedit-full": lambda name: [sparsedit(name, "full")],
}
COMBINED = [METHODS[key] for key in ("flexidit", "sparsedit", "dydit")]
MODES = {
    "flexidit": (WEAK,),
    "ddit": (WEAK,),
    "dydit": (HALF,),
    "sparsedit": (GRID,),
    "combined": (WEAK, Mode(2, token_grid=(3, 2)), Mode(2, token_grid=(3, 2), width=0.5)),
    "flexidit-shared": (WEAK,),
    "dydit-full": (HALF,),
    "sparsedit-full": (GRID,),
}
RETRAINED = ("flexidit-shared", "dydit-full", "sparsedit-full")
"""Methods whose adapters hold weights of the base."""

DEEP = [(name, method) for name in DEPTHS for method in METHODS]
MOST = [case for case in DEEP if "flux" in case or case[1] in ("flexidit", "combined")]
OTHERS = [
    (name, "flexidit")
    for name in {case.model_class: name for name, case in reversed(CASES.items())}.values()
    if name not in DEPTHS and hasattr(getattr(diffusers, CASES[name].model_class), "fuse_lora")
]


@functools.cache
def base(name):
    case = CASES[name]
    return replace(case, config={**case.config, **DEPTHS.get(name, {})}).model()


@functools.cache
def call_of(name):
    grid = GRIDS.get(name, (1, 6, 6)) if name in DEPTHS else CASES[name].grids[0]
    return CASES[name].call(1, grid, 700.0)


KINDS = {"style": (0, 1), "face": (1, 2)}
"""Of each LoRA, the places of its layers among every three."""


def is_plain(module):
    """Whether LoRAs fit a layer: a linear one, or a convolution that makes tokens of patches."""
    return type(module) is nn.Linear or (
        type(module) in (nn.Conv2d, nn.Conv3d) and module.stride == module.kernel_size != (1, 1)
    )


@functools.cache
def lora(name, which):
    """The state of a LoRA as a file holds it: on two layers of three, the others overlap."""
    layers = [key for key, module in base(name).named_modules() if is_plain(module)]
    targets = [key for i, key in enumerate(layers) if i % 3 in KINDS[which]]
    model = copy.deepcopy(base(name))
    model.add_adapter(LoraConfig(r=2, target_modules=targets), which)
    generator = torch.Generator().manual_seed(len(which))
    state = get_peft_model_state_dict(model, adapter_name=which)
    return {k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in state.items()}


def loading(which):
    def load(name, model):
        model.load_lora_adapter(dict(lora(name, which)), prefix=None, adapter_name=which)

    return load


def set_adapters(name, model):
    names = list(model.peft_config)
    model.set_adapters(names, [0.5] * len(names))


LORA = {
    "load style": loading("style"),
    "load face": loading("face"),
    "fuse": lambda name, model: model.fuse_lora(),
    "unfuse": lambda name, model: model.unfuse_lora(),
    "unload": lambda name, model: model.unload_lora(),
    "set": set_adapters,
    "disable": lambda name, model: model.disable_lora(),
    "enable": lambda name, model: model.enable_lora(),
}


def legal(orders, longest):
    """Orders that are one action longer each, where every action has something to act on."""
    longer = []
    for order in orders:
        loaded, elastic = set(), False
        for action in order:
            loaded = {"load": loaded | {action}, "unload": set()}.get(action.split()[0], loaded)
            elastic = {"elastify": True, "remove": False}.get(action, elastic)
        fused = sum({"fuse": 1, "unfuse": -1}.get(action, 0) for action in order if loaded)
        for action in (*LORA, "elastify", "again", "remove"):
            fits = bool(loaded)
            if action.startswith("load"):
                fits = action not in loaded
            elif action == "unfuse":
                fits = fused > 0
            elif action in ("elastify", "again", "remove"):
                fits = elastic == (action != "elastify")
            if fits:
                longer.append((*order, action))
    return orders if longest == 0 else [*orders, *legal(longer, longest - 1)]


ORDERS = [order for order in legal([()], LONGEST) if "elastify" in order]


@torch.no_grad()
def predict(model, name):
    found = model(**call_of(name), return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


@functools.cache
def adapters(name, method):
    """Of a base that never had a LoRA, away from where they start."""
    model = copy.deepcopy(base(name))
    found = []
    for part in METHODS[method](name):
        torch.manual_seed(2)
        with elastify(model, part) as handle:
            shake(handle)
            kept = handle.adapter()
            tensors = {k: v.detach().clone() for k, v in kept.tensors.items()}
            for key, value in tensors.items():
                if key.startswith("base.") and value.is_floating_point():
                    value += 0.02 * torch.randn(value.shape)
            found.append(replace(kept, tensors=tensors))
    return found


@functools.cache
def trained(name, method):
    """What the adapters hold together, under the names in an adapter of the whole."""
    handle = elastify(copy.deepcopy(base(name)), adapters(name, method))
    return {k: v.detach().clone() for k, v in handle.adapter().tensors.items()}


@functools.cache
def stock(name, actions, *, drawing):
    """A base to which these actions alone were done."""
    model = copy.deepcopy(base(name))
    for action in actions:
        LORA[action](name, model)
        if drawing:
            predict(model, name)
    return model


@functools.cache
def expected(name, method, actions, *, drawing):
    """Outcomes in all modes of a model that became elastic last, or first if that is retrained."""
    if method not in RETRAINED:
        model = copy.deepcopy(stock(name, actions, drawing=drawing))
        return outcomes(elastify(model, adapters(name, method)), name, method)
    (adapter,) = adapters(name, method)
    model, retrained = copy.deepcopy(base(name)), copy.deepcopy(base(name))
    own = {k: v for k, v in adapter.tensors.items() if k.startswith("base.")}
    retrained.load_state_dict({k.removeprefix("base."): v for k, v in own.items()})
    handle = elastify(model, adapter)
    for action in actions:
        LORA[action](name, model)
        LORA[action](name, retrained)
        if drawing:
            outcomes(handle, name, method)
            predict(retrained, name)
    found = outcomes(handle, name, method)
    assert_alike(found[-1:], [predict(retrained, name)])
    return found


def outcomes(handle, name, method):
    """What each mode predicts, or why it does not."""
    found = []
    for mode in (*MODES[method], FULL):
        with handle.using(mode):
            try:
                found.append(predict(handle.model, name))
            except RuntimeError as error:
                if "legal" not in str(error):  # torch's own
                    raise
                found.append(str(error))
    return found


def facts(model):
    """What else than tensors the modules of a model have."""
    return {
        key: (type(x), len(x._forward_pre_hooks), len(x._forward_hooks), sorted(x.__dict__))
        for key, x in model.named_modules()
    }


def check(name, method, order, *, merge, drawing):
    """Do all of it, in this order, and compare.

    Args:
        drawing: in every mode, behind every action.
    """
    model, handle = copy.deepcopy(base(name)), None
    for action in order:
        if action in LORA:
            LORA[action](name, model)
        elif action == "remove":
            handle, _ = None, handle.remove()
        else:
            execution = Execution(merge=merge)
            handle = elastify(model, adapters(name, method), execution=execution)
        if drawing and handle is not None:
            outcomes(handle, name, method)
        elif drawing:
            predict(model, name)
    actions = tuple(action for action in order if action in LORA)
    retrained = method in RETRAINED
    if handle is not None:
        right = expected(name, method, actions, drawing=drawing)
        assert_alike(outcomes(handle, name, method), right)
        kept, right = handle.adapter().tensors, trained(name, method)
        assert kept.keys() == right.keys()
        known = [key for key in kept if not (key.startswith("base.") and hidden(order)[1])]
        assert_alike([kept[x] for x in known], [right[x] for x in known], exact=not retrained)
        handle.remove()
    right = copy.deepcopy(stock(name, actions, drawing=drawing))
    assert facts(model) == facts(right)
    found, right_one = predict(model, name), predict(right, name)
    assert_alike([found], [right_one], exact=True)
    state, right_state = model.state_dict(), right.state_dict()
    assert list(state) == list(right_state)
    assert_alike([*state.values()], [*right_state.values()], exact=True)


def assert_alike(found, right, *, exact=False):
    """Tensors, or words where a mode was refused.

    Args:
        exact: bit for bit.
    """
    for one, other in zip(found, right, strict=True):
        if isinstance(other, str) or exact:
            assert one == other if isinstance(other, str) else torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def hidden(order):
    """Whether weights have another share of LoRAs in them than is known of those that are fused.

    PEFT does not keep the scale at which it has fused a LoRA, nor a LoRA that is unloaded.

    Returns:
        When a model becomes elastic, and at the end.
    """
    elastic = fused = was_set = baked = early = False
    for action in order:
        if action in ("elastify", "again"):
            early |= baked or (was_set and not elastic)
        elastic = {"elastify": True, "remove": False}.get(action, elastic)
        was_set |= fused and action == "set"
        baked |= (fused and action == "unload") or (was_set and action in ("unfuse", "disable"))
        was_set &= action not in ("unfuse", "unload")
        fused = {"fuse": True, "unfuse": False, "unload": False}.get(action, fused)
    return early, baked


def check_all(name, method, orders, ways):
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for order in orders:
            # What nobody knows of stays in the weights of the base where an adapter has its own.
            for merge, drawing in () if method in RETRAINED and hidden(order)[0] else ways:
                try:
                    check(name, method, order, merge=merge, drawing=drawing)
                except Exception as error:
                    wrong.append((order, merge, drawing, repr(error)[:300]))
    assert not wrong, f"{len(wrong)}: {wrong[:6]}"


WAYS = ((False, False), (False, True), (True, True))
"""Whether weights are merged, and whether each action is followed by a drawing."""


@pytest.mark.parametrize(("name", "method"), MOST + OTHERS)
def test_a_random_order(name, method):
    chance = random.Random(f"{name} {method}")
    check_all(name, method, [chance.choice(ORDERS)], [chance.choice(WAYS)])


FORGOTTEN = (
    ("fuse", "elastify", "set"),
    ("elastify", "fuse", "set"),
    ("elastify", "fuse", "set", "again"),
    ("elastify", "fuse", "unload"),
    ("fuse", "elastify", "set", "unfuse"),
    ("fuse", "elastify", "disable", "set", "enable"),
)
"""What PEFT does not keep of a fused LoRA: the scale it had then, or all of it."""


@pytest.mark.parametrize(
    ("name", "method", "orders"),
    [
        ("wan", "flexidit-shared", FORGOTTEN),
        ("flux", "dydit-full", FORGOTTEN[::3]),
        ("sd3", "sparsedit-full", FORGOTTEN[1::3]),
    ],
)
def test_both_versions_of_the_base_hold_as_much_of_a_fused_lora(name, method, orders):
    orders = [("load style", *order) for order in orders]
    assert not any(hidden(order)[0] for order in orders)
    check_all(name, method, orders, WAYS[:1])


def test_a_lora_may_come_for_the_convolution_that_makes_tokens():
    assert any(state.ndim == 5 for state in lora("wan", "style").values())
    check_all("wan", "flexidit", [("elastify", "load style")], WAYS[:1])


@pytest.mark.parametrize("name", DEPTHS)
def test_each_lora_changes_what_coarse_modes_predict(name):
    found = [
        expected(name, "flexidit", actions, drawing=False)[0]
        for actions in ((), ("load style",), ("load face",), ("load style", "set"))
    ]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3


def guided(name, order, *, packed):
    """A picture with weak guidance, behind actions on a LoRA of modulation, attention and ends."""
    case = PIPES[name]
    pipe = case.pipe()
    for action in order.split(", "):
        if action == "elastify":
            handle = case.elastic(pipe)
            handle.execution = Execution(packed=packed)
            handle.schedule = Schedule([Segment(start=1.0, stop=0.0, mode=FULL, guide=WEAK)])
        elif action == "load":
            torch.manual_seed(4)
            targets = ["linear", "to_q", "proj_out", "proj_out_1", "proj_out_2"]
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            inject_adapter_in_model(config, pipe.transformer)
        else:
            recurse_remove_peft_layers(pipe.transformer)
    return case.draw(pipe)


@pytest.mark.parametrize("name", ["sd3", "dit"])
def test_strips_of_a_packed_batch_share_the_modulation_of_a_lora(name):
    without, right = (guided(name, x, packed=False) for x in ("elastify", "load, elastify"))
    assert (right - without).abs().max() > 0.1
    for order in ("load, elastify", "elastify, load", "elastify, load, unload, load"):
        assert (guided(name, order, packed=True) - right).abs().max() < 1e-4, order
    found = guided(name, "load, elastify, unload", packed=True)
    assert (found - without).abs().max() < 1e-4


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
def test_routed_modes_see_what_is_fused_and_unloaded_between_two_looks(merge):
    order = ("elastify", "load face", "fuse", "unload")
    check_all("flux", "combined", [order], [(merge, True)])


DRAWN = 2
"""Orders of each case; all 487 take minutes: DITDIAL_FUZZ=all pytest -m fuzz FILE -k CASE."""


@pytest.mark.fuzz
@pytest.mark.parametrize("way", WAYS, ids=["apart", "apart drawn", "merged drawn"])
@pytest.mark.parametrize(("name", "method"), DEEP)
def test_orders_of_every_method(name, method, way):
    check_all(name, method, drawn(ORDERS, DRAWN, name, method, way), [way])


@pytest.mark.fuzz
@pytest.mark.parametrize(("name", "method"), OTHERS)
def test_orders_of_every_class(name, method):
    short = [order for order in ORDERS if len(order) < LONGEST]
    check_all(name, method, drawn(short, DRAWN, name, method), WAYS)
