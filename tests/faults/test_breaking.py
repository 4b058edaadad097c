"""The harness finds bugs: each of these is put into the product on purpose, and must be seen in what it reports."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.dev.embedded import EmbeddedPostgres, EmbeddedValkey
from tallystick.resources import Resources, open_resources
from tests.faults.business import Business, open_business
from tests.faults.checks import Findings, check_stripe, check_usage, check_webhooks
from tests.faults.clients import Book, Product
from tests.faults.machine import Machine, make_key, open_machine
from tests.faults.run import catch_up
from tests.faults.schedule import Fault, Injector
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(90)


@dataclass
class Scene:
    """A small machine with one client, for one fault."""

    machine: Machine
    resources: Resources
    control: httpx.AsyncClient
    business: Business
    product: Product
    injector: Injector

    @property
    def book(self) -> Book:
        return self.product.book

    async def post(self, batches: int = 1) -> None:
        for _ in range(batches):
            await self.product.post_until_told([self.product.make_use() for _ in range(5)])

    async def strike(self, kind: str, target: str, seconds: float = 0) -> None:
        await self.injector.strike(Fault(kind, target, seconds, 0))
        assert not self.injector.errors

    async def post_during(self, kind: str, target: str, seconds: float, batches: int = 4) -> None:
        """Post while a fault holds; return when it is over and all was accepted."""
        striking = asyncio.create_task(self.strike(kind, target, seconds))
        await asyncio.sleep(0.1)  # the fault has begun
        await asyncio.gather(striking, self.post(batches))

    async def is_read_only(self) -> bool:
        async with db.reading(self.resources.engine) as connection:
            asked = await connection.execute(text("SELECT current_setting('default_transaction_read_only') = 'on'"), {})
        return bool(asked.scalars()[0])

    async def findings(self) -> Findings:
        """What is found once everything has come back and nothing waits."""
        await wait_until(self.machine.is_well)
        found = Findings()
        await catch_up(self.resources)
        await catch_up(self.resources)
        await check_usage(self.resources, self.book, found)
        await check_stripe(self.resources, self.control, self.business, found, invoices=False)
        return found


@asynccontextmanager
async def play(
    folder: Path,
    broken: str | None = None,
    postgres: EmbeddedPostgres | None = None,
    valkey: EmbeddedValkey | None = None,
    workers: int = 0,
) -> AsyncIterator[Scene]:
    settings = {"TALLYSTICK_SEAL_THRESHOLD": "0.001"}
    async with (
        open_machine(
            folder, apis=1, workers=workers, broken=broken, postgres=postgres, valkey=valkey, settings=settings
        ) as machine,
        open_resources(machine.direct_settings(), application_name="faults") as resources,
        httpx.AsyncClient(base_url=machine.stripe_url, timeout=30) as control,
    ):
        key = await make_key(resources, "product-1")
        async with httpx.AsyncClient(
            base_url=machine.api_url, headers={"Authorization": f"Bearer {key}"}, timeout=10
        ) as api:
            business = await open_business(resources, control, 3600)
            book = Book()
            refs = [customer.ref for customer in business.customers]
            product = Product("product-1", api, book, random.Random(1), refs, business.customers[-1].since)
            await control.post("/_fake/settle", json={"timeout_seconds": 20})
            yield Scene(machine, resources, control, business, product, Injector(machine, book))


async def test_without_a_bug_nothing_is_found(tmp_path: Path) -> None:
    async with play(tmp_path, workers=1) as scene:
        await scene.post(4)
        await scene.post_during("lose-answers", "valkey", 0.5)
        await scene.post_during("read-only", "postgres", 1)
        await scene.post_during("stripe-timeout_after", "stripe", 1)
        found = await scene.findings()

    assert found.good, found
    assert found.accepted > 50


async def test_a_valkey_without_its_file_is_noticed_and_nothing_is_lost(tmp_path: Path) -> None:
    class ForgetfulValkey(EmbeddedValkey):
        def _command(self) -> list[str]:
            return [*super()._command(), "--appendonly", "no"]

    async with play(tmp_path, valkey=ForgetfulValkey(tmp_path / "valkey")) as scene:
        await scene.post(4)
        await scene.strike("kill", "valkey")
        found = await scene.findings()

    assert found.good, found


async def test_it_finds_that_commits_are_not_waited_for(tmp_path: Path) -> None:
    # `fsync = off` alone cannot be seen from here: what a killed process has written is kept by the kernel, and only a
    # power cut would lose it. `synchronous_commit = off`, which goes with it, loses what is still in PostgreSQL's own
    # memory when it is killed, up to three times `wal_writer_delay`.
    class HastyPostgres(EmbeddedPostgres):
        def _command(self) -> list[str]:
            return [*super()._command(), "--wal_writer_delay=10s", "--wal_writer_flush_after=1GB"]

    postgres = HastyPostgres(tmp_path / "postgres", durable=False)
    async with play(tmp_path, postgres=postgres) as scene:
        await scene.machine.execute("CHECKPOINT")
        scene.machine.proxies["valkey"].refuse()  # so that the answer depends on PostgreSQL alone
        await scene.post(4)
        await scene.strike("kill", "postgres")
        await scene.machine.proxies["valkey"].accept()
        found = await scene.findings()

    assert found.lost, found


async def test_it_finds_an_acknowledgement_before_the_commit(tmp_path: Path) -> None:
    async with play(tmp_path, broken="acknowledge_first", workers=1) as scene:
        await scene.post(1)
        await scene.post_during("read-only", "postgres", 2)
        found = await scene.findings()

    assert found.lost, found


async def test_it_finds_a_webhook_that_is_answered_before_the_commit(tmp_path: Path) -> None:
    async with play(tmp_path, broken="answer_first") as scene:
        striking = asyncio.create_task(scene.strike("read-only", "postgres", 1.5))
        await wait_until(scene.is_read_only)
        for number in range(5):
            await scene.resources.stripe.v1.customers.create_async({"metadata": {"tallystick_ref": f"new-{number}"}})
        await scene.control.post("/_fake/settle", json={"timeout_seconds": 20})
        await striking
        found = Findings()
        page = await scene.resources.stripe.v1.events.list_async({"limit": 100})
        await check_webhooks(scene.resources, page.data, found)

    assert found.webhooks_lost, found


async def test_it_finds_that_the_unique_key_is_gone(tmp_path: Path) -> None:
    async with play(tmp_path) as scene:
        await scene.post(1)
        await scene.machine.execute(
            "ALTER TABLE usage_events DROP CONSTRAINT usage_events_pkey",
            "ALTER TABLE usage_stamps DROP CONSTRAINT usage_stamps_pkey",
        )
        await scene.post_during("lose-answers", "valkey", 1)
        found = await scene.findings()

    assert found.doubled, found


async def test_it_finds_an_identifier_that_is_new_for_each_try(tmp_path: Path) -> None:
    async with play(tmp_path, broken="random_identifier", workers=1) as scene:
        body = {"kind": "error_500_after", "method": "POST", "path": "/v1/billing/meter_events", "times": 3}
        await scene.control.post("/_fake/faults", json=body)
        await scene.post(2)

        async def retried() -> bool:
            async with db.transaction(scene.resources.engine) as connection:
                return bool(await connection.scalar(text("SELECT max(attempts) > 1 FROM usage_deliveries")))

        await wait_until(retried)
        found = await scene.findings()

    assert any(broken.startswith("I3") for broken in found.broken), found
