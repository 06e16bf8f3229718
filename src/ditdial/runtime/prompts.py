"""Which prompts a run has seen, so that layers that see the prompt alone run once for each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ditdial.backbones.arguments import Call
from ditdial.layers.state import TextKey


@dataclass(eq=False)
class Prompts:
    """Of the present run of one elastic model.

    Args:
        argument: of the call, which holds the prompt.

    Attributes:
        seen: the prompts of the run.
        in_one_group: whether all pictures of the present step run in the same mode.
        repeated: rows of the present call whose text layers were computed in another.
    """

    argument: str | None
    seen: list[TextKey] = field(default_factory=list)
    in_one_group: bool = True
    repeated: int = 0

    def key(self, call: Call, run: int) -> TextKey | None:
        """The prompt of a call, for layers that see nothing else; None if there is none."""
        prompt = None if self.argument is None else call.get(self.argument)
        if not torch.is_tensor(prompt):
            return None
        key = TextKey(prompt, run)
        if any(key.same(known) for known in self.seen):
            self.repeated += len(prompt)
        else:
            self.seen.append(key)
        return key
