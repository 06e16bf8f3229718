"""The contract: what we must know of a diffusers model class to make it elastic.

A backbone is knowledge, not a model: which submodules make tokens, turn them back, modulate and
attend; how the base patch vector is laid out; what the call's arguments mean. One file each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_dit.cost import TransformerShape
from elastic_dit.mode import Mode
from elastic_dit.routing import Router

Call = dict[str, Any]
"""The arguments of one model call by name."""

Model = Any
"""A live diffusers model or submodule; `nn.Module` as a type would hide its attributes."""


@dataclass(frozen=True)
class Branches:
    """Which rows of a batched call are conditional, and which guide them; row i guides row i."""

    conditional: slice
    guidance: slice


class Backbone(ABC):
    """Knowledge of one diffusers model class.

    Attributes:
        model_class: name of the diffusers class.
        embed, output: names of the submodules that make tokens and turn them into base patch
            vectors.
        sample_argument: name of the call's argument that holds the latent.
    """

    model_class: str
    embed: str
    output: str
    sample_argument: str = "hidden_states"

    @abstractmethod
    def grid(self, embed: Model, latent: Tensor) -> tuple[int, int]:
        """Base grid ``(height, width)`` of a latent."""

    @abstractmethod
    def patch_vectors(self, embed: Model, latent: Tensor) -> Tensor:
        """Latent -> base patch vectors ``(B, H, W, c)``."""

    @abstractmethod
    def positions(self, embed: Model, router: Router, mode: Mode) -> Tensor:
        """Position vectors ``(1, n, D)`` of a mode's tokens on the router's grid."""

    @abstractmethod
    def embed_kernel(self, model: Model) -> tuple[Tensor, Tensor]:
        """Weight ``(D, C, p, p)`` and bias ``(D,)`` of the base patch embedding."""

    @abstractmethod
    def output_rows(self, model: Model) -> tuple[Tensor, Tensor]:
        """Weight ``(p, p, C, D)`` and bias ``(p, p, C)`` of the base output projection."""

    @abstractmethod
    def load_patch(
        self, model: Model, embed: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        """Write a base patch embedding and output projection, formed as those two above."""

    @abstractmethod
    def low_rank_layers(self, model: Model) -> Iterator[tuple[str, nn.Linear]]:
        """Linear layers of self-attention and feed-forward, with their names."""

    @abstractmethod
    def modulation_layers(self, model: Model) -> Iterator[nn.Module]:
        """Linear layers whose output modulates all tokens of a picture."""

    @abstractmethod
    def attention_layers(self, model: Model) -> Iterator[nn.Module]:
        """Self-attention modules."""

    @abstractmethod
    def level_of(self, time: float) -> float:
        """Noise level in [0, 1] of the time the model is given."""

    @abstractmethod
    def level(self, call: Call) -> float:
        """Noise level in [0, 1] of a call.

        Raises:
            ValueError: the call gives no time, or rows of one batch have different ones.
        """

    @abstractmethod
    def branches(self, model: Model, call: Call) -> Branches | None:
        """The guidance layout of a batched call, None if all rows are conditional."""

    @abstractmethod
    def give_condition(self, call: Call, condition: Call) -> Call:
        """``call`` with the condition of ``condition`` (for weak-model guidance)."""

    @abstractmethod
    def shape(self, model: Model) -> TransformerShape:
        """What the model's cost depends on."""

    @abstractmethod
    def identity(self, model: Model) -> dict[str, Any]:
        """The facts an adapter must share with its base: class, width, depth, patch, channels."""

    @abstractmethod
    def wrap_output(self, sample: Tensor) -> Any:
        """The stock output object."""

    @abstractmethod
    def check(self, model: Model, modes: set[Mode]) -> None:
        """Refuse modes that this model cannot run.

        Raises:
            ValueError: naming the mode and why.
        """

    def modules(self, model: Model) -> tuple[nn.Module, nn.Module]:
        """The token-making and the token-ending submodule."""
        return model.get_submodule(self.embed), model.get_submodule(self.output)


def rows(call: Call, index: slice, total: int) -> Call:
    """The arguments of some rows of a batched call."""
    return {
        key: value[index]
        if torch.is_tensor(value) and value.ndim and value.shape[0] == total
        else value
        for key, value in call.items()
    }
