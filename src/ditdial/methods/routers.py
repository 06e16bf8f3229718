"""The routers of DyDiT (2410.03456, section 3), and the slots of a block that they open.

A slot is a head, or a group of channels; the most important ones come first, and the first one is
always open.

Shape legend: B pictures, N tokens, D width, L blocks, S slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.backbones import Backbone
from ditdial.backbones.routed import RoutedBlock, has_fused
from ditdial.layers.width_pass import Narrow
from ditdial.ops.widths import (
    by_importance,
    channel_importance,
    head_importance,
    slot_of_features,
)

LEVELS = 10
"""Bins of noise levels for which the share of kept tokens is recorded."""


def token_router_macs(width: int) -> int:
    """Multiply-adds of one token in a token router: two layers, a sixteenth as wide."""
    return width * (width // 16) + width // 16


class Routers(nn.Module):
    """The three routers of every block, for one mode, in float32 whatever surrounds them.

    Logits of 15 and 35 lose their order in bfloat16.

    Args:
        blocks, heads, groups: how many.
        time_width, width: of the timestep's embedding, and of the tokens.
        head_bias: with which the logits of heads and channels start.
        token_bias: with which those of tokens do; None where no token skips.
    """

    def __init__(
        self,
        blocks: int,
        heads: int,
        groups: int,
        time_width: int,
        width: int,
        *,
        head_bias: float,
        token_bias: float | None,
    ) -> None:
        super().__init__()
        inner = width // 16
        for name, slots in (("head", heads), ("channel", groups)):
            weight = torch.empty(blocks, slots - 1, time_width)
            bias = torch.full((blocks, slots - 1), float(head_bias))
            self._add(name, weight, bias)
        if token_bias is not None:
            self._add("token_in", torch.empty(blocks, inner, width), torch.zeros(blocks, inner))
            bias = torch.full((blocks, 1), float(token_bias))
            self._add("token_out", torch.empty(blocks, 1, inner), bias)
        # What is known of the tokens beforehand: the share that training ended with.
        self.register_buffer("token_shares", torch.ones(blocks, LEVELS))

    def _add(self, name: str, weight: Tensor, bias: Tensor) -> None:
        for one in weight:
            if one.numel():
                nn.init.xavier_uniform_(one)
        self.register_parameter(f"{name}_weight", nn.Parameter(weight))
        self.register_parameter(f"{name}_bias", nn.Parameter(bias))

    def slots(self, name: str, time_BD: Tensor) -> Tensor:
        """Logits of the slots behind the first, ``(B, L, S - 1)``."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        with torch.autocast(time_BD.device.type, enabled=False):
            return torch.einsum("bd,lsd->bls", time_BD.float(), weight.float()) + bias.float()

    def tokens(self, block: int, x_BND: Tensor) -> Tensor:
        """Logits of a block's tokens, ``(B, N)``."""
        names = ("token_in_weight", "token_in_bias", "token_out_weight", "token_out_bias")
        into, into_bias, out, out_bias = (getattr(self, name)[block].float() for name in names)
        with torch.autocast(x_BND.device.type, enabled=False):
            hidden = F.relu(F.linear(x_BND.float(), into, into_bias))
            return F.linear(hidden, out, out_bias)[..., 0]


def slots_of(backbone: Backbone, blocks: list[RoutedBlock], groups: int) -> tuple[int, int]:
    """Heads, and groups of channels, of every block.

    Raises:
        ValueError: blocks that differ, or groups that do not divide the channels.
    """
    if not blocks:
        raise ValueError(
            f"no routed layers are known of {backbone.model_class}; legal: a class whose backbone "
            "names them"
        )
    heads = {block.heads for block in blocks}
    if len(heads) > 1:
        raise ValueError(f"blocks have {sorted(heads)} heads; legal: the same number in all")
    groups = groups or blocks[0].heads
    for block in blocks:
        if has_fused(block.attention):
            raise ValueError(
                f"the attention of {block.name} has fused projections, from which no heads can be "
                "taken; legal: unfuse them first (model.unfuse_qkv_projections())"
            )
        if groups < 1 or block.channels % groups:
            raise ValueError(
                f"groups = {groups} in {block.name}; legal: a divisor of its {block.channels} "
                "channels"
            )
        for layer in block.layers:
            if not _is_plain(layer):
                raise ValueError(
                    f"a layer of {block.name} is a {type(layer).__name__} with weights of type "
                    f"{type(getattr(layer, 'weight', None)).__name__}, from which no rows can be "
                    "taken; legal: plain linear layers (for quantised weights a method that "
                    "changes patches, flexidit or ddit)"
                )
    return blocks[0].heads, groups


def _is_plain(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    plain = isinstance(layer, nn.Linear) and isinstance(weight, nn.Parameter)
    return plain and type(weight) is nn.Parameter and weight.is_floating_point()


@torch.no_grad()
def slot_tables(block: RoutedBlock, groups: int) -> dict[str, Tensor]:
    """The slot of each head feature and of each channel, most important first."""
    rows = [x.weight for x in (*block.inputs, *block.text_inputs)]
    columns = [x.weight for x in (*block.outputs, *block.text_outputs)]
    narrow = block.narrow.weight
    if block.shared:
        columns.append(narrow[:, : block.width])
        narrow = narrow[:, block.width :]
    heads = by_importance(head_importance(rows, columns, block.heads))
    slots = slot_of_features(heads, 1).repeat_interleave(block.width // block.heads)
    channels = by_importance(channel_importance(block.widen.weight, narrow))
    return {
        "heads": slots,
        "channels": slot_of_features(channels, block.channels // groups),
    }


def work_share(narrow: Narrow, work: Iterable[tuple[float, float]]) -> Tensor:
    """Share of the blocks' work that each picture's gates leave in, ``(B,)``: F of section 3.3.

    Args:
        work: of each block, what narrows with its heads and what with its channels and tokens.
    """
    total, left = 0.0, torch.zeros(())
    for index, (heads, channels) in enumerate(work):
        token = narrow.token_shares.get(index, 1.0)
        wide = torch.as_tensor(narrow.opens["channels"][index].share) * token
        left = torch.as_tensor(narrow.opens["heads"][index].share) * heads + wide * channels + left
        total += heads + channels
    return left / total
