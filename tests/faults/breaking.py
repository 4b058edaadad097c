"""Bugs, put into a process before it starts, for the tests that prove that the harness finds them."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any


def acknowledge_first() -> None:
    """The drain lets go of what it has read before the ledger has it."""
    from tallystick.usage import drain
    from tallystick.usage.buffer import acknowledge, read_entries

    async def read_and_forget(redis: Any, *arguments: Any, **named: Any) -> Any:
        entries = await read_entries(redis, *arguments, **named)
        if entries:
            await acknowledge(redis, entries)
        return entries

    vars(drain)["read_entries"] = read_and_forget


def answer_first() -> None:
    """A webhook is answered before its event is committed."""
    from tallystick.webhooks.inbox import Inbox

    submit = Inbox.submit
    later: set[asyncio.Task[Any]] = set()

    async def answer_at_once(self: Inbox, event: Any) -> Any:
        task = asyncio.create_task(submit(self, event))
        later.add(task)
        task.add_done_callback(later.discard)
        return "applied"

    Inbox.submit = answer_at_once  # type: ignore[method-assign]


def random_identifier() -> None:
    """Each try of a delivery has an identifier of its own."""
    from stripe.billing import MeterEventService

    create = MeterEventService.create_async

    async def create_anew(self: Any, params: Any, options: Any = None) -> Any:
        params["identifier"] = str(uuid.uuid4())
        return await create(self, params, options)

    MeterEventService.create_async = create_anew  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "acknowledge_first": acknowledge_first,
    "answer_first": answer_first,
    "random_identifier": random_identifier,
}
