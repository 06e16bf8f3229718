"""FlexiDiT (2502.20126): one DiT, several patch sizes, chosen per denoising step.

Two recipes. *lora* (section 4.2, no access to the training data): the base is frozen; each new size
has its own embedding, de-embedding, size marker and low-rank updates of self-attention and
feed-forward, distilled from the base itself. *shared* (section 4.1): one underlying patch weight is
projected to every size and all weights are trained.

Shape legend: D model width, C channels, p base patch, q = k p coarse patch, u underlying patch, c =
C p p.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_dit.backbones.base import Backbone
from elastic_dit.methods.base import Method, Sizes
from elastic_dit.mode import Mode
from elastic_dit.ops.patching import (
    RESIZES,
    group,
    kernel_to_group,
    output_to_group,
    resize_embedding,
    resize_output,
    ungroup,
)
from elastic_dit.routing import versions


@dataclass(frozen=True, kw_only=True)
class FlexiDiT(Method):
    """Configuration.

    Args:
        recipe: ``lora`` or ``shared``.
        scales: coarse sizes in base patches per axis; 2 and 4 are the paper's range.
        rank: of the low-rank updates (lora); 32 and 64 in the paper, less for narrow models.
        resize: how base weights start the new sizes; ``pinv`` or ``box`` (see
            `elastic_dit.ops.patching`).
        underlying: underlying patch in base patches per axis (shared); 2 in the paper.

    Raises:
        ValueError: a value out of range.
    """

    recipe: str = "lora"
    scales: tuple[int, ...] = (2, 4)
    rank: int = 32
    resize: str = "pinv"
    underlying: int = 2

    name = "flexidit"
    paper = "FlexiDiT, arXiv 2502.20126"
    recipes = ("lora", "shared")

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.recipe not in self.recipes:
            raise ValueError(f"recipe = {self.recipe!r}; legal: 'lora', 'shared'")
        whole = all(type(k) is int and k >= 2 for k in self.scales)
        if not self.scales or not whole or len(set(self.scales)) != len(self.scales):
            raise ValueError(
                f"scales = {self.scales}; legal: different whole numbers >= 2, at least one"
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

    def build(self, model: nn.Module, backbone: Backbone) -> Sizes:
        kernel, _ = backbone.embed_kernel(model)
        p = kernel.shape[-1]
        for k in self.scales if self.recipe == "shared" else ():
            if max(k, self.underlying) % min(k, self.underlying):
                raise ValueError(
                    f"scales = {self.scales} with underlying = {self.underlying} (base patch {p}); "
                    "legal: of each scale and the underlying size one divides the other"
                )
        sizes = LoraSizes if self.recipe == "lora" else SharedSizes
        return sizes(self, model, backbone)

    def to_config(self) -> dict[str, Any]:
        return asdict(self)


class LoraSizes(Sizes):
    """An embedding, a de-embedding and a marker for each new size."""

    def __init__(self, method: FlexiDiT, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        kernel, bias = (x.detach() for x in backbone.embed_kernel(model))
        rows, row_bias = (x.detach() for x in backbone.output_rows(model))
        width, p = kernel.shape[0], kernel.shape[-1]
        self.patch_embeds, self.proj_outs = nn.ModuleDict(), nn.ModuleDict()
        self.size_embeds = nn.ParameterDict()
        for mode in method.modes:
            k = mode.patch_scale[-1]
            embed_weight = kernel_to_group(resize_embedding(kernel, k * p, method.resize), k)
            self.patch_embeds[mode.name] = _linear(embed_weight, bias)
            out_weight = output_to_group(resize_output(rows, k * p, method.resize), k)
            out_bias = output_to_group(resize_output(row_bias, k * p, method.resize), k)
            self.proj_outs[mode.name] = _linear(out_weight, out_bias)
            self.size_embeds[mode.name] = nn.Parameter(torch.zeros(width).to(kernel))

    def routes(self, mode: Mode) -> bool:
        return not mode.is_full

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        grouped = group(vectors, mode.patch_scale[-1])
        return self.patch_embeds[mode.name](grouped) + self.size_embeds[mode.name]

    def project(self, hidden: Tensor, mode: Mode, grid: tuple[int, int]) -> Tensor:
        return ungroup(self.proj_outs[mode.name](hidden), *grid, mode.patch_scale[-1])


class SharedSizes(Sizes):
    """One underlying patch weight; ``w(p) = Q(p) w_flex``, ``v(p) = v_flex R(p)`` (section 3.1).

    ``Q`` going down to the base sums taps and ``R`` averages samples, so the start ``pinv(Q) w``
    gives back exactly ``w``. The size-dependent normalisation, whose place the paper leaves open,
    is a gain and shift on the new sizes' tokens that starts as the identity.

    Attributes:
        live: make full-mode tokens from the underlying weight too (while training). Otherwise full
            mode is the stock path with the base weights that `write_base` has materialised.
    """

    def __init__(self, method: FlexiDiT, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        kernel, bias = (x.detach() for x in backbone.embed_kernel(model))
        rows, row_bias = (x.detach() for x in backbone.output_rows(model))
        width, p = kernel.shape[0], kernel.shape[-1]
        u = method.underlying * p
        self.patch, self.kind = p, method.resize
        self.live = False
        self.flex_embed = nn.Parameter(resize_embedding(kernel, u, "box"))
        self.flex_bias = nn.Parameter(bias.clone())
        self.flex_out = nn.Parameter(resize_output(rows, u, "box"))
        self.flex_out_bias = nn.Parameter(resize_output(row_bias, u, "box"))
        self.size_embeds, self.size_gains, self.size_shifts = (nn.ParameterDict() for _ in range(3))
        for mode in method.modes:
            self.size_embeds[mode.name] = nn.Parameter(torch.zeros(width).to(kernel))
            self.size_gains[mode.name] = nn.Parameter(torch.ones(width).to(kernel))
            self.size_shifts[mode.name] = nn.Parameter(torch.zeros(width).to(kernel))

    def routes(self, mode: Mode) -> bool:
        return self.live or not mode.is_full

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        grouped = group(vectors, mode.patch_scale[-1])
        tokens = F.linear(grouped, self._projected(mode)[0], self.flex_bias)
        if mode.is_full:
            return tokens
        gain, shift = self.size_gains[mode.name], self.size_shifts[mode.name]
        return tokens * gain + shift + self.size_embeds[mode.name]

    def project(self, hidden: Tensor, mode: Mode, grid: tuple[int, int]) -> Tensor:
        _, weight, bias = self._projected(mode)
        return ungroup(F.linear(hidden, weight, bias), *grid, mode.patch_scale[-1])

    def write_base(self, model: nn.Module, backbone: Backbone) -> None:
        """Materialise ``w(p_base)`` and ``v(p_base)`` into the stock modules."""
        p = self.patch
        embed = resize_embedding(self.flex_embed.detach(), p, self.kind), self.flex_bias.detach()
        output = (
            resize_output(self.flex_out.detach(), p, self.kind),
            resize_output(self.flex_out_bias.detach(), p, self.kind),
        )
        backbone.load_patch(model, embed, output)

    def _projected(self, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding, output weight and output bias of a mode; kept until the weights change."""
        sources = (self.flex_embed, self.flex_out, self.flex_out_bias)
        cache = self.__dict__.setdefault("_projections", {})
        version = versions(*sources)
        if torch.is_grad_enabled() or cache.get(mode, (None,))[0] != version:
            k = mode.patch_scale[-1]
            q = k * self.patch
            made = (
                kernel_to_group(resize_embedding(self.flex_embed, q, self.kind), k),
                output_to_group(resize_output(self.flex_out, q, self.kind), k),
                output_to_group(resize_output(self.flex_out_bias, q, self.kind), k),
            )
            if torch.is_grad_enabled():
                return made
            cache[mode] = (version, made)
        return cache[mode][1]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
