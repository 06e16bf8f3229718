"""The only surgery on a live model: what an elastic model has that the stock one has not.

The model keeps its object, weights and keys; the classes of a few submodules become generated
subclasses, hooks are put on others, and new tensors are added beside the old ones.
`Surgery.install` and `Surgery.uninstall` are inverses, and both may be repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from ditdial.adapter import Adapter
from ditdial.backbones import Backbone
from ditdial.backbones.layers import matching, named
from ditdial.cost.linears import matrix_sizes
from ditdial.host.loras import innermost
from ditdial.host.weights import check_in_place, is_offloaded, is_silent
from ditdial.layers.low_rank import PARTS, FusedSeam, LowRankSeam
from ditdial.layers.merged_weights import MergedWeights
from ditdial.layers.new_modules import Hook
from ditdial.layers.packed import AttentionSeam, ModulationSeam
from ditdial.layers.places import Places, Swap
from ditdial.layers.sinusoids import SinusoidSeam
from ditdial.layers.state import State
from ditdial.layers.swap import is_swapped
from ditdial.layers.text import TextSeam
from ditdial.layers.tokens import ConditioningSeam, EmbedSeam, OutputSeam, RotarySeam
from ditdial.layers.width import PLACE
from ditdial.layers.width_pass import Routing
from ditdial.layers.wiring import Wiring
from ditdial.methods import Method
from ditdial.runtime.tensors import NEW, Tensors
from ditdial.runtime.widths import Widths

FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
"""Projections of diffusers' attention that stand for several, and which."""


@dataclass(eq=False)
class Surgery:
    """On one model.

    Attributes:
        stock: class of the model before.
        adapted: the modules that hold adapted layers.
        merged: copies of adapted layers' weights with their updates added in.
        widths: what routed modes leave in at each noise level.
        places: what is on the model's modules, and where.
        sizes: of the products in the layers that project patches, as the method found them.
        misfit: why the method's modes cannot make tokens at present; None if they can.
        own: modules that the method has added.
        silent: holders of new tensors that no hook brings back when they are offloaded.
        away: whether the model's weights may be elsewhere between calls.
        lists: the model's lists of blocks.
    """

    wiring: Wiring
    tensors: Tensors
    stock: type
    adapted: list[nn.Module]
    merged: MergedWeights
    widths: Widths | None
    sizes: list[tuple[int, int]]
    places: Places = field(default_factory=Places)
    misfit: str | None = None
    own: list[nn.Module] = field(default_factory=list)
    silent: list[nn.Module] = field(default_factory=list)
    away: bool = False
    lists: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapters: Sequence[Adapter]
    ) -> Surgery:
        """Prepare a stock model's surgery; the model is only read.

        Args:
            adapters: one of the method, or of some of the parts of a combination.

        Raises:
            ValueError: an adapter's tensors do not fit, the model already uses our attribute name,
                or its weights are held in a way that new tensors cannot be made from.
        """
        if hasattr(model, NEW):
            raise ValueError(
                f"the model already has an attribute {NEW!r}, which is where new tensors go"
            )
        check_in_place(model)
        tensors = Tensors.build(model, backbone, method, adapters)
        state = State(patch=backbone.patches.size(model), corners=tensors.new.corners)
        routing = tensors.new.routing
        parents = {name.rpartition(".")[0] for name in tensors.pairs}
        return cls(
            wiring=Wiring(state, backbone, tensors.new),
            tensors=tensors,
            stock=type(model),
            adapted=[model.get_submodule(name) for name in sorted(parents)],
            merged=MergedWeights([layer for layer, _, _ in tensors.pairs.values()]),
            widths=None if routing is None else _widths(model, backbone, method, routing),
            sizes=_sizes(model, backbone),
        )

    def install(self, model: nn.Module) -> None:
        """Attach the new parameters and swap classes; the inverse of `uninstall`.

        The model is not an elastic one yet: its own class is swapped by
        `ditdial.runtime.model_class.install`, which calls this first. What may be refused was
        refused in `build`, when nothing had been changed.
        """
        # Retrained base weights go in first and come out last: all else is put on their network.
        self.tensors.exchange(model)
        model.add_module(NEW, self.tensors.new)
        for layer, A, B in self.tensors.pairs.values():
            layer.coarse_A, layer.coarse_B = A, B
        for each in (*self._swaps(model), *self._hooks(model)):
            self.places.put(each, self.wiring)
        self.places.mark(model)
        self.misfit = self._misfit(model)
        self.lists = {k: m for k, m in model.named_children() if isinstance(m, nn.ModuleList)}
        self.own = list(self.tensors.new.modules())
        self.silent = [module for module in self.tensors.holders() if is_silent(module)]

    def _swaps(self, model: nn.Module) -> Iterator[Swap]:
        """Every swap, in order: a later one stands in front of an earlier one."""
        backbone, packed = self.wiring.backbone, self.wiring.backbone.packed
        # What makes and ends tokens does so for a LoRA too, which may come and go.
        patches = backbone.patches
        yield Swap(model.get_submodule(patches.embed), EmbedSeam, follows=True)
        yield Swap(model.get_submodule(patches.output), OutputSeam, follows=True)
        if backbone.rotary is not None:
            yield Swap(model.get_submodule(backbone.rotary), RotarySeam, follows=True)
        # Packed batches: the strips of a picture share its modulation; attention goes part by part.
        if packed is not None:
            for module in matching(model, packed.attention):
                yield Swap(module, AttentionSeam)
            for module in matching(model, packed.modulation):
                yield Swap(module, ModulationSeam, follows=True)
        # What depends on the time alone is kept for a pass, and on the prompt alone for a run.
        for module in matching(model, backbone.sinusoids):
            yield Swap(module, SinusoidSeam)
        for _, layer in named(model, backbone.prompt_only):
            yield Swap(layer, TextSeam)
        # Methods that tell the model its mode mark the vector that drives modulation.
        if self.tensors.method.conditions:
            for module in matching(model, backbone.conditioning):
                yield Swap(module, ConditioningSeam)
        # Low-rank updates come before what narrows them together with their layer.
        for layer, _, _ in self.tensors.pairs.values():
            yield Swap(layer, LowRankSeam)
        for module, mixin, place in self.widths.seams(model) if self.widths else ():
            yield Swap(module, mixin, {PLACE: place})

    def _hooks(self, model: nn.Module) -> Iterator[Hook]:
        for block, hook in self.wiring.backbone.block_hooks(model):
            yield Hook(block, hook)
        yield from self.tensors.new.hooks(model)

    def look_over(self, model: nn.Module) -> None:
        """Find out, and mend, what somebody may have done to the model since the last look."""
        if self.places.follow(self.wiring):
            self.misfit = self._misfit(model)
        self.keep_fused_seams()
        # Whoever offloads a model puts hooks on all of it, or a map on it: a short look is enough.
        self.away = hasattr(model, "hf_device_map") or is_offloaded(self.own)

    def _misfit(self, model: nn.Module) -> str | None:
        """What is wrong with the layers that project patches, since the method's go by them."""
        backbone = self.wiring.backbone
        names = backbone.patches.embed, backbone.patches.output
        for name, size, known in zip(names, _sizes(model, backbone), self.sizes, strict=True):
            if size != known:
                return (
                    f"{name} has {size[0]} inputs and {size[1]} outputs by now (a Control LoRA "
                    f"changes them), and had {known[0]} and {known[1]} when the model was made "
                    "elastic"
                )
        return None

    def keep_fused_seams(self) -> None:
        """Swap projections that ``fuse_qkv_projections`` has made of adapted layers."""
        for module in self.adapted:
            for name in FUSED.keys() & module._modules.keys():
                fused, parts = module._modules[name], FUSED[name]
                if fused is not None and not is_swapped(fused):
                    layers = [innermost(module.get_submodule(part)) for part in parts]
                    self.places.put(Swap(fused, FusedSeam, {PARTS: layers}), self.wiring)

    def uninstall(self, model: nn.Module) -> None:
        """Undo `install` exactly.

        Raises:
            RuntimeError: the adapter's own version of base weights is offloaded.
        """
        self.tensors.check_exchange(model)  # all that may be refused, before anything is undone
        self.places.clear()
        self.merged.forget()
        for layer, _, _ in self.tensors.pairs.values():
            del layer.coarse_A, layer.coarse_B
        del model._modules[NEW]
        self.tensors.exchange(model)

    def with_own_blocks(self, model: nn.Module) -> nn.Module:
        """A view of the model to count in: cache-dit puts other blocks there while a call runs."""
        view = copy.copy(model)
        view.__dict__["_modules"] = {**model._modules, **self.lists}
        return view


def _sizes(model: nn.Module, backbone: Backbone) -> list[tuple[int, int]]:
    return [matrix_sizes(layer) for layer in backbone.patches.layers(model)]


def _widths(model: nn.Module, backbone: Backbone, method: Method, routing: Routing) -> Widths:
    """What the routed modes of a method, or of a part of it, leave in."""
    routed = next(x for x in method.singles if any(mode.is_routed for mode in x.modes))
    usual = backbone.shape(model, *backbone.default_size(model))
    return Widths(routing, routed.priced(usual, model, backbone), backbone, model)
