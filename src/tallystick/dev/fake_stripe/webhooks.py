"""Webhooks: every event goes to every endpoint that listens, signed, until it is answered with 2xx.

Each delivery waits and retries in a task of its own. What is pending is part of the account's state, and goes on after
a restart. Waiting and retrying are in real seconds, whatever the account's clock says: the receiver is real.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import httpx

from tallystick.dev.fake_stripe import invoicing
from tallystick.dev.fake_stripe.state import Object
from tallystick.dev.fake_stripe.versions import in_version

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

DELIVERIES_AT_ONCE = 8
# Stripe's own limit is longer; a receiver that takes 10 s is as good as dead for whoever develops against this.
ANSWER_SECONDS = 10
# With `shuffle`, deliveries that come within this time of each other go out in another order.
SHUFFLE_SECONDS = 0.25
ATTEMPTS_KEPT = 2000


@dataclass
class Options:
    """How webhooks misbehave, set by `POST /_fake/webhooks`. Times are real seconds."""

    duplicate_probability: Decimal = Decimal(0)
    shuffle: bool = False
    delay_seconds: Decimal = Decimal(0)
    paused: bool = False
    max_attempts: int | None = None
    """After so many attempts without a 2xx the delivery counts as failed; None goes on for ever."""


def signature(payload: bytes, secrets: list[str], timestamp: int) -> str:
    """The `Stripe-Signature` header: HMAC-SHA256 over `{timestamp}.{payload}`, one `v1` for each live secret."""
    signed = f"{timestamp}.".encode() + payload
    marks = [hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest() for secret in secrets]
    return ",".join([f"t={timestamp}", *(f"v1={mark}" for mark in marks)])


def listens(endpoint: Object, event: Object) -> bool:
    """Whether an endpoint gets an event. `*` means every snapshot event; thin events must be named."""
    if endpoint["status"] != "enabled":
        return False
    named = endpoint["enabled_events"]
    return event["type"] in named or (event["object"] == "event" and "*" in named)


class Deliveries:
    """The deliveries under way. A delivery is one event for one endpoint."""

    def __init__(self, account: Account, retry_seconds: tuple[float, ...]) -> None:
        self._account = account
        self._retry_seconds = retry_seconds
        self.options = Options()
        self.attempts: deque[Object] = deque(maxlen=ATTEMPTS_KEPT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[Object] = []
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(DELIVERIES_AT_ONCE)
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Delivers while the block runs; takes up first what an earlier run left pending."""
        # Proxies of the environment are not asked: endpoints are on this machine or reached directly.
        limits = httpx.Limits(max_connections=DELIVERIES_AT_ONCE * 2)
        async with httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False, limits=limits) as self._client:
            for delivery in self.pending():
                self._begin(delivery)
            try:
                yield
            finally:
                await self._stop()

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def clear(self) -> None:
        """Drops everything that is under way."""
        for task in self._tasks:
            task.cancel()
        self._held.clear()
        self.attempts.clear()
        self.options = Options()
        self._pulse()

    def pending(self) -> list[Object]:
        """What has not been answered with 2xx yet."""
        return self._account.state.all("_delivery")

    def announce(self, event: Object) -> None:
        """Queues an event for every endpoint that listens."""
        for endpoint in self._account.state.all("webhook_endpoint"):
            if not listens(endpoint, event):
                continue
            event["_webhooks"][endpoint["id"]] = "pending"
            delivery: Object = {
                "object": "_delivery",
                "id": f"{event['id']}/{endpoint['id']}",
                "event": event["id"],
                "event_object": event["object"],
                "event_type": event["type"],
                "endpoint": endpoint["id"],
                "attempts": 0,
            }
            self._account.state.put(delivery)
            self._begin(delivery)
        if event["object"] == "event":
            event["pending_webhooks"] = len(event["_webhooks"])

    def forget(self, endpoint_id: str) -> None:
        """Drops what is pending for an endpoint that was deleted."""
        for delivery in self.pending():
            if delivery["endpoint"] == endpoint_id:
                self._finish(delivery, None)

    def resume(self) -> None:
        """Wakes deliveries that waited while `paused` was set."""
        self._pulse()

    async def settled(self, seconds: float) -> bool:
        """Waits until nothing is pending; False if something still is after so many real seconds."""
        return await self._wait(lambda: not self.pending(), seconds)

    async def answered(self, event_id: str, seconds: float) -> bool:
        """Waits until one event is not pending any more; False if it still is after so many real seconds."""
        return await self._wait(lambda: not self._account.state.where("_delivery", "event", event_id), seconds)

    async def _wait(self, reached: Callable[[], bool], seconds: float | None) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not reached():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _pulse(self) -> None:
        # Wakes everyone who waits now, and leaves the event clear for whoever waits next.
        self._changed.set()
        self._changed.clear()

    def _begin(self, delivery: Object) -> None:
        if self._client is None:
            return  # taken up when the server starts
        if self.options.shuffle:
            self._held.append(delivery)
            if len(self._held) == 1:
                self._spawn(self._release_shuffled())
        else:
            self._spawn(self._deliver(delivery))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release_shuffled(self) -> None:
        await asyncio.sleep(SHUFFLE_SECONDS)
        held, self._held = self._held, []
        order = list(held)
        self._account.random.shuffle(order)
        if order == held:
            order.reverse()
        for delivery in order:
            # One after the other: the receiver sees exactly this order.
            if not await self._try(delivery):
                self._spawn(self._deliver(delivery))

    async def _deliver(self, delivery: Object) -> None:
        pause = self._retry_delay(delivery) if delivery["attempts"] else float(self.options.delay_seconds)
        while True:
            await asyncio.sleep(pause)
            if await self._try(delivery):
                return
            pause = self._retry_delay(delivery)

    def _retry_delay(self, delivery: Object) -> float:
        attempts: int = delivery["attempts"]
        return self._retry_seconds[min(attempts, len(self._retry_seconds)) - 1]

    async def _try(self, delivery: Object) -> bool:
        """One attempt. True when there is nothing left to do for this delivery."""
        await self._wait(lambda: not self.options.paused, None)
        async with self._slots:
            state = self._account.state
            event = state.get(delivery["event_object"], delivery["event"])
            endpoint = state.get("webhook_endpoint", delivery["endpoint"])
            if state.get("_delivery", delivery["id"]) is not delivery or event is None or endpoint is None:
                return True  # the endpoint was deleted, or everything was reset
            accepted = await self._post(delivery, event, endpoint)
        if state.get("_delivery", delivery["id"]) is not delivery:
            return True
        state.put(delivery)
        if accepted:
            self._finish(delivery, "succeeded")
            if self._account.random.random() < self.options.duplicate_probability:
                await self._post(delivery, event, endpoint)
            return True
        if self.options.max_attempts is not None and delivery["attempts"] >= self.options.max_attempts:
            self._finish(delivery, "failed")
            return True
        return False

    async def _post(self, delivery: Object, event: Object, endpoint: Object) -> bool:
        assert self._client is not None
        payload = json.dumps(self._payload(event, endpoint), separators=(",", ":")).encode()
        # The receiver holds the signature's time against the real clock, and each attempt is signed afresh.
        header = signature(payload, endpoint["_secrets"], int(time.time()))
        delivery["attempts"] += 1
        self._account.keep_before_telling()
        status: int | None = None
        problem: str | None = None
        try:
            response = await self._client.post(
                endpoint["url"],
                content=payload,
                headers={
                    "Content-Type": "application/json; charset=utf-8",
                    "Stripe-Signature": header,
                    "User-Agent": "Stripe/1.0 (fake)",
                },
            )
            status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = type(error).__name__
        self.attempts.append(
            {
                "event": event["id"],
                "type": event["type"],
                "endpoint": endpoint["id"],
                "url": endpoint["url"],
                "attempt": delivery["attempts"],
                "status": status,
                "problem": problem,
                "at": int(time.time()),
            }
        )
        # Redirects are not followed: 3xx is a failure.
        return status is not None and 200 <= status < 300

    def _payload(self, event: Object, endpoint: Object) -> Object:
        shown = {name: value for name, value in event.items() if not name.startswith("_")}
        if event["object"] == "v2.core.event":
            del shown["data"]
            return shown
        shown["api_version"] = endpoint["api_version"] or shown["api_version"]
        shaped: Object = in_version(self._account, shown, endpoint["api_version"])
        return shaped

    def _finish(self, delivery: Object, outcome: str | None) -> None:
        account = self._account
        account.state.remove("_delivery", delivery["id"])
        event = account.state.get(delivery["event_object"], delivery["event"])
        if event is not None:
            if outcome is None:
                del event["_webhooks"][delivery["endpoint"]]
            else:
                event["_webhooks"][delivery["endpoint"]] = outcome
            outcomes = list(event["_webhooks"].values())
            if event["object"] == "event":
                event["pending_webhooks"] = outcomes.count("pending")
            account.state.put(event)
            if event["type"] == "invoice.created" and all(outcome == "succeeded" for outcome in outcomes):
                invoicing.acknowledge(account, event)
        self._pulse()
