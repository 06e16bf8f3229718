"""Several methods on one model: patch size, token grids, routed width and size of the latent.

Each changes another thing, so that a mode such as ``patch2_grid3_width50`` is made of theirs: the
patch-size method makes and ends its tokens, SparseDiT thins them between the blocks, DyDiT narrows
the blocks. A method sees only its own part of a mode. The new tensors of each stay as they are
alone, and so do those modes that only one of them has.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.cost.shape import TransformerShape, Updates
from ditdial.layers.new_modules import Hook, NewModules
from ditdial.layers.state import State
from ditdial.layers.token_grids import TokenGrids
from ditdial.layers.width_pass import Routing
from ditdial.methods.base import Method
from ditdial.methods.ddit import DDiT
from ditdial.methods.dydit import DyDiT
from ditdial.methods.flexidit import FlexiDiT
from ditdial.methods.low_band import LowBand
from ditdial.methods.ppflow import PPFlow
from ditdial.methods.sparsedit import SparseDiT
from ditdial.ops.patching import Triple
from ditdial.plain.checks import require
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule

KINDS: dict[str, tuple[type[Method], ...]] = {
    "patch size": (FlexiDiT, DDiT, PPFlow),
    "token grid": (SparseDiT,),
    "width": (DyDiT,),
    "latent size": (LowBand,),
}
"""What methods change; a combination has at most one of each kind."""

SINGLES = {method.name: method for methods in KINDS.values() for method in methods}


@dataclass(frozen=True, kw_only=True)
class Combined(Method):
    """Configuration.

    Args:
        parts: two methods or more (or their ``name`` and ``settings``, as configs hold them), at
            most one that changes the patch size, one token grids, one the width, one the latent's
            size. They are kept in this order.

    Raises:
        ValueError: another number of parts, two of a kind, or a DyDiT that has coarse patches of
            its own beside another method's.
    """

    parts: tuple[Method, ...]

    name = "combined"
    paper = "those of its parts"
    recipes = ()

    def __post_init__(self) -> None:
        legal = "a tuple of methods"
        require(isinstance(self.parts, tuple | list), "parts", self.parts, legal)
        found = [_method(part) for part in self.parts]
        parts = [p for kind in KINDS.values() for p in found if isinstance(p, kind)]
        object.__setattr__(self, "parts", tuple(parts))
        names = [part.name for part in found]
        for kind, methods in KINDS.items():
            same = [part.name for part in parts if isinstance(part, methods)]
            if len(same) > 1:
                legal = ", ".join(method.name for method in methods)
                raise ValueError(f"parts = {names}; legal: one that changes the {kind} ({legal})")
        if len(parts) < 2:
            raise ValueError(f"parts = {names}; legal: at least two methods")
        first, last = parts[0], parts[-1]
        if isinstance(first, KINDS["patch size"]) and isinstance(last, DyDiT) and last.scales:
            raise ValueError(
                f"scales = {last.scales} of part 'dydit' beside part {first.name!r}; legal: (), "
                "since only one part makes coarse patches"
            )
        # What is an attribute of other methods.
        for name, value in (
            ("conditions", any(part.conditions for part in parts)),
            ("skips", any(part.skips for part in parts)),
            ("packs", all(part.packs for part in parts)),
        ):
            object.__setattr__(self, name, value)

    @property
    def singles(self) -> tuple[Method, ...]:
        return self.parts

    @property
    def patching(self) -> Method | None:
        """The part that makes coarse patches."""
        return next((p for p in self.parts if any(not m.has_base_patch for m in p.modes)), None)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Of each part alone, and all that are made of them."""
        modes = [mode for part in self.parts for mode in part.modes]
        bands, patches, grids, widths = (
            (FULL, *dict.fromkeys(each for each in own if not each.is_full))
            for own in zip(*((m.band, m.patch, m.grid, m.routing) for m in modes), strict=True)
        )
        made = (
            Mode(
                patch.patch_scale,
                token_grid=grid.token_grid,
                width=width.width,
                token_keep=width.token_keep,
                low_band=band.low_band,
            )
            for band, patch, grid, width in itertools.product(bands, patches, grids, widths)
        )
        return tuple(mode for mode in made if self.has(mode) and not mode.is_full)

    def has(self, mode: Mode) -> bool:
        """Whether each part of a mode is one of the method that changes it.

        Low bands stay by themselves: what other methods have trained, they have on latents of the
        base's size.
        """
        if mode.is_low_band and mode != mode.band:
            return False
        own = (mode.band, mode.patch, mode.grid, mode.routing)
        return all(x.is_full or any(part.has(x) for part in self.parts) for x in own)

    @property
    def low_rank(self) -> int:
        return max(part.low_rank for part in self.parts)

    @property
    def trains_base(self) -> bool:
        return any(part.trains_base for part in self.parts)

    @property
    def default_schedule(self) -> Schedule:
        """That of the part that trains the base's weights, if there is just one; else full mode."""
        trained = [part for part in self.parts if part.trains_base]
        return trained[0].default_schedule if len(trained) == 1 else super().default_schedule

    def priced(
        self, shape: TransformerShape, model: nn.Module, backbone: Backbone
    ) -> TransformerShape:
        for part in self.parts:
            shape = part.priced(shape, model, backbone)
        return shape

    def updates(self, model: nn.Module, backbone: Backbone) -> tuple[Updates, ...]:
        return tuple(x for part in self.parts for x in part.updates(model, backbone))

    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        return CombinedModules(self, model, backbone)

    def to_config(self) -> dict[str, Any]:
        return {"parts": [{"name": part.name, "settings": part.to_config()} for part in self.parts]}


class CombinedModules(NewModules):
    """The parameters of each part, under its name; each is asked about its own part of a mode."""

    def __init__(self, method: Combined, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        self.names = tuple(part.name for part in method.parts)
        for part in method.parts:
            self.add_module(part.name, part.build(model, backbone))
        self.patching = None if method.patching is None else method.patching.name

    def of(self, method: str) -> NewModules:
        return self._part(method)

    def _part(self, name: str) -> NewModules:
        part = self._modules[name]
        assert isinstance(part, NewModules)
        return part

    @property
    def _patches(self) -> NewModules:
        assert self.patching is not None, "no part has coarse patches"
        return self._part(self.patching)

    @property
    def routing(self) -> Routing | None:
        found = (self._part(name).routing for name in self.names)
        return next((each for each in found if each is not None), None)

    @property
    def corners(self) -> bool:
        return self.patching is not None and self._patches.corners

    def makes_tokens(self, mode: Mode) -> bool:
        return self.patching is not None and self._patches.makes_tokens(mode.patch)

    def ready(self, mode: Mode) -> None:
        self._patches.ready(mode.patch)

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        return self._patches.embed(vectors, mode.patch)

    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        return self._patches.project(hidden, mode.patch, grid)

    def condition(self, vector: Tensor, mode: Mode) -> Tensor:
        return vector if self.patching is None else self._patches.condition(vector, mode.patch)

    def hooks(self, model: nn.Module) -> list[Hook]:
        return [hook for name in self.names for hook in self._part(name).hooks(model)]

    def grids(
        self, model: nn.Module, backbone: Backbone, state: State, mode: Mode
    ) -> TokenGrids | None:
        found = (self._part(name).grids(model, backbone, state, mode) for name in self.names)
        return next((grids for grids in found if grids is not None), None)


def _method(part: Method | Mapping[str, Any]) -> Method:
    """A part, from plain data if need be.

    Raises:
        ValueError: no method that can be combined.
    """
    if isinstance(part, Mapping):
        name, settings = part.get("name"), part.get("settings")
        if name not in SINGLES or not isinstance(settings, Mapping) or len(part) != 2:
            raise ValueError(
                f"part {dict(part)}; legal: a 'name' ({', '.join(SINGLES)}) and 'settings'"
            )
        return SINGLES[name](**settings)
    if type(part) not in SINGLES.values():
        raise ValueError(f"part {part!r}; legal: a method, one of {', '.join(SINGLES)}")
    return part
