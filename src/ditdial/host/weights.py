"""How a model may hold its weights: quantised, in eight bits, or elsewhere between two calls.

New tensors are always ordinary ones of sixteen bits or more, made from what the base's weights
stand for. Hooks of accelerate and diffusers bring weights back in the ``forward`` of the module
that holds them; some of ours have no ``forward`` of their own, and are brought back here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.plan.mode import Mode


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers itself, here and now."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def is_summable(tensor: Tensor) -> bool:
    """Whether an update can be added to a weight."""
    return is_ordinary(tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def values(layer: Any) -> Tensor:
    """The weight of a layer as a floating tensor, in the dtype that the layer computes in.

    Raises:
        ValueError: a kind of weight that cannot be read.
    """
    weight, dtype = layer.weight, compute_dtype(layer)
    if type(weight).__module__.startswith("torchao."):
        weight = weight.dequantize()
    return weight.to(dtype)


def compute_dtype(layer: Any) -> torch.dtype:
    """The dtype of a layer's inputs and of new tensors beside it.

    Raises:
        ValueError: a kind of weight of which this is not known.
    """
    weight, casting = layer.weight, _diffusers_hook(layer, "layerwise_casting")
    if casting is not None:
        return casting.compute_dtype
    known = type(weight) in (Tensor, nn.Parameter) or type(weight).__module__.startswith("torchao.")
    if not known or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise ValueError(
            f"a layer of class {type(layer).__name__} has a weight of class "
            f"{type(weight).__name__} and dtype {weight.dtype}, which new tensors cannot be made "
            "from; legal: floating weights, torchao's, and eight bits by enable_layerwise_casting"
        )
    return weight.dtype


def outline(module: nn.Module) -> Any:
    """A model of the same modules and attributes, whose weights have shapes but take no memory.

    It is for looking at what would be made of the model, not for running it.
    """
    made: dict[int, Tensor] = {}  # a weight that two modules share is one here, too

    def shape_of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            kept = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if kept else empty
        return made[id(tensor)]

    def look_at(module: nn.Module) -> nn.Module:
        view = object.__new__(type(module))
        view.__dict__ = {
            **module.__dict__,
            "_parameters": {name: shape_of(x) for name, x in module._parameters.items()},
            "_buffers": {name: shape_of(x) for name, x in module._buffers.items()},
            "_modules": {
                name: None if child is None else look_at(child)
                for name, child in module._modules.items()
            },
        }
        return view

    return look_at(module)


def check_in_place(model: nn.Module) -> None:
    """Refuse a model whose weights are kept elsewhere: nobody would move new tensors with them.

    Raises:
        ValueError: naming the module that is offloaded.
    """
    for name, module in model.named_modules():
        if _accelerate_offloads(module):
            kind = "accelerate"
        elif _diffusers_hook(module, "group_offloading") is not None:
            kind = "diffusers (group offloading)"
        else:
            continue
        raise ValueError(
            f"weights of this model ({name or 'its own'}) are offloaded by {kind}; legal: elastify "
            "first and offload then, so that new tensors are offloaded too"
        )


def check_latent(latent: Tensor, new: nn.Module, mode: Mode) -> None:
    """Refuse a latent that cannot be multiplied with a mode's weights.

    Weights that a hook moves or casts, and autocast, are left to themselves.

    Raises:
        ValueError: naming dtype and device of both.
    """
    weight = next(new.parameters())
    same_device, same_dtype = latent.device == weight.device, latent.dtype == weight.dtype
    if same_device and (same_dtype or torch.is_autocast_enabled(latent.device.type)):
        return
    if any(is_hooked(module) for module in new.modules()):
        return
    raise ValueError(
        f"the latent is {latent.dtype} on {latent.device}, and the weights of mode {mode.name!r} "
        f"are {weight.dtype} on {weight.device}; legal: both the same"
    )


def is_offloaded(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks keep weights of these modules elsewhere between calls."""
    marks = {"_hf_hook", "_diffusers_hook"}  # every call asks, and most modules have none
    marked = (module for module in modules if marks & module.__dict__.keys())
    return any(True for module in marked for _ in _offloading(module))


@contextlib.contextmanager
def onloaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bring the weights of these modules back for a while, as their hooks would in a forward."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            for hook in _offloading(module):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def is_silent(module: nn.Module) -> bool:
    """Whether a module has no ``forward``, so that no hook on it ever runs."""
    return type(module).forward is nn.Module.forward


class NewLinear(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """A linear layer of an adapter, which stays as it is where the base's layers are shrunk.

    The class it comes from tells torch's and torchao's quantisers to leave it alone.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(_sixteen_bits(fn), recurse)


class NewParameters(nn.ParameterDict):
    """Parameters of an adapter by mode, which stay as they are where the base's are shrunk.

    Low-rank factors have entries far below the smallest of an eight-bit float (2e-3 in e4m3).
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(_sixteen_bits(fn), recurse)


def _sixteen_bits(fn: Any) -> Any:
    """``fn`` of `torch.nn.Module._apply`, but where it would leave eight bits per number."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.is_floating_point() and moved.dtype.itemsize == 1:
            return tensor.to(moved.device)
        return moved

    return apply


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook may move or cast a module's weights, so that they are others at each call."""
    return any(True for _ in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Hooks that may move or cast a module's weights."""
    yield from _offloading(module)
    casting = _diffusers_hook(module, "layerwise_casting")
    if casting is not None:
        yield casting


def _offloading(module: nn.Module) -> Iterator[Any]:
    """Hooks that move a module's weights in its forward and back."""
    if _accelerate_offloads(module):
        yield module.__dict__["_hf_hook"]
    group = _diffusers_hook(module, "group_offloading")
    if group is not None:
        yield group


def _accelerate_offloads(module: nn.Module) -> bool:
    hook = module.__dict__.get("_hf_hook")
    inner = getattr(hook, "hooks", (hook,))  # several in one
    return any(getattr(each, "offload", False) for each in inner)


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)


_VERSION = Tensor._version.__get__  # pyrefly: ignore[missing-attribute]
"""A getter takes half the time of a loop."""


def versions(*tensors: Tensor) -> tuple[object, ...]:
    """What changes when any of the tensors is replaced, moved, cast or written to."""
    tracked = not any(map(Tensor.is_inference, tensors))
    counts = map(_VERSION, tensors) if tracked else map(_version, tensors)
    return (*map(Tensor.data_ptr, tensors), *counts)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
