"""What one forward pass of a routed mode leaves out, block by block.

Two ways to run the same decisions. *Sliced*: heads and channels are rows and columns of the layers'
weights, and those of closed slots are cut away; tokens that skip the feed-forward are left out of
its batch. *Gated*: everything is computed and multiplied by 0 or 1, as in training, where every
picture has gates of its own and gradients pass through them.

Shape legend: B pictures, F features, N tokens, L blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditdial.cost.blocks import Kept
from ditdial.plan.mode import Mode


@dataclass(frozen=True, eq=False)
class Open:
    """The heads or channels of one block that are left in.

    Args:
        share: of the slots, ``(B,)`` with a gradient where they are gated in training.
        features: indices ``(F',)`` to slice by; None for all.
        gates: a factor ``(B or 1, F)`` for each feature; None where they are sliced.
        heads: how many heads are left in the attention; None for all.
    """

    share: float | Tensor
    features: Tensor | None = None
    gates: Tensor | None = None
    heads: int | None = None


@dataclass(eq=False)
class Narrow:
    """One routed forward pass.

    Args:
        mode: what was asked for.
        opens: by role (``heads``, ``channels``, or ``both`` where a layer takes both), block by
            block.
        token_logits: of a block, from its residual stream ``(B, N, D)``: ``(B, N)``; None if no
            token skips.
        token_gates: of a block, from its logits, where tokens are gated; None where they are left
            out.
        mix: weights ``(B or 1, E)`` of the low-rank experts; None without them.
        capacities: share of each block's tokens that are kept, those with the highest logits; None
            keeps those above zero.
        text: text tokens, which come first where a block has them in one sequence with the picture.
        slices: how many narrow copies of its weights a layer keeps for later calls.
    """

    mode: Mode
    opens: dict[str, tuple[Open, ...]]
    token_logits: Callable[[int, Tensor], Tensor] | None = None
    token_gates: Callable[[int, Tensor], Tensor] | None = None
    mix: Tensor | None = None
    capacities: tuple[float, ...] | None = None
    text: int = 0
    slices: int = 1
    logits: dict[int, Tensor] = field(default_factory=dict)
    entering: dict[int, Tensor] = field(default_factory=dict)
    token_shares: dict[int, float | Tensor] = field(default_factory=dict)

    def capacity(self, block: int) -> float | None:
        """Share of a block's tokens that are kept; None where their logits decide."""
        return None if self.capacities is None else self.capacities[block]

    def kept(self) -> tuple[Kept, ...]:
        """What was left in, block by block, once the forward pass is over."""
        shares = [
            (heads.share, channels.share, self.token_shares.get(block, 1.0))
            for block, (heads, channels) in enumerate(
                zip(self.opens["heads"], self.opens["channels"], strict=True)
            )
        ]
        means = iter(_means([share for three in shares for share in three]))
        return tuple(Kept(*three) for three in zip(means, means, means, strict=True))


def per_row(gates: Tensor, rows: int) -> Tensor:
    """Gates ``(B or 1, F)`` for ``rows`` rows, each picture's one after the other: ``(rows, F)``.

    Blocks of video models see each frame, or each place, of a picture as a row of its own.
    """
    return gates if len(gates) in (1, rows) else gates.repeat_interleave(rows // len(gates), dim=0)


def _means(shares: list[float | Tensor]) -> list[float]:
    """Of all pictures each, in one look at the device."""
    tensors = [share.detach().mean() for share in shares if torch.is_tensor(share)]
    found = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(found) if torch.is_tensor(share) else share for share in shares]
