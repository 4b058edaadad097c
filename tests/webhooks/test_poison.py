"""What no sender can break: the table of docs/webhooks.md, line by line."""

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tallystick.resources import Resources
from tallystick.webhooks.inbox import MAX_BODY_BYTES
from tests.webhooks.stripe_events import customer, event, meter, post, read, sign, subscription

HEADING = "## What no sender can break"

Sent = tuple[str | bytes | Callable[[], AsyncIterator[bytes]], dict[str, str]]


def read_table() -> dict[str, tuple[int, str]]:
    text = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text().partition(HEADING)[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    return {what.strip(): (int(status), outcome.strip(" `")) for what, status, outcome in rows}


TABLE = read_table()


def signed(body: object, *, at: int | None = None) -> Sent:
    text = body if isinstance(body, str) else json.dumps(body)
    return text, sign(text, at=at)


def good(**changed: Any) -> dict[str, Any]:
    return event("customer.created", customer(), id_="evt_1") | changed


def about(type_: str = "customer.created", **changed: Any) -> Sent:
    return signed(event(type_, customer() | changed))


def seconds_from_now(seconds: int) -> int:
    return int(datetime.now(UTC).timestamp()) + seconds


def of_unknown_length() -> AsyncIterator[bytes]:
    async def send() -> AsyncIterator[bytes]:
        for _ in range(2 * MAX_BODY_BYTES // 65_536):
            yield b" " * 65_536

    return send()


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


CASES: dict[str, Callable[[], Sent]] = {
    "no signature, or a forged one": lambda: (json.dumps(good()), sign("{}")),
    "signed an hour ago": lambda: signed(good(), at=seconds_from_now(-3600)),
    "signed an hour ahead": lambda: signed(good(), at=seconds_from_now(3600)),
    "bytes that are not UTF-8": lambda: (b"\xff\xfe", sign("{}")),
    "signed text that is not JSON": lambda: signed("no JSON"),
    "signed `NaN` in JSON": lambda: signed(json.dumps(good(number=float("nan")))),
    "signed `null`": lambda: signed("null"),
    "a signed list": lambda: signed([good()]),
    "lists nested 100,000 deep": lambda: signed("[" * 100_000 + "]" * 100_000),
    "a number of 5,000 digits": lambda: signed(
        json.dumps(good()).replace('"created": ', '"n": ' + "9" * 5000 + ', "created": ')
    ),
    "an event without an id": lambda: signed(good(id=None)),
    "a NUL byte in the event's id": lambda: signed(good(id="evt_\x00")),
    "half of a surrogate pair in the event's type": lambda: signed(good(type="customer.\ud800")),
    "an event created in the year 30,000,000": lambda: signed(good(created=10**15)),
    "more than 1 MiB": lambda: signed(json.dumps(good()).ljust(MAX_BODY_BYTES + 1)),
    "more than 1 MiB of unknown length": lambda: (of_unknown_length, sign("{}")),
    "an event type that nobody knows": lambda: about("something.new.in.2031"),
    "a known type about another kind of object": lambda: about(object="account"),
    "an object without an id": lambda: about(id=None),
    "an event without an object": lambda: signed(good(data=None)),
    "a NUL byte in a description": lambda: about(description="a\x00b"),
    "half of a surrogate pair in metadata": lambda: about(metadata={"note": "\ud800"}),
    "metadata nested 400 deep": lambda: about(metadata=nested(400)),
    "a NUL byte in the customer's reference": lambda: about(metadata={"tallystick_ref": "a\x00b"}),
    "a card number as the customer's reference": lambda: about(metadata={"tallystick_ref": "4242.4242.4242.4242"}),
    "times that are no times": lambda: signed(
        event("customer.subscription.updated", subscription(cancel_at=10**30, trial_end="soon", start_date=[1]))
    ),
    "a NUL byte in the object's id": lambda: about(id="cus_\x00"),
    "an object whose id has 300 characters": lambda: about(id="cus_" + "1" * 296),
    "a subscription without a customer": lambda: signed(
        event("customer.subscription.updated", subscription(customer=None))
    ),
    "a meter without a name": lambda: signed(event("billing.meter.created", meter(event_name=None))),
}


def test_every_line_of_the_table_is_tested() -> None:
    assert CASES.keys() == TABLE.keys()


@pytest.mark.parametrize("what", CASES)
async def test_poison(client: httpx.AsyncClient, resources: Resources, what: str) -> None:
    status, outcome = TABLE[what]
    body, headers = CASES[what]()

    async def send() -> httpx.Response:
        return await client.post("/webhooks/stripe", content=body() if callable(body) else body, headers=headers)

    answer = await send()

    assert answer.status_code == status, answer.text
    recorded = await read(resources, "SELECT verdict, error FROM stripe_events")
    if status == 200:
        assert answer.json() == {"verdict": outcome}
        assert [row["verdict"] for row in recorded] == [outcome]
        assert bool(recorded[0]["error"]) == (outcome == "quarantined")
        assert (await send()).json() == {"verdict": "duplicate"}
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == f"urn:tallystick:problem:{outcome}"
        assert recorded == []
    # Nothing of it disturbs what comes next.
    assert (await post(client, event("customer.updated", customer("cus_next")))).json() == {"verdict": "applied"}
