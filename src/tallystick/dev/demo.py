"""`tallystick demo`: a month of business on real parts, and the proof at its end.

    1. a plan with a metered price, customers whose periods begin at odd seconds
    2. four weeks of usage over HTTP: repeated, late, around the period's end; webhooks doubled and out of order;
       PostgreSQL restarted in the middle
    3. the period ends: draft, late usage while it is open, finalization
    4. some payments fail (restricted); those customers pay in the portal (active again)
    5. the table: what was accepted against what was invoiced, customer by customer

What was accepted is counted here, from the answers that the API gave, and not asked of tallystick afterwards.
"""

import asyncio
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from stripe import StripeClient

from tallystick import db
from tallystick.dev.catalogue import METER, create_plan
from tallystick.dev.report import Customer, Report
from tallystick.dev.stack import Stack, StackError, make_development_key, open_stack, settle
from tallystick.resources import Resources, open_resources
from tallystick.usage.conservation import count_conservation
from tallystick.usage.events import plain

# A month has no fewer; the usage of its last days is that around its end.
DAYS = 27
EVENTS_A_DAY = 6
EVENTS_A_REQUEST = 100
# Every third customer's card is declined at first.
DECLINED_EVERY = 3
# The month must lie within the 34 days for which usage is taken, and its end far enough back for an hour of draft.
ENDED_AGO = timedelta(hours=8)
# What waits for a loop of the worker (every second or five) or for a restarted PostgreSQL waits at most this long.
PATIENCE_SECONDS = 90


@dataclass
class Month:
    """What the steps share."""

    random: random.Random
    stack: Stack
    resources: Resources
    api: httpx.AsyncClient
    control: httpx.AsyncClient
    customers: list[Customer]
    start: datetime
    posted: int = 0
    repeats: int = 0
    sequence: int = 0

    @property
    def stripe(self) -> StripeClient:
        return self.resources.stripe


async def play_month(*, seed: int, customers: int, console: Console) -> Report:
    """Play the month on a stack of its own in a temporary folder. Raises `StackError` when a part does not start."""
    data = Path(tempfile.mkdtemp(prefix="tallystick-demo-"))
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
    )
    try:
        async with open_stack(data, ports={"api": 0, "fake-stripe": 0}, console=console, embedded_only=True) as stack:
            key = await make_development_key(stack)
            headers = {"Authorization": f"Bearer {key}"}
            with bars:
                bar = bars.add_task("a month of business", total=DAYS + 10)
                async with (
                    open_resources(stack.settings(), application_name="tallystick demo") as resources,
                    httpx.AsyncClient(base_url=stack.api_url, headers=headers, timeout=30) as api,
                    httpx.AsyncClient(base_url=stack.stripe_url, timeout=60) as control,
                ):
                    chance = random.Random(seed)
                    month = Month(
                        chance, stack, resources, api, control, _name_customers(customers), _choose_start(chance)
                    )
                    return await _play(month, bars, bar)
    finally:
        shutil.rmtree(data, ignore_errors=True)


def _name_customers(number: int) -> list[Customer]:
    return [Customer(f"customer-{n:02}", declined=n % DECLINED_EVERY == 0) for n in range(1, number + 1)]


def _choose_start(chance: random.Random) -> datetime:
    """An odd second about a month ago."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - ENDED_AGO
    return end - timedelta(days=31) + timedelta(seconds=chance.randrange(600, 1800))


async def _play(month: Month, bars: Progress, bar: TaskID) -> Report:
    def step(description: str, advance: int = 1) -> None:
        bars.update(bar, description=description, advance=advance)

    step("a plan and customers")
    await _make_business(month)
    await _wait_until_known(month)
    await _note_access(month)

    for day in range(DAYS):
        step(f"day {day + 1}: usage")
        posting = _post_day(month, day)
        if day == DAYS // 2:
            assert month.stack.postgres is not None
            await asyncio.gather(posting, asyncio.to_thread(month.stack.postgres.restart), _touch_customers(month))
        else:
            await posting

    step("the period ends: draft invoices")
    await _post_around_the_end(month)
    await _move_clock(month, max(customer.period_end for customer in month.customers) + timedelta(minutes=5))
    await _post_late(month)
    step("sending what came late", 2)
    await _wait_until_sent(month)
    step("finalization and payment", 2)
    await _move_clock(month, max(customer.period_end for customer in month.customers) + timedelta(hours=3))
    await settle(month.stack)
    await _note_access(month)
    step("declined customers pay in the portal", 2)
    await _pay_in_portal(month)
    await settle(month.stack)
    await _note_access(month)
    step("laying both halves together", 2)
    return await _compare(month)


async def _make_business(month: Month) -> None:
    """The plan, and each customer's subscription at its own odd second of the fake clock."""
    await month.control.post("/_fake/clock", json={"to": int(month.start.timestamp()) - 3600, "frozen": True})
    await month.control.post("/_fake/webhooks", json={"duplicate_probability": "0.5", "shuffle": True})
    price = await create_plan(month.stripe)
    for number, customer in enumerate(month.customers):
        begins = month.start + timedelta(seconds=number * 61 + month.random.randrange(60))
        await _move_clock(month, begins)
        made = await month.stripe.v1.customers.create_async(
            {"name": customer.ref, "metadata": {month.resources.settings.customer_reference_key: customer.ref}}
        )
        card = "pm_card_chargeCustomerFail" if customer.declined else "pm_card_visa"
        method = await month.stripe.v1.payment_methods.attach_async(card, {"customer": made.id})
        await month.stripe.v1.customers.update_async(
            made.id, {"invoice_settings": {"default_payment_method": method.id}}
        )
        subscription = await month.stripe.v1.subscriptions.create_async(
            {"customer": made.id, "items": [{"price": price}]}
        )
        item = subscription.to_dict(for_json=True)["items"]["data"][0]
        customer.id, customer.subscription = made.id, subscription.id
        customer.period_start = datetime.fromtimestamp(item["current_period_start"], UTC)
        customer.period_end = datetime.fromtimestamp(item["current_period_end"], UTC)


async def _wait_until_known(month: Month) -> None:
    await settle(month.stack)
    for customer in month.customers:
        answer = await month.api.get(f"/v1/customers/{customer.ref}/access")
        if answer.status_code != 200:
            raise StackError(f"{customer.ref} is not known after its webhooks: {answer.text}")


async def _post_day(month: Month, day: int) -> None:
    """A day's usage: several uses an hour, some told a second time, some told days late."""
    noon = month.start + timedelta(days=day, hours=month.random.randrange(1, 20))
    await _move_clock(month, noon + timedelta(hours=2))
    events = []
    for customer in month.customers:
        hour = noon + timedelta(minutes=month.random.randrange(60))
        for _ in range(EVENTS_A_DAY):
            at = hour + timedelta(milliseconds=month.random.randrange(1_800_000))
            if month.random.random() < 0.1:
                at -= timedelta(days=month.random.randrange(3), minutes=month.random.randrange(60))
            events.append((customer, max(at, customer.period_start)))
    await _post(month, events)


async def _post_around_the_end(month: Month) -> None:
    """Uses in the last second, at the very end (which belongs to the next period) and after it, in one hour."""
    await _move_clock(month, min(customer.period_end for customer in month.customers) - timedelta(minutes=10))
    last = [(customer, customer.period_end - timedelta(minutes=11)) for customer in month.customers]
    await _post(month, last)
    await _move_clock(month, max(customer.period_end for customer in month.customers) + timedelta(minutes=1))
    around = []
    for customer in month.customers:
        around += [
            (customer, customer.period_end - timedelta(milliseconds=1)),
            (customer, customer.period_end),
            (customer, customer.period_end + timedelta(seconds=month.random.randrange(1, 60))),
        ]
    await _post(month, around)


async def _post_late(month: Month) -> None:
    """Usage of the period that has ended, while its invoice is still a draft."""
    late = [
        (customer, customer.period_end - timedelta(hours=month.random.randrange(1, 48), milliseconds=1))
        for customer in month.customers
        for _ in range(3)
    ]
    await _post(month, late)


async def _post(month: Month, uses: Iterable[tuple[Customer, datetime]]) -> None:
    """Post uses in shuffled requests, one event in eight twice, and count what the API says it accepted."""
    sent: dict[str, tuple[Customer, datetime, Decimal]] = {}
    bodies = []
    for customer, at in uses:
        month.sequence += 1
        value = Decimal(month.random.randrange(1, 10**6)).scaleb(-month.random.randrange(5))
        event_id = f"use-{month.sequence}"
        sent[event_id] = (customer, at, value)
        body = {
            "id": event_id,
            "customer": customer.ref,
            "meter": METER,
            "value": plain(value),
            "timestamp": at.isoformat(),
        }
        bodies += [body] * (2 if month.random.random() < 0.125 else 1)
    month.random.shuffle(bodies)
    accepted: set[str] = set()
    for first in range(0, len(bodies), EVENTS_A_REQUEST):
        batch = bodies[first : first + EVENTS_A_REQUEST]
        answer = await _post_patiently(month.api, batch)
        month.posted += len(batch)
        month.repeats += answer["duplicates"]
        assert not answer["rejected"], answer["rejected"]
        accepted |= {str(body["id"]) for body in batch}
    for event_id in accepted:
        customer, at, value = sent[event_id]
        if customer.period_start <= at < customer.period_end:
            customer.accepted += value


async def _post_patiently(api: httpx.AsyncClient, batch: list[dict[str, str]]) -> dict[str, int]:
    """As a good client does it: after a 429, a 5xx or no answer, the same events again."""
    for _ in range(PATIENCE_SECONDS * 2):
        try:
            answer = await api.post("/v1/usage", json=batch)
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code in (202, 422):
            result: dict[str, int] = answer.json()
            return result
        await asyncio.sleep(0.5)
    raise StackError("usage was not taken for too long")


async def _touch_customers(month: Month) -> None:
    """Webhooks for a PostgreSQL that is not there: answered 500, sent again by Stripe."""
    for customer in month.customers[:5]:
        await month.stripe.v1.customers.update_async(customer.id, {"metadata": {"seen": "in the middle"}})


async def _move_clock(month: Month, to: datetime) -> None:
    (await month.control.post("/_fake/clock", json={"to": int(to.timestamp())})).raise_for_status()


async def _wait_until_sent(month: Month) -> None:
    """Until the worker has told Stripe everything that was accepted."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            async with db.transaction(month.resources.engine) as connection:
                counted = await count_conservation(connection)
            if counted.unsent_events == 0 and counted.events == month.sequence:
                return
            await asyncio.sleep(0.2)


async def _note_access(month: Month) -> None:
    for customer in month.customers:
        answer = await month.api.get(f"/v1/customers/{customer.ref}/access")
        customer.access.append(answer.json()["access"])


async def _pay_in_portal(month: Month) -> None:
    """What the restricted customer's browser does: ask for the portal, open it, press the button."""
    async with httpx.AsyncClient(timeout=30, follow_redirects=True) as browser:
        for customer in month.customers:
            if customer.declined:
                session = await month.api.post("/v1/portal/sessions", json={"customer": customer.ref})
                url = session.json()["url"]
                (await browser.get(url)).raise_for_status()
                (await browser.post(url)).raise_for_status()


async def _compare(month: Month) -> Report:
    """Ask both sides: tallystick for the period's usage, Stripe for the invoice's quantity."""
    for customer in month.customers:
        answer = await month.api.get(
            "/v1/usage",
            params={
                "customer": customer.ref,
                "meter": METER,
                "from": customer.period_start.isoformat(),
                "to": customer.period_end.isoformat(),
            },
        )
        customer.counted = sum((Decimal(row["quantity"]) for row in answer.json()["data"]), Decimal(0))
        invoices = await month.stripe.v1.invoices.list_async({"customer": customer.id, "limit": 100})
        for invoice in invoices.data:
            for line in invoice.lines.data:
                period = (line.period.start, line.period.end)
                wanted = (int(customer.period_start.timestamp()), int(customer.period_end.timestamp()))
                if period == wanted and line.quantity_decimal is not None and invoice.status == "paid":
                    customer.invoiced = (customer.invoiced or Decimal(0)) + line.quantity_decimal
    async with db.transaction(month.resources.engine) as connection:
        conserved = (await count_conservation(connection)).difference == 0
    metrics = (await month.api.get("/metrics")).text
    verdicts = {
        sample.labels["verdict"]: int(sample.value)
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "tallystick_webhook_events_total"
    }
    return Report(
        month.customers, month.posted, month.repeats, sum(verdicts.values()), verdicts.get("duplicate", 0), conserved
    )
