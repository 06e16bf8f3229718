"""The arguments of one model call: the latent, whose rows are whose, and what answers a call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ditdial.ops.patching import Triple, group
from ditdial.plan.mode import Mode

Call = dict[str, Any]
"""The arguments of one model call by name."""

Rows = slice | tuple[int, ...]
"""Which rows of a batched call."""


GUIDER_NULL = "pred_uncond"
"""What diffusers' guiders call the prediction of the guidance branch."""


@dataclass(frozen=True)
class Branches:
    """Which rows of a batched call are conditional, and which guide them; row i guides row i."""

    conditional: slice
    guidance: slice


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the arguments of a model class's calls mean, and what answers a call.

    Args:
        sample: the one that holds the latent.
        lists: those that are lists with an entry for each row.
        condition: those that carry the prompt or class; None for one that has none.
        residuals: those that hold what a control network adds to each base token; a coarse token
            gets the mean over those that it covers.
        base_only: those that hold something else per base token, which coarse modes refuse.
        conditional_first: which half of a guided batch is the conditional one; None if the pipeline
            calls the model once per branch.
        contexts: the guidance branch's names in ``cache_context``, if it is called by itself.
        output: class of the stock output object.
    """

    sample: str = "hidden_states"
    lists: tuple[str, ...] = ()
    condition: tuple[str, ...] = ("encoder_hidden_states",)
    residuals: tuple[str, ...] = ()
    base_only: tuple[str, ...] = ()
    conditional_first: bool | None = False
    contexts: tuple[str, ...] = ("uncond",)
    output: type = Transformer2DModelOutput

    def latent(self, call: Call) -> Tensor:
        """The latents of all rows of a call.

        Raises:
            ValueError: a list of pictures that differ in size.
        """
        return self.stack(call[self.sample])

    def count(self, call: Call) -> int:
        """Rows of a call."""
        return len(call[self.sample])

    def device(self, call: Call) -> torch.device:
        """Of the latent of a call."""
        return call[self.sample][0].device

    def stack(self, sample: Any) -> Tensor:
        """Latents or predictions, of which some classes take and return lists, in one tensor.

        Raises:
            ValueError: a list of pictures that differ in size, or several in one row.
        """
        if self.sample not in self.lists:
            return sample
        if any(isinstance(row, list) for row in sample):
            raise ValueError(
                f"{self.sample} holds a list of pictures in a row; legal: one picture in each row"
            )
        sizes = {tuple(row.shape) for row in sample}
        if len(sizes) > 1:
            raise ValueError(
                f"{self.sample} holds latents of sizes {sorted(sizes)}; legal: all of one size"
            )
        return torch.stack(list(sample))

    def prediction(self, call: Call, output: Any) -> Tensor:
        """What the model returned for a call, for all rows in one tensor."""
        return self.stack(output.sample if call.get("return_dict", True) else output[0])

    def answer(self, call: Call, prediction: Tensor) -> Any:
        """What the stock model would return for a call with this prediction.

        Args:
            prediction: of all rows, ``(B, ...)``.

        Returns:
            The class's output object, or a tuple where the call asks for one.
        """
        sample = list(prediction) if self.sample in self.lists else prediction
        return self.output(sample=sample) if call.get("return_dict", True) else (sample,)

    def rows(self, call: Call, index: Rows) -> Call:
        """The arguments of some rows of a batched call.

        Tensors and lists with an entry for each row are cut, also inside dictionaries and lists;
        all else is shared by the rows and stays.
        """
        total = self.count(call)
        places = range(total)[index] if isinstance(index, slice) else index
        return {
            name: [value[i] for i in places] if name in self.lists else cut(value, index, total)
            for name, value in call.items()
        }

    def is_guidance(self, branch: str) -> bool:
        """Whether a branch that a pipeline or a guider names is the guidance branch."""
        return branch in (*self.contexts, GUIDER_NULL)

    def give_condition(self, call: Call, condition: Call) -> Call:
        """``call`` with the condition of ``condition`` (for weak-model guidance).

        The guidance branch then sees the prompt instead of the null prompt (FlexiDiT, section 3.4).
        """
        return call | {name: condition[name] for name in self.condition if name in condition}

    def branches(self, model: Any, call: Call, guided: bool | None) -> Branches | None:
        """The guidance layout of a batched call, None if all rows are conditional.

        Pipelines that guide in one batch give both halves the same latents.

        Args:
            guided: whether guidance is on; None where nothing tells.
        """
        sample = self.latent(call)
        count, half = len(sample), len(sample) // 2
        if self.conditional_first is None or count % 2:
            return None
        # In the first step, two prompts from equal noise are the very numbers of two branches.
        if guided is False:
            return None
        if not torch.equal(sample[:half], sample[half:]):
            return None
        first, second = slice(0, half), slice(half, count)
        return Branches(first, second) if self.conditional_first else Branches(second, first)

    def check(self, call: Call, mode: Mode) -> None:
        """Refuse arguments that only fit base tokens.

        Raises:
            ValueError: naming the argument and the mode.
        """
        # Between blocks of a sparse mode tokens change grids; a smaller latent has another one.
        moved = mode.is_sparse or mode.is_low_band
        for name in (*self.base_only, *(self.residuals if moved else ())):
            if call.get(name) is not None:
                raise ValueError(
                    f"{name} holds something for each base token, and mode {mode.name!r} has other "
                    "tokens; legal together with it: full mode"
                )


def cut(value: Any, index: Rows, total: int) -> Any:
    """Some of ``total`` rows of an argument, inside lists and dictionaries too.

    A tensor is taken for one with a row each by its first side alone, so that what the rows share
    must not happen to have as many entries.
    """
    if isinstance(value, dict):
        return {key: cut(inner, index, total) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([cut(inner, index, total) for inner in value])
    if torch.is_tensor(value) and value.ndim and value.shape[0] == total:
        return value[index if isinstance(index, slice) else list(index)]
    return value


def has_token_times(call: Call) -> bool:
    """Whether each base token has a time of its own, ``(B, N)`` or ``(B, N, 1)``."""
    times = call["timestep"]
    return times.ndim > 1 and times.shape[1] > 1


def grouped_times(times: Tensor, grid: Triple, mode: Mode) -> Tensor:
    """Times of a mode's tokens ``(B, n)`` from those of base tokens.

    A group is as noisy as its noisiest token; frames that are given fill groups of their own only
    if the mode joins none.

    Raises:
        ValueError: there is not one time for each base token.
    """
    times_BN, tokens = times.flatten(1), math.prod(grid)
    if times_BN.shape[1] != tokens:
        raise ValueError(
            f"timestep has {times_BN.shape[1]} times in a row; legal in coarse modes: 1, or "
            f"{tokens} (one for each base token)"
        )
    return group(times_BN.unflatten(1, grid)[..., None], mode.patch_scale).amax(dim=2)
