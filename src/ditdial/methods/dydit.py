"""DyDiT (2410.03456) and DyDiT++ (2504.06803): routed width and tokens.

In every block two routers read the timestep alone and open attention heads and groups of channels
of the feed-forward; a third reads each token and lets it into the feed-forward or not (section 3).
A width lambda is the share of the blocks' work that its routers were trained to leave in. One
adapter may have several widths, each with routers of its own on the same blocks, and coarse patches
beside them.

Recipes: *full* trains the base's weights with the routers; *td-lora* (DyDiT++) leaves them frozen
and adds low-rank experts, mixed by the timestep.

Shape legend: B pictures, N tokens, D width, L blocks, H heads, G groups of channels, S slots of
either, T noise levels, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.backbones.routed import RoutedBlock
from ditdial.cost.shape import TransformerShape
from ditdial.host.weights import compute_dtype
from ditdial.layers.new_modules import NewModules
from ditdial.layers.width_pass import Narrow, Open
from ditdial.methods.base import Method
from ditdial.methods.projections import MarkedProjections, legal_scale
from ditdial.methods.routers import LEVELS, Routers, slot_tables, slots_of, token_router_macs
from ditdial.ops.gates import gate, logistic_noise, open_mask, with_constant
from ditdial.ops.patching import RESIZES, Triple
from ditdial.ops.widths import check_range, features_of, shared_out
from ditdial.plan.mode import FULL, Mode


@dataclass(frozen=True, kw_only=True)
class DyDiT(Method):
    """Configuration.

    Args:
        widths: share of the blocks' work that each set of routers is trained for; the paper has
            models at 0.9 to 0.3.
        recipe: ``full`` or ``td-lora``.
        tokens: whether tokens may skip the feed-forward.
        scales: coarse sizes in base patches per axis that are routed as well; none in the paper.
        groups: of channels; as many as heads by default, as in the paper.
        rank, experts: of the low-rank experts (td-lora).
        head_bias, token_bias: with which logits start, far on the open side; 15 and 35 in the
            paper. Smaller ones close sooner in a short training.
        resize: how base weights start coarse sizes.

    Raises:
        ValueError: a value out of range.
    """

    widths: tuple[float, ...] = (0.5,)
    recipe: str = "full"
    tokens: bool = True
    scales: tuple[int | Triple, ...] = ()
    groups: int = 0
    rank: int = 8
    experts: int = 4
    head_bias: float = 15.0
    token_bias: float = 35.0
    resize: str = "pinv"

    name = "dydit"
    paper = "DyDiT, arXiv 2410.03456"
    recipes = ("full", "td-lora")
    packs = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        scales = tuple(tuple(k) if isinstance(k, list) else k for k in self.scales)
        object.__setattr__(self, "scales", scales)
        widths = [Mode(width=width) for width in self.widths]  # says what is legal
        if not widths or FULL in widths or len(set(widths)) < len(widths):
            raise ValueError(
                f"widths = {self.widths}; legal: at least one, all different, whole percents in "
                "(0, 1)"
            )
        if self.recipe not in self.recipes:
            raise ValueError(f"recipe = {self.recipe!r}; legal: {', '.join(self.recipes)}")
        if not all(legal_scale(k) for k in scales) or len({Mode(k) for k in scales}) < len(scales):
            raise ValueError(
                f"scales = {self.scales}; legal: all different, each a whole number >= 2 or three "
                "whole numbers (t, h, w) >= 1, not all 1"
            )
        for name, least in (("groups", 0), ("rank", 1), ("experts", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} = {value!r}; legal: a whole number >= {least}")
        for name in ("head_bias", "token_bias"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} = {value!r}; legal: above 0 (all open at the start)")
        if self.resize not in RESIZES:
            raise ValueError(f"resize = {self.resize!r}; legal: {', '.join(RESIZES)}")

    @property
    def patches(self) -> tuple[Mode, ...]:
        """Full mode and the coarse sizes, at full width."""
        return (FULL, *(Mode(k) for k in self.scales))

    @property
    def routed(self) -> tuple[Mode, ...]:
        """The modes that have routers."""
        return tuple(
            Mode(patch.patch_scale, width=width) for patch in self.patches for width in self.widths
        )

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (*self.patches[1:], *self.routed)

    def has(self, mode: Mode) -> bool:
        """Besides the trained modes, widths between them and fixed shares of the tokens."""
        known = mode.patch in self.patches and not mode.is_sparse
        return known and (self.tokens or mode.token_keep is None)

    def routing(self, mode: Mode) -> Mode:
        """The patch and width that routers go by in a mode.

        Where another method makes coarse patches, those of base tokens decide.
        """
        patch = mode.patch_scale if mode.patch in self.patches else 1
        return Mode(patch, width=mode.width)

    def trained(self, mode: Mode) -> Mode:
        """The mode whose routers a routed mode uses: those of the nearest width."""
        width = min(self.widths, key=lambda each: (abs(each - mode.width), each))
        return Mode(self.routing(mode).patch_scale, width=width)

    @property
    def low_rank(self) -> int:
        return 0

    @property
    def trains_base(self) -> bool:
        return self.recipe == "full"

    def priced(
        self, shape: TransformerShape, model: nn.Module, backbone: Backbone
    ) -> TransformerShape:
        blocks = [
            replace(block, router=token_router_macs(modules.width))
            if self.tokens and modules.residual is not None
            else block
            for block, modules in zip(shape.blocks, backbone.routed_blocks(model), strict=True)
        ]
        return replace(shape, blocks=tuple(blocks))

    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        return RoutedModules(self, model, backbone)

    def check_loaded(self, new: Any) -> None:
        for routers in new.routers.values():
            check_range("token_shares", routers.token_shares, 1)
        for name, slots in new.named_buffers(recurse=False):
            check_range(name, slots, (new.heads if name.startswith("heads") else new.groups) - 1)

    def to_config(self) -> dict[str, Any]:
        return asdict(self)


class RoutedModules(MarkedProjections):
    """Routers by mode, the order of the slots, experts, and projections of coarse sizes.

    Attributes:
        gated: everything is computed and multiplied by gates, instead of sliced.
        drawing: what draws the noise of gates, as in training; None for none.
        offsets: added to the logits of heads and channels in widths between those trained for.
    """

    def __init__(self, method: DyDiT, model: nn.Module, backbone: Backbone) -> None:
        super().__init__(method.patches[1:], method.resize, model, backbone)
        self.method, self.gated = method, False
        self.drawing: torch.Generator | None = None
        self.offsets: dict[Mode, float] = {}
        blocks = list(backbone.routed_blocks(model))
        self.heads, self.groups = slots_of(backbone, blocks, method.groups)
        time_width = backbone.times.width(model)
        kernel, _ = backbone.patches.kernel(model)
        self.routers = nn.ModuleDict()
        for mode in method.routed:
            width = blocks[0].narrow.out_features
            routers = Routers(
                len(blocks),
                self.heads,
                self.groups,
                time_width,
                width,
                head_bias=method.head_bias,
                token_bias=method.token_bias if method.tokens else None,
            )
            self.routers[mode.name] = routers.to(kernel.device)
        for index, block in enumerate(blocks):
            for role, slots in slot_tables(block, self.groups).items():
                self.register_buffer(f"{role}_{index}", slots)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        if method.recipe == "td-lora":
            self._add_experts(model, blocks, time_width)

    def _add_experts(self, model: nn.Module, blocks: list[RoutedBlock], time_width: int) -> None:
        method, names = self.method, {module: name for name, module in model.named_modules()}
        for layer in (layer for block in blocks for layer in block.layers):
            like: dict[str, Any] = {"device": layer.weight.device, "dtype": compute_dtype(layer)}
            A = torch.randn(method.rank, layer.in_features).to(**like) / layer.in_features**0.5
            B = torch.zeros(method.experts, layer.out_features, method.rank).to(**like)
            key = _key(names[layer])
            self.A[key], self.B[key] = nn.Parameter(A), nn.Parameter(B)
        device = blocks[0].narrow.weight.device
        self.mixer = nn.Linear(time_width, method.experts, device=device)

    @property
    def routing(self) -> RoutedModules:
        return self

    @property
    def tokens(self) -> bool:
        """Whether tokens may skip the feed-forward."""
        return self.method.tokens

    def routed_as(self, mode: Mode) -> Mode:
        """The patch and width that routers go by in a mode."""
        return self.method.routing(mode)

    def is_trained(self, mode: Mode) -> bool:
        """Whether a width has routers of its own."""
        return mode in self.method.routed

    def experts(self, layer: str) -> tuple[Tensor, Tensor]:
        """``A`` ``(r, in)``, which the experts share, and ``B`` ``(E, out, r)``, of a layer."""
        return self.A[_key(layer)], self.B[_key(layer)]

    def makes_tokens(self, mode: Mode) -> bool:
        return not mode.has_base_patch

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        return super().embed(vectors, mode.patch)

    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        return super().project(hidden, mode.patch, grid)

    def mix(self, time_BD: Tensor) -> Tensor | None:
        """How much of each expert, ``(B, E)``."""
        if self.method.recipe != "td-lora":
            return None
        weight, bias = self.mixer.weight.float(), self.mixer.bias.float()
        return F.linear(time_BD.float(), weight, bias).softmax(-1)

    @torch.no_grad()
    def decide(self, mode: Mode, time_TD: Tensor) -> dict[str, Tensor]:
        """Open slots of each block at T noise levels, ``(T, L, S)`` booleans by role."""
        opened = {}
        for role, logits in self.logits(mode, time_TD).items():
            first = torch.ones_like(logits[..., :1], dtype=torch.bool)
            opened[role] = torch.cat([first, logits > 0], dim=-1)
        return opened

    def logits(self, mode: Mode, time_BD: Tensor) -> dict[str, Tensor]:
        """Of the slots behind the first of each block, ``(B, L, S - 1)`` by role."""
        routers, offset = self._of(mode), self.offsets.get(self.method.routing(mode), 0.0)
        return {
            role: routers.slots(name, time_BD) + offset
            for role, name in (("heads", "head"), ("channels", "channel"))
        }

    def sliced(
        self, mode: Mode, opened: dict[str, Tensor], mix: Tensor | None, known: dict[Any, Tensor]
    ) -> Narrow:
        """A forward pass that leaves out what is closed.

        Args:
            opened: of each block, ``(L, S)`` by role, on the CPU.
            known: features by block, role and open slots; the same tensor stands for the same ones.
        """
        opens: dict[str, list[Open]] = {"heads": [], "channels": [], "both": []}
        for block in range(len(opened["heads"])):
            found = {
                role: self._open(block, role, bits[block], known) for role, bits in opened.items()
            }
            for role, part in found.items():
                opens[role].append(part)
            opens["both"].append(self._both(block, found, known))
        return self._narrow(mode, opens, mix)

    def _open(self, block: int, role: str, bits: Tensor, known: dict[Any, Tensor]) -> Open:
        share = bits.float().mean().item()
        if bits.all():
            return Open(1.0)
        key = (block, role, tuple(bits.tolist()))
        if key not in known:
            table = getattr(self, f"{role}_{block}")
            known[key] = features_of(bits.to(table.device), table)
        return Open(share, known[key], heads=int(bits.sum()) if role == "heads" else None)

    def _both(self, block: int, found: dict[str, Open], known: dict[Any, Tensor]) -> Open:
        """Features of a layer that takes those of the heads and then those of the channels."""
        pieces, key = [], ("both", block, *(id(part.features) for part in found.values()))
        start = 0
        for role, part in found.items():
            table = getattr(self, f"{role}_{block}")
            every = torch.arange(len(table), device=table.device)
            pieces.append(start + (every if part.features is None else part.features))
            start += len(table)
        if all(part.features is None for part in found.values()):
            return Open(1.0)
        return Open(1.0, known.setdefault(key, torch.cat(pieces)))

    def gating(self, mode: Mode, time_BD: Tensor) -> Narrow:
        """A forward pass that computes everything and multiplies by gates, with gradients."""
        drawing = self.drawing
        opens: dict[str, list[Open]] = {"heads": [], "channels": [], "both": []}
        logits = {role: x.unbind(1) for role, x in self.logits(mode, time_BD).items()}
        for block in range(len(logits["heads"])):
            gates = []
            for role in ("heads", "channels"):
                each = logits[role][block]
                slots = with_constant(gate(each, logistic_noise(each, drawing)))
                table = getattr(self, f"{role}_{block}")
                gates.append(slots[:, table])
                opens[role].append(Open(slots.mean(1), gates=gates[-1]))
            opens["both"].append(Open(1.0, gates=torch.cat(gates, dim=1)))
        narrow = self._narrow(mode, opens, self.mix(time_BD))

        def token_gates(block: int, logits: Tensor) -> Tensor:
            if narrow.capacities is not None:
                return open_mask(logits, narrow.capacities[block])
            return gate(logits, logistic_noise(logits, drawing))

        narrow.token_gates = token_gates
        return narrow

    def _narrow(self, mode: Mode, opens: dict[str, list[Open]], mix: Tensor | None) -> Narrow:
        tokens: Callable[[int, Tensor], Tensor] | None = None
        if self.method.tokens:
            tokens = self._of(mode).tokens
        return Narrow(
            mode,
            {role: tuple(parts) for role, parts in opens.items()},
            token_logits=tokens,
            mix=mix,
            capacities=None if mode.token_keep is None else tuple(self.token_shares(mode, None)),
        )

    def token_shares(self, mode: Mode, level: float | None) -> list[float]:
        """Share of the tokens that each block is known to keep at a noise level.

        A fixed share is spread over the blocks as training left it, the same at all levels.
        """
        table = self._of(mode).token_shares.float()
        if mode.token_keep is not None:
            return shared_out(table.mean(1).tolist(), mode.token_keep)
        if level is None:
            return table.mean(1).tolist()
        return table[:, min(int(level * LEVELS), LEVELS - 1)].tolist()

    def _of(self, mode: Mode) -> Any:
        return self.routers[self.method.trained(mode).name]

    @torch.no_grad()
    def force(self, mode: Mode, heads: float, channels: float) -> None:
        """Have a mode's routers open the same shares of the slots at all timesteps.

        For measuring what a share costs without training.

        Raises:
            ValueError: a share that is not in (0, 1].
        """
        for name, share, slots in (
            ("head", heads, self.heads),
            ("channel", channels, self.groups),
        ):
            if not 0 < share <= 1:
                raise ValueError(f"{name}s = {share}; legal: (0, 1]")
            kept = max(1, round(share * slots)) - 1
            getattr(self._of(mode), f"{name}_weight").zero_()
            bias = getattr(self._of(mode), f"{name}_bias")
            bias.fill_(-1.0)[:, :kept] = 1.0


def _key(layer: str) -> str:
    """A layer's name as a key of a module dictionary."""
    return layer.replace(".", "__")
