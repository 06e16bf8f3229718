"""DDiT (2602.16968): patch sizes for a frozen DiT, chosen while sampling from the latents.

This file is the model side: an embedding, a de-embedding and a marker for each new size, low-rank
updates of the feed-forward layers, and a gated path from the latent before the embedding to the
prediction after the de-embedding. All is distilled from the base itself. The choice of the size is
`ditdial.plan.ddit.DDiTController`.

Shape legend: D model width, N base tokens, c_in and c_out = lengths of one base patch vector.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.layers.new_modules import NewModules
from ditdial.methods.base import Method
from ditdial.methods.projections import MarkedProjections, legal_scale
from ditdial.ops.patching import RESIZES, Triple, to_grouped
from ditdial.plain.kinds import checked_fields
from ditdial.plan.mode import Mode

ATTENTION_LAYERS = r"\.to_(q|k|v|out)(\.0)?$"
"""Names of the layers that DDiT leaves as they are."""


@dataclass(frozen=True, kw_only=True)
class DDiT(Method):
    """Configuration.

    Args:
        scales: coarse sizes in base patches per axis, a number for height and width alike or ``(t,
            h, w)``; 2 and 4 in the paper.
        rank: of the low-rank updates; 32 in the paper.
        resize: how base weights start the new sizes; ``pinv`` in the paper.

    Raises:
        ValueError: a value out of range.
    """

    scales: tuple[int | Triple, ...] = (2, 4)
    rank: int = 32
    resize: str = "pinv"

    name = "ddit"
    paper = "DDiT, arXiv 2602.16968"
    recipes = ("distil",)
    adapts = rf"^(?!.*{ATTENTION_LAYERS})"
    skips = True

    @checked_fields
    def __post_init__(self) -> None:
        scales = tuple(tuple(k) if isinstance(k, list) else k for k in self.scales)
        object.__setattr__(self, "scales", scales)
        legal = scales and all(legal_scale(k) for k in scales)
        if not legal or len(set(self.modes)) < len(scales):
            raise ValueError(
                f"scales = {self.scales}; legal: at least one, all different, each a whole number "
                ">= 2 or three whole numbers (t, h, w) >= 1, not all 1"
            )
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank = {self.rank!r}; legal: a whole number >= 1")
        if self.resize not in RESIZES:
            raise ValueError(f"resize = {self.resize!r}; legal: {', '.join(RESIZES)}")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode(k) for k in self.scales)

    @property
    def low_rank(self) -> int:
        return self.rank

    @property
    def trains_base(self) -> bool:
        return False

    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        return SkippingProjections(self, model, backbone)

    def to_config(self) -> dict[str, Any]:
        return asdict(self)


class SkippingProjections(MarkedProjections):
    """Own projections, and a gated linear path from the latent to the prediction.

    The paper leaves the path's form open. Here it acts on base patch vectors, ``out + g W x``, so
    that detail which a coarse token cannot hold may pass beside it; ``W`` starts by copying the
    latent's channels to the prediction's, the gate ``g`` as zero.
    """

    def __init__(self, method: DDiT, model: nn.Module, backbone: Backbone) -> None:
        super().__init__(method.modes, method.resize, model, backbone)
        kernel, rows = backbone.patches.kernel(model)[0], backbone.patches.rows(model)[0]
        copying = _channel_copy(kernel, rows, backbone)
        self.skips, self.gates = nn.ParameterDict(), nn.ParameterDict()
        for mode in method.modes:
            self.skips[mode.name] = nn.Parameter(copying.clone())
            self.gates[mode.name] = nn.Parameter(torch.zeros_like(copying[0, 0]))
        self._latents: dict[str, Tensor] = {}

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        self._latents[mode.name] = vectors.flatten(1, 3)
        return super().embed(vectors, mode)

    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        latent = self._latents.pop(mode.name)
        skipped = F.linear(latent.to(hidden.dtype), self.skips[mode.name])
        return super().project(hidden, mode, grid) + self.gates[mode.name] * skipped


def _channel_copy(kernel: Tensor, rows: Tensor, backbone: Backbone) -> Tensor:
    """``(c_out, c_in)``: each channel of a base patch vector to the same one of the output's.

    The two vectors may be laid out differently, and may have channels that the other has not.
    """
    C_in, C_out, patch = kernel.shape[1], rows.shape[1], kernel.shape[2:]
    places = torch.arange(C_in * patch.numel(), dtype=torch.float64)
    wide = torch.full((1, C_out, *patch), -1.0, dtype=torch.float64)
    shared = min(C_in, C_out)
    wide[0, :shared] = places.view(C_in, *patch)[:shared]
    one = (1, 1, 1)
    source = to_grouped(places.view(1, C_in, *patch), one, backbone.patches.embed_layout)[0]
    target = to_grouped(wide, one, backbone.patches.output_layout)[0]
    return (target[:, None] == source[None, :]).to(kernel)
