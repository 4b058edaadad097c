"""One run: the business opens, clients work while faults strike, everything comes back by itself, and is checked."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tallystick.notifications.delivery import deliver_notifications
from tallystick.resources import Resources, open_resources
from tallystick.usage.delivery import deliver_all, lease
from tallystick.usage.drain import drain
from tallystick.usage.late import check_finalized
from tallystick.usage.sealing import answer_seal_requests, seal_due
from tallystick.webhooks.refresh import refresh_mirror
from tests.faults.business import Business, open_business, read_invoices
from tests.faults.checks import (
    Findings,
    check_access,
    check_states,
    check_stripe,
    check_usage,
    check_webhooks,
    count_waiting,
)
from tests.faults.clients import ANSWER_SECONDS, Book, Product, Reader, Subscribers
from tests.faults.machine import Machine, make_key, open_machine
from tests.faults.schedule import Fault, Injector
from tests.serving import serve

PRODUCTS = 4
# Faults that go on at the same time, of different parts.
LANES = 2
# Fewer of them, and whoever asks for ten minutes has not seen two hundred.
FAULTS_A_MINUTE = 20
# Until everything is well again after the last fault. The longest that may have to be waited for by itself: a lease of
# a delivery, or a retry that has backed off some times.
PATIENCE_SECONDS = 420

Step = Callable[[str, float], None]


@dataclass
class Result:
    """What a run came to. `fault_seconds`: how long of its `seconds` faults were brought."""

    seed: int
    seconds: float
    fault_seconds: float
    injector: Injector
    book: Book
    findings: Findings
    settled_seconds: float

    @property
    def holds(self) -> bool:
        """Whether every invariant holds and every fault could be brought and taken back."""
        return self.findings.good and not self.injector.errors

    @property
    def shortcomings(self) -> list[str]:
        """Why the run proves too little, if it does: nothing was at stake, or not enough went wrong."""
        faults, least = sum(self.injector.injected.values()), round(FAULTS_A_MINUTE * self.fault_seconds / 60)
        found = {
            "no event was accepted": not self.findings.accepted,
            "no webhook was acknowledged": not self.findings.webhooks_acknowledged,
            f"{faults} faults met something: at least {max(1, least)} are needed": faults < max(1, least),
        }
        return [shortcoming for shortcoming, applies in found.items() if applies]

    @property
    def verdict(self) -> str:
        """`good`; `broken`: something does not hold; `poor`: all holds, and it proves too little."""
        if not self.holds:
            return "broken"
        return "poor" if self.shortcomings else "good"

    def as_json(self) -> dict[str, Any]:
        """The report."""
        injector, findings = self.injector, self.findings
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "faults": sum(injector.injected.values()),
            "faults_by_kind": dict(sorted(injector.injected.items())),
            "met_nothing": dict(sorted(injector.met_nothing.items())),
            "events": {
                "accepted": findings.accepted,
                "lost": len(findings.lost),
                "doubled": len(findings.doubled),
                "retries": self.book.retries,
            },
            "webhooks": {
                "events": findings.webhooks_sent,
                "acknowledged": findings.webhooks_acknowledged,
                "lost": len(findings.webhooks_lost),
            },
            "seconds_until_accepted": _spread(injector.until_accepted),
            "seconds_until_well": _spread(injector.until_well),
            "seconds_until_settled": round(self.settled_seconds, 1),
            "answers": dict(sorted(self.book.answers.items())),
            "broken": findings.broken[:50],
            "lost": [list(key) for key in findings.lost[:20]],
            "doubled": [list(key) for key in findings.doubled[:20]],
            "webhooks_lost": findings.webhooks_lost[:20],
            "errors": injector.errors,
            "shortcomings": self.shortcomings,
            "verdict": self.verdict,
        }


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": round(median(times), 2), "max": round(max(times), 2)} if times else {}


@dataclass
class Told:
    """Who was last told what: a product's endpoint for notifications."""

    access: dict[str, dict[str, Any]]

    async def receive(self, request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ClientDisconnect:  # killed in the middle of telling; it tells it again
            return Response(status_code=400)
        if body["type"] == "access.changed":
            self.access[body["data"]["customer"]] = body["data"]
        return Response(status_code=204)


async def run_faults(
    folder: Path, faults: Iterator[Fault], *, seconds: float, seed: int, hurry: bool = False, step: Step | None = None
) -> Result:
    """Bring faults until they end, or for so many seconds; then wait for everything and check it.

    `hurry`: at the end do at once what the workers would do in the next minutes, for a run that must be short; without
    it nothing is done but waiting. `step(text, part done)` is called as it goes on.
    """
    report = step or (lambda text, done: None)
    told = Told({})
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(
            serve(Starlette(routes=[Route("/", told.receive, methods=["POST"])]))
        )
        report("starting", 0)
        machine = await stack.enter_async_context(open_machine(folder, notify=f"{receiver}/"))
        resources = await stack.enter_async_context(
            open_resources(machine.direct_settings(), application_name="faults")
        )
        control = await stack.enter_async_context(httpx.AsyncClient(base_url=machine.stripe_url, timeout=60))
        business = await open_business(resources, control, seconds)
        book = Book()
        injector = Injector(machine, book)
        enough = asyncio.Event()
        chance = random.Random(seed)
        products = [
            Product(
                f"product-{number}",
                await stack.enter_async_context(await _open_client(machine, resources, f"product-{number}")),
                book,
                random.Random(f"{seed} {number}"),
                [customer.ref for customer in business.customers],
                max(customer.since for customer in business.customers),
                enough=enough,
            )
            for number in range(1, PRODUCTS + 1)
        ]
        api = await stack.enter_async_context(await _open_client(machine, resources, "reader"))
        reader = Reader(api, book, [customer.ref for customer in business.customers], enough)
        people = Subscribers(resources.stripe, chance, business.seat_price, enough)
        await machine.set_webhook_options(duplicate_probability="0.2")
        await _wait_until(lambda: _is_known(api, business), "the customers are not known after their webhooks")

        working = [asyncio.create_task(work()) for work in (*(p.work for p in products), reader.work, people.work)]
        try:
            started = monotonic()
            until = started + seconds
            lanes = [asyncio.create_task(injector.run_lane(faults, until)) for _ in range(LANES)]
            while not all(lane.done() for lane in lanes):
                report(_describe(injector, book), min(0.9, (monotonic() - started) / seconds * 0.9))
                await asyncio.wait(lanes, timeout=0.5)
            await asyncio.gather(*lanes)
            report("waiting for all to come back", 0.9)
            ended = monotonic()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await injector.watched()
                enough.set()
                await asyncio.gather(*working)
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        findings = Findings()
        await _bill(resources, control, business, findings, report, hurry=hurry)
        settled = monotonic() - ended
        report("checking", 0.98)
        await _check(resources, control, api, business, book, told, findings)
        machine.note_ended()
        for ended_part in machine.ended_by_themselves:
            findings.fail("processes", f"ended by itself: {ended_part}")
        for wrong in book.wrong:
            findings.fail("answers", wrong)
        return Result(seed, monotonic() - started, ended - started, injector, book, findings, settled)


def _describe(injector: Injector, book: Book) -> str:
    return f"{sum(injector.injected.values())} faults, {len(book.told)} events accepted, {book.retries} retries"


async def _open_client(machine: Machine, resources: Resources, source: str) -> httpx.AsyncClient:
    key = await make_key(resources, source)
    return httpx.AsyncClient(
        base_url=machine.api_url, headers={"Authorization": f"Bearer {key}"}, timeout=ANSWER_SECONDS, trust_env=False
    )


async def _is_known(api: httpx.AsyncClient, business: Business) -> bool:
    answers = [await api.get(f"/v1/customers/{customer.ref}/access") for customer in business.customers]
    return all(answer.status_code == 200 and answer.json()["access"] == "active" for answer in answers)


async def _wait_until(condition: Callable[[], Any], otherwise: str, seconds: float = 60) -> None:
    deadline = monotonic() + seconds
    while not await condition():
        if monotonic() > deadline:
            raise TimeoutError(otherwise)
        await asyncio.sleep(0.1)


async def _bill(
    resources: Resources,
    control: httpx.AsyncClient,
    business: Business,
    findings: Findings,
    report: Step,
    *,
    hurry: bool,
) -> None:
    """Wait until nothing waits, let the last periods end, wait, let the invoices become final, and wait again."""
    # A total of a period that has ended must be at Stripe before its draft becomes final, which the clock brings about.
    end_of_time = datetime.max.replace(tzinfo=UTC)
    for name, ended_by, to in (
        ("sending what is due", datetime.now(UTC), business.ends),
        ("billing the last period", end_of_time, business.ends + timedelta(hours=3)),
        ("telling of the last invoices", end_of_time, None),
    ):
        waiting: dict[str, int] = {}

        async def nothing_waits(ended_by: datetime = ended_by, name: str = name) -> bool:
            nonlocal waiting
            if hurry:
                await catch_up(resources)
            # Webhooks first: what arrives after this question may leave more that waits.
            pending = (await control.get("/_fake/deliveries")).json()["pending"]
            waiting = await count_waiting(resources, ended_by) | ({"webhooks": len(pending)} if pending else {})
            report(f"{name}: {', '.join(f'{n} {kind}' for kind, n in waiting.items()) or 'done'}", 0.95)
            return not waiting

        try:
            await _wait_until(nothing_waits, name, PATIENCE_SECONDS)
        except TimeoutError:
            findings.fail("I7", f"after {PATIENCE_SECONDS} s there still wait: {waiting}")
            return
        if to is not None:
            await control.post("/_fake/clock", json={"to": int(to.timestamp()), "settle_seconds": 20})


async def catch_up(resources: Resources) -> None:
    """What the workers do in the next minutes: take over what was left behind, and try again what was put off."""
    now = datetime.now(UTC)
    later = now + lease(resources.settings) + timedelta(hours=1)
    await drain(resources, now, reclaim_after=timedelta(0))
    await seal_due(resources, now + timedelta(minutes=2))
    await answer_seal_requests(resources, now)
    await deliver_all(resources, later)
    await refresh_mirror(resources, later)
    await check_finalized(resources, now)
    await deliver_notifications(resources, later)


async def _check(
    resources: Resources,
    control: httpx.AsyncClient,
    api: httpx.AsyncClient,
    business: Business,
    book: Book,
    told: Told,
    findings: Findings,
) -> None:
    await read_invoices(resources.stripe, business)
    await check_usage(resources, book, findings)
    await check_stripe(resources, control, business, findings, invoices=True)
    page = await resources.stripe.v1.events.list_async({"limit": 100})
    await check_webhooks(resources, [event async for event in page.auto_paging_iter()], findings)
    await check_states(resources, findings)
    # The last notification may still be on its way when its row is settled by another worker.
    await check_access(resources, api, told.access, findings)
