"""Reading from Stripe's API in bulk: lists page by page and single objects, patiently and within the rate limits.

The SDK's own objects are left out: to turn a page of events into them takes half a second of computing, and everything
here wants the plain JSON.
"""

import random
from asyncio import sleep
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from tallystick.resources import Resources
from tallystick.stripe_gateway import STRIPE_ERRORS, is_missing, to_problem
from tallystick.stripe_limits import OBJECTS_PER_PAGE
from tallystick.webhooks.translate import instant

PAGE_SIZE = OBJECTS_PER_PAGE
# Below the 25 calls a second of a sandbox and a fifth of the 100 of live mode, which the product shares with us.
CALLS_PER_SECOND = 20
# Half a minute of growing pauses in all. What fails for longer is left to the next run.
TRIES = 8
FIRST_PAUSE_SECONDS = 0.25


@dataclass
class Reader:
    """Calls to Stripe that only read. It remembers how many it made just now, so as not to be too fast."""

    resources: Resources
    allowed: float = field(init=False)
    counted_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.per_second = min(CALLS_PER_SECOND, self.resources.settings.stripe_calls_per_second)
        self.allowed, self.counted_at = self.per_second, monotonic()

    @property
    def longest_call(self) -> timedelta:
        """How long `get` may take, when Stripe lets each try wait for its answer until the end."""
        pauses = sum(FIRST_PAUSE_SECONDS * 2**number for number in range(TRIES - 1))
        return timedelta(seconds=TRIES * self.resources.settings.stripe_timeout_seconds + pauses)

    async def get(self, path: str, **params: object) -> dict[str, Any]:
        """`GET path`, tried again while waiting may help (429, 5xx, no connection). Raises Stripe's error else."""
        pause = FIRST_PAUSE_SECONDS
        for tries_left in reversed(range(TRIES)):
            await self._wait_for_turn()
            try:
                answer = await self.resources.stripe.raw_request_async("get", path, **params)
            except STRIPE_ERRORS as error:
                if to_problem(error).status != 503 or not tries_left:
                    raise
            else:
                data: dict[str, Any] = answer.data
                return data
            # With jitter: others that were refused in the same moment come back in other ones.
            await sleep(pause * random.uniform(0.5, 1))
            pause *= 2
        raise AssertionError("the last try returns or raises")

    async def page(self, path: str, cursor: str | None, **params: object) -> tuple[list[dict[str, Any]], str | None]:
        """The page of a list after the object that `cursor` names, and the cursor of the next page if there is one.

        A list whose cursor was deleted meanwhile, or is too old to be listed, begins again: nothing of it is left out.
        """
        params = {"limit": PAGE_SIZE} | params
        try:
            page = await self.get(path, **params, **({"starting_after": cursor} if cursor is not None else {}))
        except STRIPE_ERRORS as error:
            if cursor is None or not is_missing(error, "starting_after"):
                raise
            page = await self.get(path, **params)
        entries: list[dict[str, Any]] = page["data"]
        return entries, entries[-1]["id"] if entries and page["has_more"] else None

    async def find(self, path: str) -> dict[str, Any] | None:
        """`GET path`, or None when there is no such object."""
        try:
            return await self.get(path)
        except STRIPE_ERRORS as error:
            if error.http_status == 404:
                return None
            raise

    async def newest_event(self) -> datetime | None:
        """When Stripe's newest event of any type was created, on Stripe's own clock; None without one in 30 days.

        Whatever is read from Stripe afterwards holds the effects of all events up to this time.
        """
        page = await self.get("/v1/events", limit=1)
        return instant(page["data"][0]["created"]) if page["data"] else None

    async def _wait_for_turn(self) -> None:
        while True:
            now = monotonic()
            self.allowed = min(self.per_second, self.allowed + (now - self.counted_at) * self.per_second)
            self.counted_at = now
            if self.allowed >= 1:
                self.allowed -= 1
                return
            await sleep((1 - self.allowed) / self.per_second)
