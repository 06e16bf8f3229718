"""What several methods and adapters make together: one method, and the weights of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic_dit.checkpoint import Adapter
from elastic_dit.methods import Combined, Method
from elastic_dit.schedule import Schedule


@dataclass(frozen=True)
class Composition:
    """A method, with the adapters that hold weights of it.

    Args:
        adapters: of the method, or each of another part of it. Parts without one start from the
            base's weights.
        schedule: to begin with.
    """

    method: Method
    adapters: tuple[Adapter, ...]
    schedule: Schedule

    @classmethod
    def of(cls, sources: Sequence[Adapter | Method]) -> Composition:
        """Methods and adapters joined.

        Raises:
            ValueError: none, methods that cannot be combined, or two adapters whose parts were
                trained with base weights of their own.
        """
        adapters = tuple(source for source in sources if isinstance(source, Adapter))
        methods = [x.method if isinstance(x, Adapter) else x for x in sources]
        if not methods:
            raise ValueError("adapter = []; legal: at least one adapter or method")
        trained = [adapter for adapter in adapters if adapter.method.trains_base]
        if len(trained) > 1:
            names = " and ".join(repr(adapter.method.name) for adapter in trained)
            raise ValueError(
                f"the adapters of {names} each hold base weights of their own, and a model has one "
                "set; legal: at most one adapter that retrains the base (recipes 'lora', 'td-lora' "
                "and method 'ddit' leave it as it is)"
            )
        method = methods[0] if len(methods) == 1 else Combined(parts=tuple(methods))
        # Only the part that has retrained the base's weights says where they may be used.
        told = trained if len(methods) > 1 else adapters
        schedule = next((x.schedule for x in told if x.schedule is not None), None)
        return cls(method, adapters, schedule or method.default_schedule)
