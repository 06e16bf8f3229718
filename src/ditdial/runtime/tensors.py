"""The tensors of an adapter on a live model: new ones beside the base's, retrained ones in place.

Retrained base weights are exchanged with the base's own when the model is made elastic, and
exchanged back when it is restored; the stock tensors stay the same objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.adapter import Adapter, check_tensors
from ditdial.backbones import Backbone
from ditdial.host.loras import Fused, fuse_as, fused, innermost, stock_keys, unfused
from ditdial.host.weights import (
    NewParameters,
    compute_dtype,
    is_offloaded,
    is_ordinary,
    onloaded,
    outline,
)
from ditdial.layers.new_modules import NewModules
from ditdial.methods import Method
from ditdial.plan.schedule import Schedule

NEW = "elastic"
"""Submodule with the new modules of an elastic model; part of the names in adapter files."""

LowRankPair = tuple[nn.Linear, nn.ParameterDict, nn.ParameterDict]
"""An adapted layer, and its factors A and B by mode."""


@dataclass(eq=False)
class Tensors:
    """Of one elastic model.

    Attributes:
        new: the modules that the method has added.
        pairs: adapted linear layers with their low-rank factors by mode, under the stock names.
        identity: the facts of the base that the tensors fit; a Control LoRA may change them.
        base: the base's own tensors under the stock names, if the method trains them.
        owners: of those tensors: module and attribute.
        others: while installed the base's own weights, else the adapter's; see `exchange`.
        fused: the LoRAs that are fused into ``others``.
        present: those that are fused into the weights in place, as far as somebody has looked.
        quantised: what somebody has put in the place of tensors of ``base`` meanwhile.
    """

    method: Method
    new: NewModules
    pairs: dict[str, LowRankPair]
    identity: dict[str, Any]
    base: dict[str, Tensor]
    owners: dict[str, tuple[nn.Module, str]]
    others: dict[str, Tensor] = field(default_factory=dict)
    fused: Fused = field(default_factory=dict)
    present: Fused = field(default_factory=dict)
    quantised: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapters: Sequence[Adapter]
    ) -> Tensors:
        """New parameters for a stock model, from adapters as far as there are any.

        The model is only read.

        Raises:
            ValueError: an adapter's tensors do not fit, or weights are held in a way that new
                tensors cannot be made from.
        """
        if adapters:  # before memory is taken for what a config asks for
            with torch.device("meta"):
                expected = cls._started(outline(model), backbone, method)
            for adapter in adapters:
                check_tensors(expected.stored(adapter.method), adapter.tensors)
        tensors = cls._started(model, backbone, method)
        for adapter in adapters:
            tensors._load(adapter)
            for single in adapter.method.singles:
                single.check_loaded(tensors.new.of(single.name))
        return tensors

    @classmethod
    def _started(cls, model: nn.Module, backbone: Backbone, method: Method) -> Tensors:
        """New parameters for a stock model, as its method starts them."""
        keys = stock_keys(model) if method.trains_base else {}
        state = model.state_dict(keep_vars=True) if keys else {}
        base = {name: state[key] for name, key in keys.items()}
        kinds = {type(x).__name__ for x in base.values() if not is_ordinary(x) and not x.is_meta}
        if kinds:
            raise ValueError(
                f"this method trains the base's own weights, some of which are {sorted(kinds)}; "
                "legal: elastify first and quantise then"
            )
        return cls(
            method=method,
            new=method.build(model, backbone),
            pairs=_low_rank_pairs(model, backbone, method),
            identity=backbone.identity(model),
            base=base,
            owners={name: _owner(model, key) for name, key in keys.items()},
        )

    def _load(self, adapter: Adapter) -> None:
        """Take the weights of an adapter of the method, or of a part of it; they fit."""
        base = self.base if adapter.method.trains_base else {}
        with torch.no_grad():
            for name, value in self.of(adapter.method).items():
                value.copy_(adapter.tensors[name])
        self.others |= {  # copies: a loaded tensor may be a view of its file
            k: torch.empty_like(v).copy_(adapter.tensors[f"base.{k}"]) for k, v in base.items()
        }

    def of(self, method: Method) -> dict[str, Tensor]:
        """The added parameters of the method, or of a part of it, as in an adapter of it alone."""
        whole = method == self.method
        new = self.new if whole else self.new.of(method.name)
        tensors = {f"{NEW}.{k}": v for k, v in new.state_dict().items()}
        own = None if whole else {mode.name for mode in method.modes}
        for name, (_, A, B) in self.pairs.items():
            for mode in A:
                if own is None or mode in own:
                    tensors[f"{name}.coarse_A.{mode}"] = A[mode]
                    tensors[f"{name}.coarse_B.{mode}"] = B[mode]
        return tensors

    def stored(self, method: Method) -> dict[str, Tensor]:
        """All tensors that an adapter of the method, or of a part of it, holds."""
        base = self.base if method.trains_base else {}
        return self.of(method) | {f"base.{name}": value for name, value in base.items()}

    def holders(self) -> list[nn.Module]:
        """The modules that hold new tensors."""
        factors = [x for _, A, B in self.pairs.values() for x in (A, B)]
        return [*self.new.modules(), *factors]

    def adapter(self, model: nn.Module, schedule: Schedule, notes: dict[str, Any]) -> Adapter:
        """The present weights as an adapter."""
        layers = [layer for layer, _, _ in self.pairs.values()]
        holders = model.modules() if self.base else [*self.holders(), *layers]
        holders = [module for module in holders if is_offloaded([module])]
        weights = unfused(model, self.present) if self.base else nullcontext(False)
        with onloaded(holders), weights as changed:
            tensors = self.stored(self.method)
            if holders or changed:  # these leave again
                tensors = {k: v.detach().clone() for k, v in tensors.items()}
        return Adapter(
            method=self.method,
            base=self.identity,
            tensors=tensors,
            schedule=schedule,
            notes=notes,
        )

    def check_exchange(self, model: nn.Module) -> None:
        """Refuse to exchange weights that are not here.

        Raises:
            RuntimeError: the adapter's own version of base weights is offloaded.
        """
        if self.others and is_offloaded(model.modules()):
            raise RuntimeError(
                "the base's own weights cannot be put back while they are offloaded; take the "
                "offloading off first (pipe.remove_all_hooks(), or "
                "accelerate.hooks.remove_hook_from_submodules(model))"
            )

    def exchange(self, model: nn.Module) -> None:
        """Put the other version of the base's weights in place; its own inverse.

        What LoRAs have fused into the one is fused into the other too.
        """
        if not self.others:
            return
        self._swap(self.others)
        loras = fused(model, self.present)
        fuse_as(loras, self.fused)
        self.fused = self.present = loras

    def keep_up(self, model: nn.Module) -> None:
        """Fuse LoRAs into the other version too, or take them out, as soon as it is done to this.

        Later their scales may have been set, or they may be gone, while both versions have to hold
        as much of them.
        """
        loras = fused(model, self.present)
        self.present = loras
        if not self.others or is_offloaded(model.modules()):  # `exchange` does what it can
            return
        names: dict[nn.Module, list[str]] = {}
        for name, (owner, _) in self.owners.items():
            names.setdefault(owner, []).append(name)
        for wrapper, scales in loras.items():
            own = names.get(innermost(wrapper), [])
            if not own or scales.keys() == self.fused.get(wrapper, {}).keys():
                continue
            devices = [self.others[name].device for name in own]
            self._swap(own)
            fuse_as({wrapper: scales}, self.fused)
            self._swap(own)
            self.others |= {
                name: self.others[name].to(device)
                for name, device in zip(own, devices, strict=True)
            }
        self.fused = loras

    def _swap(self, names: Iterable[str]) -> None:
        """Put the other version of some of the base's tensors in place."""
        for name in names:
            other, (owner, leaf) = self.others[name], self.owners[name]
            held: Any = owner._parameters if leaf in owner._parameters else owner._buffers
            now, tensor = held[leaf], self.base[name]
            if is_ordinary(now):  # moving a buffer, or a hook that was removed, makes a new object
                tensor = self.base[name] = now
            # By data, not by object: optimizers, hooks and tied weights hold on to the parameter.
            tensor.data, self.others[name] = other.to(tensor), tensor.data
            if tensor is not now:  # quantised since
                held[leaf], self.quantised[name] = tensor, now
            elif name in self.quantised:
                held[leaf] = self.quantised.pop(name)


def is_new(key: str) -> bool:
    """Whether a parameter name of an elastic model is one of the added tensors.

    Names of the base's parameters never are: they stay as they were.
    """
    return key.startswith(f"{NEW}.") or ".coarse_A." in key or ".coarse_B." in key


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
