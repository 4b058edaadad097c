"""A process may die between any two steps: a flow is run once for each step, dies after it, and is run again.

A step is a commit, a call to Stripe that was answered, or a command that Redis has carried out. Whatever is done after
the last step before a death is as if it had not been done.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tallystick import db
from tallystick.resources import Resources
from tallystick.stripe_gateway import Connections

# After a death: when every lease of the dead one has ended.
LATER = timedelta(hours=1)


class Died(BaseException):
    """Nothing in the code may catch it, as nothing can catch a power failure."""


@dataclasses.dataclass
class Life:
    """Counts steps, and ends after the one with the number `until`."""

    until: int | None
    steps: list[str] = dataclasses.field(default_factory=list)

    def go_on(self) -> None:
        if self.until is not None and len(self.steps) >= self.until:
            raise Died

    def step(self, name: str) -> None:
        self.steps.append(name)
        self.go_on()


@asynccontextmanager
async def living(life: Life, resources: Resources) -> AsyncIterator[None]:
    """Within it, each step counts; whoever still runs when the life has ended takes none."""
    begin, call = db.transaction, Connections.request_async
    command: Any = resources.redis.execute_command

    @asynccontextmanager
    async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        life.go_on()
        async with begin(engine) as connection:
            yield connection
        life.step("commit")

    async def request_async(self: Any, method: str, url: str, *rest: Any, **more: Any) -> Any:
        life.go_on()
        answer = await call(self, method, url, *rest, **more)
        life.step(f"{method} {url.rpartition('/')[2]}")
        return answer

    async def execute_command(*words: Any, **options: Any) -> Any:
        life.go_on()
        answer = await command(*words, **options)
        life.step(str(words[0]))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "transaction", transaction)
        patch.setattr(Connections, "request_async", request_async)
        patch.setattr(resources.redis, "execute_command", execute_command)
        yield


async def die_everywhere(
    resources: Resources,
    prepare: Callable[[], Awaitable[object]],
    flow: Callable[[datetime], Awaitable[object]],
    read_end: Callable[[], Awaitable[Any]],
) -> tuple[list[str], Any]:
    """Fail unless everything is in the end as if nobody had died, after whichever step; the steps, and that end."""
    whole = Life(until=None)
    await prepare()
    async with living(whole, resources):
        await flow(datetime.now(UTC))
    await flow(datetime.now(UTC) + LATER)
    end = await read_end()

    for number, name in enumerate(whole.steps, 1):
        await prepare()
        others = asyncio.all_tasks()
        async with living(Life(until=number), resources):
            with pytest.raises(Died):
                await flow(datetime.now(UTC))
            # Its tasks die with it.
            await asyncio.gather(*(asyncio.all_tasks() - others), return_exceptions=True)
        await flow(datetime.now(UTC) + LATER)
        assert await read_end() == end, f"died after step {number}: {name}"
    return whole.steps, end
