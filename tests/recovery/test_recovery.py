"""Events that no webhook brought are found in Stripe's list and applied, whatever happens meanwhile."""

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.errors import Unavailable
from tallystick.resources import Resources
from tallystick.webhooks import inbox, reading, recovery
from tallystick.webhooks.failures import FAILURES_BEFORE_QUARANTINE
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.recovery import LISTED_FOR, LISTED_WITHIN, Run, read_recovery, recover
from tallystick.webhooks.sync import sync_mirror
from tallystick.webhooks.translate import HANDLED_TYPES
from tests.conftest import FakeStripe
from tests.recovery.shop import Shop, access_of, differing, open_shop, refresh_all
from tests.waiting import wait_until
from tests.webhooks.stripe_events import let_an_hour_pass, read


class Died(Exception):
    """Stands for the end of a process."""


def now() -> datetime:
    return datetime.now(UTC)


async def change(resources: Resources, statement: str, **parameters: object) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text(statement), parameters)


async def test_a_week_of_silence_is_made_up_for(fake_stripe: FakeStripe, resources: Resources) -> None:
    ten_days_ago = int((now() - timedelta(days=10)).timestamp())
    await fake_stripe.control.post("/_fake/reset", json={"to": ten_days_ago})
    shop = await open_shop(fake_stripe)
    await shop.sign_up("acme")
    _, canceled = await shop.sign_up("gone")
    broke, _ = await shop.sign_up("broke")
    await shop.stripe.client.v1.payment_methods.attach_async("pm_card_chargeCustomerFail", {"customer": broke})
    [card] = (await shop.stripe.client.v1.payment_methods.list_async({"customer": broke, "limit": 1})).data
    await shop.stripe.client.v1.customers.update_async(broke, {"invoice_settings": {"default_payment_method": card.id}})
    await shop.cancel(canceled)
    await shop.control("clock", advance_seconds=8 * 86_400)  # a renewal, which one of them does not pay
    started = now()

    run = await recover(resources, started)

    assert run.done
    assert run.recovered == run.listed > 20
    await refresh_all(resources)
    assert await access_of(resources, "acme") == ("active", "subscription_active")
    assert await access_of(resources, "gone") == ("none", "ended")
    assert await access_of(resources, "broke") == ("restricted", "payment_failed")
    assert await differing(resources) == []
    state = await read_recovery(resources)
    assert state.complete_until == started - LISTED_WITHIN
    assert state.gap_from is None
    verdicts = Counter(row["verdict"] for row in await read(resources, "SELECT verdict FROM stripe_events"))
    # The newest events come first, so those before them are stale.
    assert verdicts.keys() == {"applied", "stale"}

    again = await recover(resources, now())
    assert (again.done, again.recovered) == (True, 0)


async def test_a_pass_that_died_goes_on_after_its_last_page(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_SIZE", 4)
    for name in ("one", "two", "three"):
        await shop.sign_up(name)
    handled = [event for event in await shop.events() if event["type"] in recovery.listed_types()]
    pages: list[Run] = []

    def die_after_two_pages(run: Run) -> None:
        pages.append(run)
        if len(pages) == 2:
            raise Died

    with pytest.raises(Died):
        await recover(resources, now(), report=die_after_two_pages)
    recorded = {row["id"] for row in await read(resources, "SELECT id FROM stripe_events")}
    assert len(recorded) == 8
    assert (await read_recovery(resources)).complete_until is None

    # A process that is killed keeps its lease until it runs out.
    await change(resources, "UPDATE event_recovery SET leased_by = 'dead', leased_until = now() + interval '1 min'")
    assert (await recover(resources, now())).busy
    await change(resources, "UPDATE event_recovery SET leased_until = now()")
    await shop.control("clock", advance_seconds=3600)
    await shop.stripe.client.v1.products.create_async({"name": "Made since the pass began"})
    run = await recover(resources, now())

    # What was left of the interrupted pass, and then a new one, for what has happened since.
    assert (run.done, run.listed) == (True, len(handled) - 8 + len(handled) + 1)
    assert run.recovered == len(handled) - 8 + 1
    recorded = {row["id"] for row in await read(resources, "SELECT id FROM stripe_events")}
    assert len(recorded) == len(handled) + 1
    assert (await read_recovery(resources)).complete_until is not None


async def test_a_pass_that_was_interrupted_long_ago_begins_anew(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_SIZE", 4)
    await shop.sign_up("acme")

    def die(run: Run) -> None:
        raise Died

    at = now()
    with pytest.raises(Died):
        await recover(resources, at, report=die)
    handled = [event for event in await shop.events() if event["type"] in recovery.listed_types()]

    run = await recover(resources, at + timedelta(hours=2))

    assert (run.done, run.listed, run.recovered) == (True, len(handled), len(handled) - 4)


async def test_a_run_ends_in_time_and_the_next_goes_on(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_SIZE", 4)
    await shop.sign_up("acme")
    runs = [await recover(resources, now(), run_for_seconds=0)]
    assert (runs[0].done, runs[0].listed) == (False, 0)

    assert (await recover(resources, now(), run_for_seconds=60)).done


async def test_two_at_once_recover_each_event_once(shop: Shop, resources: Resources) -> None:
    await shop.sign_up("acme")

    runs = await asyncio.gather(*(recover(resources, now()) for _ in range(3)))

    assert sorted((run.busy, run.done) for run in runs) == [(False, True), (True, False), (True, False)]
    events = await read(resources, "SELECT id FROM stripe_events")
    assert sum(run.recovered for run in runs) == len(events) > 0


async def test_who_lost_the_lease_does_not_move_the_cursor(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_SIZE", 4)
    await shop.sign_up("acme")
    await shop.control("faults", kind="slow", method="GET", path="/v1/events", times=None, seconds="0.2")
    slow = asyncio.create_task(recover(resources, now()))

    async def is_at_its_second_page() -> bool:
        return bool(await read(resources, "SELECT 1 FROM event_recovery WHERE pass_cursor IS NOT NULL"))

    await wait_until(is_at_its_second_page)
    await change(resources, "UPDATE event_recovery SET leased_by = 'another', pass_cursor = 'evt_of_another'")

    assert (await slow).busy
    assert await read(resources, "SELECT leased_by, pass_cursor FROM event_recovery") == [
        {"leased_by": "another", "pass_cursor": "evt_of_another"}
    ]


async def test_two_who_read_the_same_page_do_no_harm(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.sign_up("acme")
    await shop.control("faults", kind="slow", method="GET", path="/v1/events", times=None, seconds="0.2")
    lease = recovery._lease
    monkeypatch.setattr(recovery, "_lease", lambda _: timedelta(0))
    first = asyncio.create_task(recover(resources, now()))

    async def has_begun() -> bool:
        return bool(await read(resources, "SELECT 1 FROM event_recovery WHERE pass_started_at IS NOT NULL"))

    await wait_until(has_begun)
    monkeypatch.setattr(recovery, "_lease", lease)
    second = await recover(resources, now())

    assert (second.done, (await first).busy) == (True, True)
    handled = [event["id"] for event in await shop.events() if event["type"] in recovery.listed_types()]
    recorded = [row["id"] for row in await read(resources, "SELECT id FROM stripe_events")]
    assert sorted(recorded) == sorted(handled)
    await refresh_all(resources)
    assert await differing(resources) == []
    assert await read(resources, "SELECT leased_by FROM event_recovery") == [{"leased_by": None}]


async def test_a_lease_outlasts_a_page_that_is_tried_to_the_end(resources: Resources) -> None:
    slow = resources.settings.model_copy(update={"stripe_timeout_seconds": 80})
    reader = Reader(replace(resources, settings=slow))
    assert recovery._lease(reader) > reading.TRIES * timedelta(seconds=80) + timedelta(seconds=30)


async def test_late_webhooks_of_recovered_events_are_duplicates(
    shop: Shop, resources: Resources, webhooks: httpx.AsyncClient
) -> None:
    await shop.control("webhooks", paused=True)
    _, subscription = await shop.sign_up("acme")
    await shop.control("clock", advance_seconds=5)
    await shop.cancel(subscription)

    run = await recover(resources, now())
    assert run.recovered > 0
    await refresh_all(resources)
    before = await read(resources, "SELECT id, verdict FROM stripe_events")
    await shop.control("webhooks", paused=False, shuffle=True)
    await shop.settle()

    after = await read(resources, "SELECT id, verdict FROM stripe_events WHERE verdict <> 'ignored'")
    assert sorted(map(str, after)) == sorted(map(str, before))
    assert await access_of(resources, "acme") == ("none", "ended")
    assert await differing(resources) == []


async def test_live_webhooks_and_recovery_side_by_side_end_in_the_same_mirror(
    shop: Shop, resources: Resources, webhooks: httpx.AsyncClient
) -> None:
    await shop.control("webhooks", shuffle=True, duplicate_probability="0.5")

    async def recover_again_and_again() -> None:
        while not signed_up.is_set():
            await recover(resources, now())

    signed_up = asyncio.Event()
    recovering = asyncio.create_task(recover_again_and_again())
    for name in ("one", "two", "three", "four"):
        _, subscription = await shop.sign_up(name)
        if name in ("two", "four"):
            await shop.cancel(subscription)
    signed_up.set()
    await recovering
    await shop.settle()
    await refresh_all(resources)

    assert await differing(resources) == []
    assert [await access_of(resources, name) for name in ("one", "two")] == [
        ("active", "subscription_active"),
        ("none", "ended"),
    ]


async def test_events_that_are_listed_late_are_still_found(shop: Shop, resources: Resources) -> None:
    await shop.sign_up("acme")
    await recover(resources, now())
    await shop.control("clock", advance_seconds=int(LISTED_WITHIN.total_seconds()) - 30)
    await shop.sign_up("newest")
    assert (await recover(resources, now())).recovered > 0
    # An event that Stripe's list did not show yet in the passes before.
    [late] = await read(resources, "DELETE FROM stripe_events WHERE type = 'price.created' RETURNING id")

    run = await recover(resources, now())

    assert run.recovered == 1
    assert await read(resources, "SELECT id FROM stripe_events WHERE type = 'price.created'") == [late]


async def test_only_what_is_new_is_listed(shop: Shop, resources: Resources) -> None:
    await shop.sign_up("acme")
    await recover(resources, now())
    await shop.control("clock", advance_seconds=3600)
    await shop.sign_up("newest")
    await recover(resources, now())
    handled = [event for event in await shop.events() if event["type"] in recovery.listed_types()]

    run = await recover(resources, now())

    assert 0 < run.listed < len(handled)


async def test_types_that_a_release_adds_are_looked_for_in_the_whole_list(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = HANDLED_TYPES
    without_products = tuple(type_ for type_ in everything if not type_.startswith("product."))
    monkeypatch.setattr(recovery, "HANDLED_TYPES", without_products)
    await recover(resources, now())
    await shop.control("clock", advance_seconds=86_400)
    await shop.sign_up("acme")
    await recover(resources, now())
    assert await read(resources, "SELECT id FROM stripe_events WHERE type LIKE 'product.%'") == []

    monkeypatch.setattr(recovery, "HANDLED_TYPES", everything)
    run = await recover(resources, now())

    assert run.recovered == 1
    assert len(await read(resources, "SELECT id FROM stripe_events WHERE type = 'product.created'")) == 1


async def test_a_gap_is_reported_until_a_sync_has_closed_it(shop: Shop, resources: Resources) -> None:
    at = now()
    await recover(resources, at)
    await recover(resources, at + timedelta(days=29))
    assert (await read_recovery(resources)).gap_from is None

    await recover(resources, at + timedelta(days=70))

    state = await read_recovery(resources)
    assert state.gap_from == at + timedelta(days=29) - LISTED_WITHIN
    assert state.gap_until == at + timedelta(days=70) - LISTED_FOR
    await recover(resources, at + timedelta(days=71))
    assert (await read_recovery(resources)).gap_from is not None

    await sync_mirror(resources, at + timedelta(days=71))
    assert (await read_recovery(resources)).gap_from is None


async def test_stripe_asks_for_patience_and_gets_it(shop: Shop, resources: Resources) -> None:
    await shop.sign_up("acme")
    for kind in ("rate_limit", "error_500", "drop_before"):
        await shop.control("faults", kind=kind, method="GET", path="/v1/events", times=1)

    run = await recover(resources, now())

    assert run.done
    assert run.recovered > 0
    faults = (await shop.stripe.control.get("/_fake/faults")).json()["faults"]
    assert [rule["struck"] for rule in faults] == [1, 1, 1]


async def test_an_event_that_we_fail_on_holds_up_no_other_and_ends_in_quarantine(
    shop: Shop, resources: Resources
) -> None:
    customer, _ = await shop.sign_up("bad")
    await shop.sign_up("good")
    # A database that refuses this customer stands for any bug of ours; the constraint is real, and so is the error.
    await change(resources, f"ALTER TABLE customers ADD CONSTRAINT a_bug CHECK (id <> '{customer}')")
    try:
        run = await recover(resources, now())
        assert not run.done
        assert run.failed > 0
        assert await access_of(resources, "good") == ("active", "subscription_active")
        assert (await read_recovery(resources)).complete_until is None

        for _ in range(FAILURES_BEFORE_QUARANTINE - 2):
            await let_an_hour_pass(resources)
            assert (await recover(resources, now())).failed == run.failed
        await let_an_hour_pass(resources)
        assert (await recover(resources, now())).done
        quarantined = await read(resources, "SELECT id FROM stripe_events WHERE verdict = 'quarantined'")
        assert len(quarantined) == run.failed
        assert (await read_recovery(resources)).complete_until is not None
    finally:
        await change(resources, "ALTER TABLE customers DROP CONSTRAINT a_bug")


async def test_a_full_inbox_ends_the_run_and_is_no_failure_of_the_events(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.sign_up("acme")
    monkeypatch.setattr(inbox, "MAX_WAITING", 0)
    with pytest.raises(Unavailable):
        await recover(resources, now())
    monkeypatch.undo()
    assert (await recover(resources, now())).done
