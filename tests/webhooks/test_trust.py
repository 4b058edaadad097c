"""Step 1: nothing is believed, and nothing written, before a body proves to be Stripe's and for us."""

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

import httpx
import pytest
from pydantic import SecretStr

from tallystick.config import Settings
from tallystick.resources import Resources
from tallystick.webhooks.inbox import MAX_BODY_BYTES
from tests.conftest import WEBHOOK_SECRET
from tests.webhooks.stripe_events import customer, event, post, read, sign

OLD_SECRET = "whsec_the_old_one_of_two"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Two secrets, as while one is being rolled."""
    secrets = (SecretStr(WEBHOOK_SECRET), SecretStr(OLD_SECRET))
    return settings.model_copy(update={"stripe_webhook_secret": secrets})


def good(**changed: object) -> str:
    return json.dumps(event("customer.created", customer(), id_="evt_1") | changed)


async def refused(client: httpx.AsyncClient, resources: Resources, body: str | bytes, headers: dict[str, str]) -> str:
    """The kind of problem that a webhook is refused with; it must have left nothing behind."""
    answer = await client.post("/webhooks/stripe", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert await read(resources, "SELECT id FROM stripe_events UNION SELECT id FROM customers") == []
    problem: str = answer.json()["type"]
    return problem.removeprefix("urn:tallystick:problem:")


@pytest.mark.parametrize("secret", [WEBHOOK_SECRET, OLD_SECRET])
async def test_every_secret_is_tried(client: httpx.AsyncClient, secret: str) -> None:
    answer = await client.post("/webhooks/stripe", content=good(), headers=sign(good(), secret=secret))

    assert (answer.status_code, answer.json()) == (200, {"verdict": "applied"})


async def test_one_of_several_signatures_is_enough(client: httpx.AsyncClient) -> None:
    header = sign(good())["Stripe-Signature"].replace(",v1=", ",v1=00ff,v1=") + ",v0=00ff"

    answer = await client.post("/webhooks/stripe", content=good(), headers={"Stripe-Signature": header})

    assert answer.status_code == 200


WRONG_SIGNATURES: dict[str, Callable[[], str | None]] = {
    "no header": lambda: None,
    "an empty header": lambda: "",
    "garbage": lambda: "garbage",
    "nothing in its fields": lambda: "t=,v1=",
    "no number": lambda: "t=soon,v1=00ff",
    "no time": lambda: "v1=00ff",
    "no signature": lambda: "t=1760000000",
    "another secret": lambda: sign(good(), secret="whsec_of_somebody_else")["Stripe-Signature"],
    "another body": lambda: sign("{}")["Stripe-Signature"],
    "a time with a tail": lambda: sign(good())["Stripe-Signature"].replace(",v1=", "=x,v1="),
    "another scheme": lambda: sign(good())["Stripe-Signature"].replace("v1=", "v0="),
}


@pytest.mark.parametrize("header", WRONG_SIGNATURES.values(), ids=WRONG_SIGNATURES.keys())
async def test_a_signature_that_does_not_fit(
    client: httpx.AsyncClient, resources: Resources, header: Callable[[], str | None]
) -> None:
    made = header()
    headers = {} if made is None else {"Stripe-Signature": made}

    assert await refused(client, resources, good(), headers) == "webhook-signature-invalid"


async def test_a_signature_that_is_not_ascii(client: httpx.AsyncClient, resources: Resources) -> None:
    request = client.build_request("POST", "/webhooks/stripe", content=good())
    request.headers = httpx.Headers([(b"stripe-signature", b"t=1760000000,v1=\xff\xfe")])

    answer = await client.send(request)

    assert answer.status_code == 400
    assert answer.json()["type"].endswith("webhook-signature-invalid")


@pytest.mark.parametrize(
    ("seconds", "problem"),
    [(-3600, "webhook-too-old"), (-310, "webhook-too-old"), (310, "webhook-from-the-future")],
)
async def test_a_signature_of_another_time(
    client: httpx.AsyncClient, resources: Resources, seconds: int, problem: str
) -> None:
    signed_at = int(datetime.now(UTC).timestamp()) + seconds

    assert await refused(client, resources, good(), sign(good(), at=signed_at)) == problem


@pytest.mark.parametrize("seconds", [-250, 250])
async def test_a_clock_may_be_off_by_some_minutes(client: httpx.AsyncClient, seconds: int) -> None:
    signed_at = int(datetime.now(UTC).timestamp()) + seconds

    answer = await client.post("/webhooks/stripe", content=good(), headers=sign(good(), at=signed_at))

    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no JSON",
        "null",
        "[]",
        '"event"',
        "1",
        "{}",
        '{"object": "event"}',
        "[" * 100_000 + "]" * 100_000,
        good().replace('"created": ', '"nan": NaN, "created": '),
        good().replace('"created": ', '"huge": ' + "9" * 5000 + ', "created": '),
        good(object="customer"),
        good(id=None),
        good(id=1),
        good(id=""),
        good(id="evt_\x00"),
        good(id="evt_\ud800"),
        good(id="evt_" + "1" * 300),
        good(type=None),
        good(type=["customer.created"]),
        good(created=None),
        good(created="2026-01-01"),
        good(created=True),
        good(created=1.5),
        good(created=-1),
        good(created=10**30),
        good(livemode=None),
        good(livemode=0),
        good(object="v2.core.event", created=1_760_000_000),
        good(object="v2.core.event", created="yesterday"),
        good(object="v2.core.event", created="0001-01-01T00:00:00+14:00"),
        good(object="v2.core.event", created="9999-12-31T23:59:59-14:00"),
        good(object="v2.core.event", created="2026-01-01T00:00:00"),
    ],
    ids=lambda body: body[:40],
)
async def test_a_signed_body_that_is_no_event(client: httpx.AsyncClient, resources: Resources, body: str) -> None:
    assert await refused(client, resources, body, sign(body)) == "webhook-body-invalid"


async def test_a_body_that_is_not_utf_8(client: httpx.AsyncClient, resources: Resources) -> None:
    assert await refused(client, resources, b"\xff\xfe", sign("{}")) == "webhook-body-invalid"


async def test_events_of_the_other_mode_are_refused(client: httpx.AsyncClient, resources: Resources) -> None:
    body = good(livemode=True)

    assert await refused(client, resources, body, sign(body)) == "webhook-wrong-mode"


async def test_events_of_connected_accounts_are_refused(client: httpx.AsyncClient, resources: Resources) -> None:
    body = good(account="acct_1")

    assert await refused(client, resources, body, sign(body)) == "webhook-account-not-served"


async def test_a_body_may_have_one_mebibyte(client: httpx.AsyncClient) -> None:
    largest = good().ljust(MAX_BODY_BYTES)
    assert (await client.post("/webhooks/stripe", content=largest, headers=sign(largest))).status_code == 200

    too_large = largest + " "
    answer = await client.post("/webhooks/stripe", content=too_large, headers=sign(too_large))
    assert answer.status_code == 413


async def test_a_body_of_unknown_length_is_counted_while_it_is_read(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 * MAX_BODY_BYTES:
            sent += 65536
            yield b" " * 65536

    answer = await client.post("/webhooks/stripe", content=endless(), headers=sign("{}"))

    assert answer.status_code == 413


@pytest.mark.parametrize("strange", ["\x00", "\ud800", "𝄞", "x" * 500])
async def test_strange_characters_in_what_we_do_not_need_change_nothing(
    client: httpx.AsyncClient, resources: Resources, strange: str
) -> None:
    sent = event(
        "customer.created", customer(description=strange, metadata={"note": strange, "tallystick_ref": "acme"})
    )

    answer = await post(client, sent)

    assert (answer.status_code, answer.json()) == (200, {"verdict": "applied"})
    assert await read(resources, "SELECT ref FROM customers") == [{"ref": "acme"}]


@pytest.mark.parametrize("strange", ["\x00", "a\x00b", "\ud800", "x" * 101, "", 7, None, ["acme"], {"a": 1}])
async def test_a_reference_that_cannot_be_kept_is_no_reference(
    client: httpx.AsyncClient, resources: Resources, strange: object
) -> None:
    answer = await post(client, event("customer.created", customer(metadata={"tallystick_ref": strange})))

    assert (answer.status_code, answer.json()) == (200, {"verdict": "applied"})
    assert await read(resources, "SELECT ref FROM customers") == [{"ref": None}]


@pytest.mark.parametrize("strange", ["cus_\x00", "cus_\ud800", "cus_" + "1" * 300, 7, ["cus_1"]])
async def test_an_object_whose_id_cannot_be_kept_is_quarantined(
    client: httpx.AsyncClient, resources: Resources, strange: object
) -> None:
    sent = event("customer.created", customer() | {"id": strange})

    answer = await post(client, sent)

    assert (answer.status_code, answer.json()) == (200, {"verdict": "quarantined"})
    assert await read(resources, "SELECT verdict, error FROM stripe_events") == [
        {"verdict": "quarantined", "error": "no usable customer"}
    ]
    assert (await post(client, sent)).json() == {"verdict": "duplicate"}
