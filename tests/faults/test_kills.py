"""Real processes, killed with SIGKILL in mid-work; afterwards everything accepted is at Stripe, and once."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from tallystick.dev.catalogue import CUSTOMERS, METER, create_catalogue
from tallystick.dev.stack import Stack, make_development_key, open_stack, settle
from tallystick.resources import Resources, open_resources
from tallystick.usage.delivery import deliver_all, lease
from tallystick.usage.drain import drain
from tallystick.usage.events import plain
from tallystick.usage.sealing import seal_everything
from tests.usage.making import conservation, read_all

SEED = 11
KILLS = ("worker", "api", "valkey", "postgres", "worker", "valkey", "api", "postgres", "worker", "api")
COMMANDS = {"api": "serve", "worker": "worker"}


class Client:
    """A product service: it posts uses and sends a batch again until it is told that it was accepted."""

    def __init__(self, api: httpx.AsyncClient, chance: random.Random) -> None:
        self.api = api
        self.chance = chance
        self.accepted: dict[str, tuple[str, Decimal]] = {}
        self.made = 0
        self.repeats = 0
        self.enough = asyncio.Event()

    async def post_until_enough(self) -> None:
        while not self.enough.is_set():
            batch = [self.make_use() for _ in range(self.chance.randrange(1, 20))]
            while not await self.try_to_post(batch):
                self.repeats += 1
                await asyncio.sleep(0.02)  # as any client does before it tries again
            self.accepted |= {use["id"]: (use["customer"], Decimal(use["value"])) for use in batch}

    def make_use(self) -> dict[str, str]:
        self.made += 1
        use = {
            "id": f"use-{self.made}",
            "customer": self.chance.choice(CUSTOMERS),
            "meter": METER,
            "value": plain(Decimal(self.chance.randrange(1, 10**6)).scaleb(-3)),
        }
        if self.chance.random() < 0.5:
            use["timestamp"] = (datetime.now(UTC) - timedelta(hours=self.chance.randrange(1, 48))).isoformat()
        return use

    async def try_to_post(self, batch: list[dict[str, str]]) -> bool:
        try:
            answer = await self.api.post("/v1/usage", json=batch)
        except httpx.TransportError:
            return False
        if answer.status_code == 202:
            assert not answer.json()["rejected"], answer.text
            return True
        assert answer.status_code in (429, 500, 503), answer.text
        return False


async def kill_and_start_again(stack: Stack, part: str) -> None:
    server = {"postgres": stack.postgres, "valkey": stack.valkey}.get(part)
    if server is not None:
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        return
    stack.processes[part].kill()
    await stack.processes[part].wait()
    await stack.start_process(part, COMMANDS[part])
    if part == "api":
        await stack.wait_for("api", f"{stack.api_url}/healthz")


async def send_all(resources: Resources) -> None:
    """What the worker would do in the next minutes: take over what was left behind, seal and send it."""
    now = datetime.now(UTC)
    await drain(resources, now, reclaim_after=timedelta(0))
    await seal_everything(resources, now)
    await deliver_all(resources, now + lease(resources.settings) + timedelta(hours=1))


@pytest.mark.timeout(240)
async def test_whatever_is_killed_everything_accepted_is_billed_once(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    async with open_stack(
        tmp_path, ports={"api": 0, "fake-stripe": 0}, console=Console(quiet=True), embedded_only=True
    ) as stack:
        key = await make_development_key(stack)
        await create_catalogue(stack.settings())
        await settle(stack)
        headers = {"Authorization": f"Bearer {key}"}
        async with (
            httpx.AsyncClient(base_url=stack.api_url, headers=headers, timeout=15) as api,
            httpx.AsyncClient(base_url=stack.stripe_url, timeout=60) as control,
            open_resources(stack.settings(), application_name="tests") as resources,
        ):
            client = Client(api, chance)
            assert await client.try_to_post([client.make_use()])  # the API knows key and meter
            client.accepted.clear()
            before = await conservation(resources)
            posting = [asyncio.create_task(client.post_until_enough()) for _ in range(3)]
            customers = []
            for part in KILLS:
                made = await resources.stripe.v1.customers.create_async({"metadata": {"tallystick_ref": part}})
                customers.append(made.id)
                await asyncio.sleep(chance.random() / 4)  # some work, to be killed in the middle of
                await kill_and_start_again(stack, part)
            client.enough.set()
            await asyncio.gather(*posting)

            await send_all(resources)
            await settle(stack)
            counted = await conservation(resources)
            known = {row[0] for row in await read_all(resources, "SELECT id FROM customers")}
            events = (await control.get("/_fake/meter_events")).json()["meter_events"]

    assert client.repeats > 0, "no kill was noticed by the client"
    total = sum((value for _, value in client.accepted.values()), Decimal(0))
    extra = counted.accepted - total  # the first use, which told the API of the meter
    assert counted.events == len(client.accepted) + 1
    assert 0 <= extra <= 1000
    assert before.events <= 1
    assert counted.sent == counted.accepted
    assert sum((Decimal(event["value"]) for event in events), Decimal(0)) == counted.accepted
    assert set(customers) <= known, "a webhook was lost"
