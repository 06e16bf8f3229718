"""FlexiDiT (2502.20126): one DiT, several patch sizes, chosen per denoising step.

Two recipes. *lora* (section 4.2, no access to the training data): the base is frozen; each new size
has its own embedding, de-embedding, size marker and low-rank updates of self-attention and
feed-forward, distilled from the base itself. *shared* (section 4.1): one underlying patch weight is
projected to every size and all weights are trained.

Shape legend: D model width, C channels, p base patch, q = k p coarse patch, u underlying patch
(all three along time, height, width), c = the length of one base patch vector.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.host.weights import versions
from ditdial.layers.new_modules import NewModules
from ditdial.methods.base import Method
from ditdial.methods.projections import MarkedProjections, legal_scale, times
from ditdial.ops.patching import (
    RESIZES,
    Triple,
    group,
    resize_embedding,
    resize_output,
    to_grouped,
    ungroup,
)
from ditdial.plain.kinds import checked_fields
from ditdial.plan.mode import Mode


@dataclass(frozen=True, kw_only=True)
class FlexiDiT(Method):
    """Configuration.

    Args:
        recipe: ``lora`` or ``shared``.
        scales: coarse sizes in base patches per axis, a number for height and width alike or ``(t,
            h, w)``; 2 and 4 are the paper's range, ``(2, 1, 1)`` its temporal patch for video.
        rank: of the low-rank updates (lora); 32 and 64 in the paper, less for narrow models.
        resize: how base weights start the new sizes; ``pinv`` or ``box`` (see
            `ditdial.ops.patching`).
        underlying: underlying patch in base patches along height and width (shared); 2 in the
            paper.

    Raises:
        ValueError: a value out of range.
    """

    recipe: str = "lora"
    scales: tuple[int | Triple, ...] = (2, 4)
    rank: int = 32
    resize: str = "pinv"
    underlying: int = 2

    name = "flexidit"
    paper = "FlexiDiT, arXiv 2502.20126"
    recipes = ("lora", "shared")

    @checked_fields
    def __post_init__(self) -> None:
        if self.recipe not in self.recipes:
            raise ValueError(f"recipe = {self.recipe!r}; legal: 'lora', 'shared'")
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
        if type(self.underlying) is not int or self.underlying < 1:
            raise ValueError(f"underlying = {self.underlying!r}; legal: a whole number >= 1")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode(k) for k in self.scales)

    @property
    def low_rank(self) -> int:
        return self.rank if self.recipe == "lora" else 0

    @property
    def trains_base(self) -> bool:
        return self.recipe == "shared"

    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        for mode in self.modes if self.recipe == "shared" else ():
            for k in mode.patch_scale[1:]:
                if max(k, self.underlying) % min(k, self.underlying):
                    raise ValueError(
                        f"scales = {self.scales} with underlying = {self.underlying}; legal: of "
                        "each scale and the underlying size one divides the other"
                    )
        if self.recipe == "lora":
            return MarkedProjections(self.modes, self.resize, model, backbone)
        return SharedPatches(self, model, backbone)

    def to_config(self) -> dict[str, Any]:
        return asdict(self)


class SharedPatches(NewModules):
    """One underlying patch weight; ``w(p) = Q(p) w_flex``, ``v(p) = v_flex R(p)`` (section 3.1).

    ``Q`` going down to the base sums taps and ``R`` averages samples, so the start ``pinv(Q) w``
    gives back exactly ``w``. The size-dependent normalisation, whose place the paper leaves open,
    is a gain and shift on the new sizes' tokens that starts as the identity.

    Attributes:
        live: make full-mode tokens from the underlying weight too (while training). Otherwise full
            mode is the stock path with the base weights that `write_base` has materialised.
    """

    flex_bias: Tensor
    flex_out_bias: Tensor

    def __init__(self, method: FlexiDiT, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        kernel, bias = (x.detach() for x in backbone.patches.kernel(model))
        rows, row_bias = (x.detach() for x in backbone.patches.rows(model))
        width, patch = len(kernel), kernel.shape[2:]
        u = times((1, method.underlying, method.underlying), patch)
        self.patch, self.kind = (patch[0], patch[1], patch[2]), method.resize
        self.layouts = backbone.patches.embed_layout, backbone.patches.output_layout
        self.live = False
        self._kept: dict[str, tuple[object, tuple[Tensor, Tensor, Tensor]]] = {}
        self.flex_embed = nn.Parameter(resize_embedding(kernel, u, "box"))
        self.flex_out = nn.Parameter(resize_output(rows, u, "box"))
        biases = {"flex_bias": bias.clone(), "flex_out_bias": resize_output(row_bias, u, "box")}
        for (name, value), layer in zip(
            biases.items(), backbone.patches.layers(model), strict=True
        ):
            if layer.bias is None:  # a bias could not be written back into the base: it stays zero
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.size_embeds, self.size_gains, self.size_shifts = (nn.ParameterDict() for _ in range(3))
        for mode in method.modes:
            self.size_embeds[mode.name] = nn.Parameter(torch.zeros(width).to(kernel))
            self.size_gains[mode.name] = nn.Parameter(torch.ones(width).to(kernel))
            self.size_shifts[mode.name] = nn.Parameter(torch.zeros(width).to(kernel))

    def makes_tokens(self, mode: Mode) -> bool:
        return self.live or not mode.is_full

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        grouped = group(vectors, mode.patch_scale)
        tokens = F.linear(grouped, self._projected(mode)[0], self.flex_bias)
        if mode.is_full:
            return tokens
        gain, shift = self.size_gains[mode.name], self.size_shifts[mode.name]
        return tokens * gain + shift + self.size_embeds[mode.name]

    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        _, weight, bias = self._projected(mode)
        return ungroup(F.linear(hidden, weight, bias), grid, mode.patch_scale)

    def write_base(self, model: nn.Module, backbone: Backbone) -> None:
        """Materialise ``w(p_base)`` and ``v(p_base)`` into the stock modules."""
        p = self.patch
        embed = resize_embedding(self.flex_embed.detach(), p, self.kind), self.flex_bias.detach()
        output = (
            resize_output(self.flex_out.detach(), p, self.kind),
            resize_output(self.flex_out_bias.detach(), p, self.kind),
        )
        backbone.patches.load(model, embed, output)

    def ready(self, mode: Mode) -> None:
        if torch.is_grad_enabled():
            self._kept.clear()
            return
        version = versions(self.flex_embed, self.flex_out, self.flex_out_bias)
        if self._kept.get(mode.name, (None,))[0] != version:
            self._kept[mode.name] = version, self._project_weights(mode)

    def _projected(self, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding, output weight and output bias of a mode."""
        if torch.is_grad_enabled() or mode.name not in self._kept:
            return self._project_weights(mode)
        return self._kept[mode.name][1]

    def _project_weights(self, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
        scale, (into, out) = mode.patch_scale, self.layouts
        q = times(scale, self.patch)
        bias = to_grouped(resize_output(self.flex_out_bias, q, self.kind), scale, out)
        return (
            to_grouped(resize_embedding(self.flex_embed, q, self.kind), scale, into),
            to_grouped(resize_output(self.flex_out, q, self.kind), scale, out).T,
            bias[0],
        )
