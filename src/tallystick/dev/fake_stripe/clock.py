"""The account's own clock: runs with real time from wherever it was moved to, or stands still."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock:
    """Seconds since the Unix epoch, in whole seconds as Stripe counts them.

    `frozen_at` stops it. `pinned_at` stops it for the moment of one transition that is being carried out, so that all
    that it makes carries the time at which it was due.
    """

    def __init__(self) -> None:
        self.offset = 0.0
        self.frozen_at: int | None = None
        self.pinned_at: int | None = None

    def now(self) -> int:
        """The account's time."""
        if self.pinned_at is not None:
            return self.pinned_at
        if self.frozen_at is not None:
            return self.frozen_at
        return int(time.time() + self.offset)

    def move_to(self, moment: int) -> None:
        """Sets the time; a running clock runs on from there."""
        if self.frozen_at is not None:
            self.frozen_at = moment
        # A running clock is aimed at the middle of the second: rounding must not show the second before.
        self.offset = moment + 0.5 - time.time()

    def freeze(self, frozen: bool) -> None:
        """Stops the clock at its present second, or lets it run on from there."""
        if frozen and self.frozen_at is None:
            self.frozen_at = self.now()
        elif not frozen and self.frozen_at is not None:
            moment, self.frozen_at = self.frozen_at, None
            self.move_to(moment)

    def dump(self) -> dict[str, object]:
        """What a restart needs."""
        return {"offset": str(self.offset), "frozen_at": self.frozen_at}

    def load(self, saved: dict[str, object]) -> None:
        """Takes up what `dump` gave: a running clock has run on meanwhile, a frozen one has not."""
        self.offset = float(str(saved["offset"]))
        frozen_at = saved["frozen_at"]
        self.frozen_at = None if frozen_at is None else int(str(frozen_at))


def rfc3339(moment: int) -> str:
    """How API v2 writes a time: `2026-01-31T09:15:07.000Z`."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
