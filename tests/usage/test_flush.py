"""`tallystick flush`: everything sealed and sent, the one beside the other."""

from datetime import UTC, datetime

import pytest

from tallystick import db
from tallystick.resources import Resources, open_resources
from tallystick.usage import sealing
from tallystick.usage.flush import Flushed, flush
from tallystick.usage.ledger import record_events
from tests.conftest import FakeStripe
from tests.usage.making import last_hour, make_customer, make_event, read_all
from tests.usage.test_delivery import make_deliveries, taken_by_stripe

CUSTOMERS = 30


async def test_what_is_sealed_is_sent_while_the_rest_is_being_sealed(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    refs = [f"c{n}" for n in range(CUSTOMERS)]
    async with db.transaction(resources.engine) as connection:
        events = [make_event(ref, at=last_hour(), customer_ref=ref) for ref in refs]
        await record_events(connection, events, accepted_already=True)
    for ref in refs:
        customer = (await fake_stripe.client.v1.customers.create_async({})).id
        await make_customer(resources, ref=ref, customer=customer)
    monkeypatch.setattr(sealing, "TOTALS_PER_TRANSACTION", 1)
    assert await flush(resources, datetime.now(UTC)) == Flushed(CUSTOMERS, CUSTOMERS + 1)
    assert await read_all(resources, "SELECT state, count(*) FROM usage_deliveries GROUP BY state") == [
        ("sent", CUSTOMERS + 1)
    ]
    assert len({identifier for identifier, _ in await taken_by_stripe(fake_stripe)}) == CUSTOMERS + 1
    beside = "SELECT min(settled_at) < max(created_at) FROM usage_deliveries"
    assert await read_all(resources, beside) == [(True,)]


async def test_a_failure_is_told_as_it_is(resources: Resources) -> None:
    nowhere = resources.settings.model_copy(update={"database_url": "postgresql+asyncpg://nobody@127.0.0.1:1/nothing"})
    async with open_resources(nowhere, application_name="tests") as cut_off:
        with pytest.raises(db.STORAGE_ERRORS):
            await flush(cut_off, datetime.now(UTC))
