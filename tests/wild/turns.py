"""Two runs that take turns: each goes on from where the other stopped, always in the same order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

PATIENCE = 30.0
"""Seconds after which a run that never gets its turn is an error."""


class Turns:
    """Threads of which one works at a time."""

    def __init__(self, count: int) -> None:
        self._waiting = threading.Condition()
        self._order = list(range(count))

    def await_own(self, index: int) -> None:
        """Wait until this thread is the one to work."""
        with self._waiting:
            came = self._waiting.wait_for(lambda: self._order[0] == index, PATIENCE)
        if not came:
            raise TimeoutError(f"run {index} waited {PATIENCE} s for its turn")

    def hand_over(self, index: int) -> None:
        """Let the others work, and wait for the next turn."""
        with self._waiting:
            self._order.append(self._order.pop(0))
            self._waiting.notify_all()
        self.await_own(index)

    def leave(self, index: int) -> None:
        """This thread is done."""
        with self._waiting:
            self._order.remove(index)
            self._waiting.notify_all()


def in_turns(runs: Sequence[Callable[[Callable[[], None]], Any]]) -> list[Any]:
    """What runs give that take turns.

    Args:
        runs: each is given what it is to call wherever another shall go on.

    Raises:
        Exception: the first that a run raised.
    """
    turns = Turns(len(runs))
    results: list[Any] = [TimeoutError("a run did not end")] * len(runs)

    def work(index: int) -> None:
        turns.await_own(index)
        try:
            results[index] = runs[index](lambda: turns.hand_over(index))
        except Exception as error:
            results[index] = error
        finally:
            turns.leave(index)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
