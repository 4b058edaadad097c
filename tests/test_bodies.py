"""What bodies may hold of a process's memory while they are arriving."""

import asyncio

import pytest

from tallystick import app as application
from tallystick.resources import Resources
from tests.conftest import open_client
from tests.slow import SlowBody, started
from tests.usage.making import METER, make_customer, make_meter
from tests.webhooks.stripe_events import customer, event, post

EVENT = {"id": "e1", "customer": "acme", "meter": METER}


@pytest.mark.parametrize(
    ("share", "path"),
    [
        ("ARRIVING_WEBHOOK_BYTES", "/webhooks/stripe"),
        ("ARRIVING_USAGE_BYTES", "/v1/usage"),
        ("ARRIVING_JSON_BYTES", "/v1/access"),
    ],
)
async def test_what_is_arriving_has_a_limit_and_nobody_uses_up_another_s_share(
    share: str, path: str, resources: Resources, api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, share, 80_030)  # hardly more than what is begun below
    await make_customer(resources)
    await make_meter(resources)
    bodies = [SlowBody(b" " * 40_000, b"{}") for _ in range(2)]
    async with asyncio.timeout(10), started(resources) as app, open_client(app, api_key) as client:
        slow = [asyncio.create_task(client.post(path, content=body)) for body in bodies]
        for body in bodies:
            await body.half_is_read.wait()

        over = await client.post(path, content=SlowBody(b" " * 40_000, b"{}"))
        complete = [
            await post(client, event("customer.created", customer())),
            await client.post("/v1/usage", json=EVENT),
            await client.post("/v1/access", json={"customers": ["acme"]}),
        ]
        for body in bodies:
            body.go_on.set()
        ended = await asyncio.gather(*slow)
        again = SlowBody(b" " * 40_000, b"{}")
        again.go_on.set()
        after = await client.post(path, content=again)

    assert (over.status_code, over.headers.get("retry-after")) == (503, "1")
    assert [answer.status_code for answer in complete] == [200, 202, 200]
    assert {answer.status_code for answer in (*ended, after)} <= {400, 415, 422}
