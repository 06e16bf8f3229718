"""The only surgery on a live model: what an elastic model has that the stock one has not.

The model keeps its object, weights and keys; its class and that of a few submodules become
generated subclasses, and new tensors are added beside the old ones. `Surgery.install` and
`Surgery.uninstall` are inverses, and both may be repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ditdial.adapter import Adapter, check_tensors
from ditdial.backbones import Backbone
from ditdial.host.weights import (
    NewParameters,
    check_in_place,
    compute_dtype,
    is_offloaded,
    is_ordinary,
    is_silent,
    onloaded,
)
from ditdial.layers.low_rank import FusedSeam, LowRankSeam
from ditdial.layers.merged_weights import Merges
from ditdial.layers.state import MERGE, PARTS, PLACE, ROLE, ROUTER, Router
from ditdial.layers.swap import rebind_hooks, restore_class, swap_class
from ditdial.layers.tokens import (
    AttentionSeam,
    ConditioningSeam,
    EmbedSeam,
    ModulationSeam,
    OutputSeam,
    RotarySeam,
    TextSeam,
)
from ditdial.methods import Method
from ditdial.plan.schedule import Schedule
from ditdial.runtime.model_class import ENGINE, SIZES, elastic_class
from ditdial.runtime.widths import Widths

if TYPE_CHECKING:
    from ditdial.runtime.engine import Engine

FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
"""Projections of diffusers' attention that stand for several, and which."""

LowRankPair = tuple[nn.Linear, nn.ParameterDict, nn.ParameterDict]


@dataclass(eq=False)
class Surgery:
    """On one model.

    Attributes:
        pairs: adapted linear layers with their low-rank factors by mode, under the stock names.
        base: the base's own tensors under the stock names, if the method trains them.
        owners: of those tensors: module and attribute.
        adapted: the modules that hold adapted layers.
        merges: copies of adapted layers' weights with their updates added in.
        widths: what routed modes leave in at each noise level.
        other_weights: while installed the base's own weights, else the adapter's; swapped by
            `install` and `uninstall`.
        quantised: what somebody has put in the place of tensors of ``base`` meanwhile.
        swapped: modules of another class now, in the order of their swaps.
        silent: holders of new tensors that no hook brings back when they are offloaded.
        away: whether the model's weights may be elsewhere between calls.
        lists: the model's lists of blocks.
    """

    router: Router
    method: Method
    stock: type
    pairs: dict[str, LowRankPair]
    base: dict[str, Tensor]
    owners: dict[str, tuple[nn.Module, str]]
    adapted: list[nn.Module]
    merges: Merges
    widths: Widths | None
    other_weights: dict[str, Tensor] = field(default_factory=dict)
    quantised: dict[str, Tensor] = field(default_factory=dict)
    swapped: list[nn.Module] = field(default_factory=list)
    hooks: list[tuple[nn.Module, RemovableHandle]] = field(default_factory=list)
    silent: list[nn.Module] = field(default_factory=list)
    away: bool = False
    lists: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapters: Sequence[Adapter]
    ) -> Surgery:
        """Prepare new parameters for a stock model, from adapters as far as there are any.

        The model is only read.

        Args:
            adapters: one of the method, or of some of the parts of a combination.

        Raises:
            ValueError: an adapter's tensors do not fit, the model already uses our attribute name,
                or its weights are held in a way that new tensors cannot be made from.
        """
        if hasattr(model, SIZES):
            raise ValueError(
                f"the model already has an attribute {SIZES!r}, which is where new tensors go"
            )
        check_in_place(model)
        base = model.state_dict(keep_vars=True) if method.trains_base else {}
        kinds = {type(x).__name__ for x in base.values() if not is_ordinary(x) and not x.is_meta}
        if kinds:
            raise ValueError(
                f"this method trains the base's own weights, some of which are {sorted(kinds)}; "
                "legal: elastify first and quantise then"
            )
        sizes = method.build(model, backbone)
        pairs = _low_rank_pairs(model, backbone, method)
        router = Router(backbone, sizes, backbone.patch(model))
        parents = {name.rpartition(".")[0] for name in pairs}
        surgery = cls(
            router=router,
            method=method,
            stock=type(model),
            pairs=pairs,
            base=dict(base),
            owners={name: _owner(model, name) for name in base},
            adapted=[model.get_submodule(name) for name in sorted(parents)],
            merges=Merges([layer for layer, _, _ in pairs.values()]),
            widths=None if sizes.routed is None else Widths(sizes.routed, backbone, model),
        )
        for adapter in adapters:
            surgery._load(adapter)
        return surgery

    def _load(self, adapter: Adapter) -> None:
        """Take the weights of an adapter of the method, or of a part of it."""
        expected = self.new_tensors(adapter.method)
        base = self.base if adapter.method.trains_base else {}
        check_tensors(expected | {f"base.{k}": v for k, v in base.items()}, adapter.tensors)
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(adapter.tensors[name])
        self.other_weights |= {  # copies: a loaded tensor may be a view of its file
            k: torch.empty_like(v).copy_(adapter.tensors[f"base.{k}"]) for k, v in base.items()
        }

    def new_tensors(self, method: Method | None = None) -> dict[str, Tensor]:
        """The added parameters under the names of an adapter file.

        Args:
            method: one part of a combination, under the names of an adapter of that part alone.
        """
        whole = method is None or method == self.method
        sizes = self.router.sizes if whole else self.router.sizes.of(method)
        tensors = {f"{SIZES}.{k}": v for k, v in sizes.state_dict().items()}
        own = None if whole else {mode.name for mode in method.modes}
        for name, (_, A, B) in self.pairs.items():
            for mode in A:
                if own is None or mode in own:
                    tensors[f"{name}.coarse_A.{mode}"] = A[mode]
                    tensors[f"{name}.coarse_B.{mode}"] = B[mode]
        return tensors

    def adapter(self, model: nn.Module, schedule: Schedule, **notes: Any) -> Adapter:
        """The present weights as an adapter."""
        holders = model.modules() if self.base else [*self._holders(), *self.merges.layers]
        holders = [module for module in holders if is_offloaded([module])]
        with onloaded(holders):
            tensors = self.new_tensors() | {f"base.{k}": v for k, v in self.base.items()}
            if holders:  # these leave again
                tensors = {k: v.detach().clone() for k, v in tensors.items()}
        return Adapter(
            method=self.method,
            base=self.router.backbone.identity(model),
            tensors=tensors,
            schedule=schedule,
            notes=notes,
        )

    def _holders(self) -> list[nn.Module]:
        """The modules that hold new tensors."""
        factors = [x for _, A, B in self.pairs.values() for x in (A, B)]
        return [*self.router.sizes.modules(), *factors]

    def install(self, model: nn.Module, engine: Engine) -> None:
        """Attach the new parameters and swap classes; the inverse of `uninstall`.

        Args:
            engine: that is to run the model's calls.
        """
        backbone = self.router.backbone
        self._exchange_weights()
        model.add_module(SIZES, self.router.sizes)
        self.keep_seams(model)
        for module in backbone.attention_layers(model):
            self._swap(module, AttentionSeam)
        for module, hook in backbone.block_hooks(model):
            module.__dict__[ROUTER] = self.router
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self.hooks.append((module, handle))
        self.hooks += self.router.sizes.attach(model, self.router)
        for module in backbone.text_layers(model):
            self._swap(module, TextSeam)
        for module in backbone.conditioning_layers(model) if self.method.conditions else ():
            self._swap(module, ConditioningSeam)
        for module in backbone.modulation_layers(model):
            self._swap(module, ModulationSeam)  # in front of tables, which have a row per picture
        for layer, A, B in self.pairs.values():
            layer.coarse_A, layer.coarse_B = A, B
            self._swap(layer, LowRankSeam)
        for module, mixin, place in self.widths.seams(model) if self.widths else ():
            module.__dict__[PLACE] = place  # in front of low-rank updates, which narrow too
            self._swap(module, mixin)
        model.__class__ = elastic_class(self.stock, backbone.rewired, self.method)
        model.__dict__[ENGINE] = engine
        self.lists = {k: m for k, m in model.named_children() if isinstance(m, nn.ModuleList)}
        self.silent = [module for module in self._holders() if is_silent(module)]
        rebind_hooks(model, self.stock)

    def look_over(self, model: nn.Module) -> None:
        """Find out, and mend, what somebody may have done to the model since the last look."""
        self.keep_seams(model)
        self.keep_fused_seams()
        # Whoever offloads a model puts hooks on all of it, or a map on it: a short look is enough.
        self.away = hasattr(model, "hf_device_map") or is_offloaded(self.router.sizes.modules())

    def keep_seams(self, model: nn.Module) -> None:
        """Swap the modules that make and end tokens, wherever they are now.

        Somebody may have put another module in their place: PEFT wraps a layer when a LoRA for it
        is loaded, and puts the layer back when the LoRA goes.
        """
        backbone = self.router.backbone
        seams: dict[str, type] = {backbone.embed: EmbedSeam, backbone.output: OutputSeam}
        if backbone.rotary is not None:
            seams[backbone.rotary] = RotarySeam
        for name, mixin in seams.items():
            module = model.get_submodule(name)
            if ROUTER not in module.__dict__:
                self._swap(module, mixin)

    def keep_fused_seams(self) -> None:
        """Swap projections that ``fuse_qkv_projections`` has made of adapted layers."""
        for module in self.adapted:
            for name in FUSED.keys() & module._modules.keys():
                fused, parts = module._modules[name], FUSED[name]
                if fused is not None and ROUTER not in fused.__dict__:
                    layers = [module.get_submodule(part) for part in parts]
                    # A user's LoRA wraps its layer.
                    fused.__dict__[PARTS] = [getattr(x, "base_layer", x) for x in layers]
                    self._swap(fused, FusedSeam)

    def _swap(self, module: nn.Module, mixin: type) -> None:
        swap_class(module, mixin, self.router)
        self.swapped.append(module)

    def uninstall(self, model: nn.Module) -> None:
        """Undo `install` exactly.

        Raises:
            RuntimeError: the adapter's own version of base weights is offloaded.
        """
        if self.other_weights and is_offloaded(model.modules()):
            raise RuntimeError(
                "the base's own weights cannot be put back while they are offloaded; take the "
                "offloading off first (pipe.remove_all_hooks(), or "
                "accelerate.hooks.remove_hook_from_submodules(model))"
            )
        for module in reversed(self.swapped):
            restore_class(module)
        self.swapped.clear()
        self.merges.forget()
        for module, handle in self.hooks:
            handle.remove()
            for key in (ROUTER, ROLE, MERGE):  # it may have several, or have been swapped too
                module.__dict__.pop(key, None)
        self.hooks.clear()
        for layer, _, _ in self.pairs.values():
            del layer.coarse_A, layer.coarse_B
        del model._modules[SIZES]
        was, model.__class__ = type(model), self.stock
        del model.__dict__[ENGINE]
        self._exchange_weights()
        rebind_hooks(model, was)

    def _exchange_weights(self) -> None:
        for name, other in self.other_weights.items():
            owner, leaf = self.owners[name]
            held: Any = owner._parameters if leaf in owner._parameters else owner._buffers
            now, tensor = held[leaf], self.base[name]
            if is_ordinary(now):  # moving a buffer, or a hook that was removed, makes a new object
                tensor = self.base[name] = now
            tensor.data, self.other_weights[name] = other.to(tensor), tensor.data
            if tensor is not now:  # quantised since
                held[leaf], self.quantised[name] = tensor, now
            elif name in self.quantised:
                held[leaf] = self.quantised.pop(name)

    def with_own_blocks(self, model: nn.Module) -> nn.Module:
        """A view of the model to count in: cache-dit puts other blocks there while a call runs."""
        view = copy.copy(model)
        view.__dict__["_modules"] = {**model._modules, **self.lists}
        return view


def is_new(key: str) -> bool:
    """Whether a parameter name of an elastic model is one of the added tensors."""
    return key.startswith(f"{SIZES}.") or ".coarse_A." in key or ".coarse_B." in key


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _low_rank_pairs(model: nn.Module, backbone: Backbone, method: Method) -> dict[str, LowRankPair]:
    """New low-rank pairs by layer name; the second factor starts as zero."""
    pairs: dict[str, LowRankPair] = {}
    for single in method.singles:
        rank, layers = single.low_rank, backbone.adapting(single.adapts).low_rank_layers(model)
        for name, layer in layers if rank else ():
            _, A, B = pairs.setdefault(name, (layer, NewParameters(), NewParameters()))
            like: dict[str, Any] = {"device": layer.weight.device, "dtype": compute_dtype(layer)}
            for mode in single.modes:
                A[mode.name] = nn.Parameter(
                    torch.randn(rank, layer.in_features).to(**like) / layer.in_features**0.5
                )
                B[mode.name] = nn.Parameter(torch.zeros(layer.out_features, rank).to(**like))
    return pairs
