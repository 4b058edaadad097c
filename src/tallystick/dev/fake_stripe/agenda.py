"""What is due when: the transitions that the account's clock brings about."""

from __future__ import annotations

import asyncio
import heapq


class Agenda:
    """A heap of `(due, transition, object id)`.

    Entries are never taken back: an object that changed plans anew, and a transition checks on its object that it is
    still due. Two entries for the same moment come in the order of their names and ids, so that a run repeats exactly.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[int, str, str]] = []
        self.changed = asyncio.Event()

    def plan(self, due: int, transition: str, object_id: str) -> None:
        """Notes that this transition of this object is due at this time."""
        heapq.heappush(self._entries, (due, transition, object_id))
        if self._entries[0] == (due, transition, object_id):
            self.changed.set()

    def next_due(self) -> int | None:
        """When the earliest entry is due."""
        return self._entries[0][0] if self._entries else None

    def pop(self) -> tuple[int, str, str]:
        """Takes the earliest entry off."""
        return heapq.heappop(self._entries)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.changed.set()
