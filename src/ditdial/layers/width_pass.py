"""What one forward pass of a routed mode leaves out, block by block.

Two ways to run the same decisions. *Sliced*: heads and channels are rows and columns of the layers'
weights, and those of closed slots are cut away; tokens that skip the feed-forward are left out of
its batch. *Gated*: everything is computed and multiplied by 0 or 1, as in training, where every
picture has gates of its own and gradients pass through them.

Shape legend: B pictures, F features, N tokens, L blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ditdial.cost.blocks import Kept
from ditdial.ops.gates import open_tokens
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
    """One routed forward pass: what it leaves in, and what its tokens decide on the way.

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

    Attributes:
        logits: of the tokens of each block, once its residual stream was seen.
        places: of the tokens that enter the feed-forward of a block, where two layers ask.
        token_shares: of the tokens that entered.
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
    places: dict[int, Tensor] = field(default_factory=dict)
    token_shares: dict[int, float | Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what the tokens of the pass before decided."""
        self.logits.clear()
        self.places.clear()
        self.token_shares.clear()

    def gates(self, block: int) -> Tensor:
        """Gates ``(B, N)`` of a block's tokens."""
        assert self.token_gates is not None
        gates = self.token_gates(block, self.logits[block])
        self.token_shares[block] = gates.mean(1)
        return gates

    def entering(self, block: int) -> Tensor:
        """Places of the tokens that enter a block's feed-forward, in all rows laid end to end."""
        logits = self.logits[block]
        kept = open_tokens(logits, None if self.capacities is None else self.capacities[block])
        self.token_shares[block] = len(kept) / logits.numel()
        return kept

    def entering_with_text(self, block: int, shape: Sequence[int]) -> Tensor:
        """The same where ``shape`` ``(B, T + N, D)`` is of text and picture; all text enters."""
        if block not in self.places:
            kept, (rows, tokens, _) = self.entering(block), shape
            starts = torch.arange(rows, device=kept.device)[:, None] * tokens
            words = (starts + torch.arange(self.text, device=kept.device)).flatten()
            pictures = kept // (tokens - self.text)
            kept = kept + (pictures + 1) * self.text  # each picture's tokens come behind its text
            self.places[block] = torch.cat([words, kept])
        return self.places[block]

    def kept(self) -> tuple[Kept, ...]:
        """What was left in, block by block, once the forward pass is over.

        For the costs: shares of heads, channels and tokens, each in the mean over the pictures. It
        reads from the device once.
        """
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


class Routing(Protocol):
    """What decides, by the time alone, which heads and channels routed modes leave in.

    Attributes:
        gated: everything is computed and multiplied by gates, instead of sliced.
        offsets: added to the logits of heads and channels, in widths between those trained for.
    """

    gated: bool
    offsets: dict[Mode, float]

    @property
    def tokens(self) -> bool:
        """Whether tokens may skip the feed-forward."""
        ...

    def routed_as(self, mode: Mode) -> Mode:
        """The patch and width that routers go by in a mode."""
        ...

    def is_trained(self, mode: Mode) -> bool:
        """Whether a width has routers of its own."""
        ...

    def decide(self, mode: Mode, time_TD: Tensor) -> dict[str, Tensor]:
        """Open slots of each block at T noise levels, ``(T, L, S)`` booleans by role.

        Args:
            time_TD: embeddings of the time alone, as `ditdial.backbones.times.Times.vector` makes
                them.
        """
        ...

    def mix(self, time_BD: Tensor) -> Tensor | None:
        """How much of each low-rank expert, ``(B, E)``; None without experts."""
        ...

    def experts(self, layer: str) -> tuple[Tensor, Tensor]:
        """``A`` ``(r, in)``, which the experts share, and ``B`` ``(E, out, r)``, of a layer."""
        ...

    def sliced(
        self, mode: Mode, opened: dict[str, Tensor], mix: Tensor | None, known: dict[Any, Tensor]
    ) -> Narrow:
        """A forward pass that leaves out what is closed."""
        ...

    def gating(self, mode: Mode, time_BD: Tensor) -> Narrow:
        """A forward pass that computes everything and multiplies by gates, with gradients."""
        ...

    def token_shares(self, mode: Mode, level: float | None) -> list[float]:
        """Share of the tokens that each block is known to keep at a noise level."""
        ...
