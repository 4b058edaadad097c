"""Several endpoints, each with its own secrets, mode and account; and connected accounts kept apart."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import generate_latest
from pydantic import SecretStr

from tallystick import rules
from tallystick.config import Settings
from tallystick.metrics import REGISTRY
from tallystick.resources import Resources
from tallystick.webhooks.verification import fingerprint
from tests.conftest import WEBHOOK_SECRET
from tests.webhooks.stripe_events import (
    customer,
    deliver,
    event,
    invoice,
    meter,
    post,
    price,
    read,
    read_access,
    sign,
    subscription,
)

ONE, ALL, NEW, OLD = (f"whsec_{name}_0123456789" for name in ("one", "all", "new", "old"))
TO_ONE, TO_ALL = "/webhooks/stripe/one", "/webhooks/stripe/all"
RULES = f"""
    [webhooks.one]
    secrets = ["{ONE}"]
    livemode = false
    account = "acct_1"

    [webhooks.all]
    secrets = ["{ALL}"]
    livemode = false
    account = "*"

    [webhooks.live]
    secrets = ["{NEW}"]
    livemode = true

    [webhooks.rolled]
    secrets = ["{NEW}", "{OLD}"]
    livemode = false
"""


@pytest.fixture
def rules_file(tmp_path: Path) -> Path:
    file = tmp_path / "rules.toml"
    file.write_text(RULES)
    return file


@pytest.fixture
def settings(settings: Settings, rules_file: Path) -> Settings:
    return settings.model_copy(update={"rules_file": rules_file})


def counted(endpoint: str, secret: str) -> float:
    name = f'tallystick_webhook_secrets_total{{endpoint="{endpoint}",secret="{fingerprint(SecretStr(secret))}"}} '
    lines = generate_latest(REGISTRY).decode().splitlines()
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


async def problem_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].removeprefix("urn:tallystick:problem:")


async def test_each_endpoint_has_its_own_secrets(client: httpx.AsyncClient, resources: Resources) -> None:
    sent = event("customer.created", customer())
    body = json.dumps(sent)
    for path, secret in (("/webhooks/stripe", NEW), ("/webhooks/stripe/rolled", WEBHOOK_SECRET), (TO_ONE, ALL)):
        answer = await client.post(path, content=body, headers=sign(body, secret=secret))
        assert await problem_of(answer) == (400, "webhook-signature-invalid")
    assert await read(resources, "SELECT * FROM stripe_events") == []

    assert (await post(client, sent, "/webhooks/stripe/rolled", secret=OLD)).json() == {"verdict": "applied"}
    # The same event at another endpoint of ours is still the same event.
    assert (await post(client, sent)).json() == {"verdict": "duplicate"}


async def test_an_endpoint_that_nobody_set_up(client: httpx.AsyncClient) -> None:
    answer = await post(client, event("customer.created", customer()), "/webhooks/stripe/nobody")

    assert await problem_of(answer) == (404, "webhook-endpoint-unknown")


async def test_the_metric_says_which_secret_matched_and_no_secret(client: httpx.AsyncClient) -> None:
    before = counted("rolled", NEW), counted("rolled", OLD), counted("default", WEBHOOK_SECRET)
    for secret in (NEW, NEW, OLD):
        await post(client, event("customer.created", customer()), "/webhooks/stripe/rolled", secret=secret)
    await post(client, event("customer.created", customer()))
    forged = json.dumps(event("customer.created", customer()))
    await client.post("/webhooks/stripe/rolled", content=forged, headers=sign(forged, secret="whsec_forged"))

    after = counted("rolled", NEW), counted("rolled", OLD), counted("default", WEBHOOK_SECRET)
    assert [later - earlier for earlier, later in zip(before, after, strict=True)] == [2, 1, 1]
    shown = generate_latest(REGISTRY).decode()
    assert not [secret for secret in (NEW, OLD, WEBHOOK_SECRET) if secret in shown or secret[6:] in shown]


@pytest.mark.parametrize("endpoint", ["default", "rolled"])
async def test_secrets_are_rolled_without_a_restart(
    client: httpx.AsyncClient, rules_file: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(rules, "REREAD_EVERY", timedelta(0))
    path = "/webhooks/stripe" if endpoint == "default" else f"/webhooks/stripe/{endpoint}"
    fresh = "whsec_fresh_0123456789"

    async def status(secret: str) -> int:
        return (await post(client, event("customer.created", customer()), path, secret=secret)).status_code

    first = WEBHOOK_SECRET if endpoint == "default" else OLD
    assert (await status(first), await status(fresh)) == (200, 400)

    for secrets, expected in (([fresh, first], (200, 200)), ([fresh], (400, 200))):
        rules_file.write_text(f"[webhooks.{endpoint}]\nsecrets = {json.dumps(secrets)}\nlivemode = false\n")
        # Two changes within one tick of the file system's clock would look like one.
        changed_at = rules_file.stat().st_mtime_ns + len(secrets) * 1_000_000
        os.utime(rules_file, ns=(changed_at, changed_at))
        assert (await status(first), await status(fresh)) == expected


Sent = Callable[[], dict[str, Any]]


def of(account: str | None, **changed: Any) -> Sent:
    return lambda: event("customer.created", customer(), account=account, **changed)


@pytest.mark.parametrize(
    ("path", "secret", "sent", "expected"),
    [
        ("/webhooks/stripe", WEBHOOK_SECRET, of(None), (200, "applied")),
        ("/webhooks/stripe", WEBHOOK_SECRET, of("acct_1"), (400, "webhook-account-not-served")),
        ("/webhooks/stripe", WEBHOOK_SECRET, of(None, livemode=True), (400, "webhook-wrong-mode")),
        (TO_ONE, ONE, of("acct_1"), (200, "applied")),
        (TO_ONE, ONE, of("acct_2"), (200, "not_served")),
        (TO_ONE, ONE, of("acct_1", livemode=True), (200, "not_served")),
        (TO_ONE, ONE, of(None), (400, "webhook-account-not-served")),
        (TO_ALL, ALL, of("acct_2"), (200, "applied")),
        (TO_ALL, ALL, of("acct_2", livemode=True), (200, "not_served")),
        (TO_ALL, ALL, of(None), (400, "webhook-account-not-served")),
        ("/webhooks/stripe/live", NEW, of(None, livemode=True), (400, "webhook-wrong-mode")),
        ("/webhooks/stripe/live", NEW, of(None), (400, "webhook-wrong-mode")),
        (TO_ALL, ALL, of("acct_\x00"), (400, "webhook-body-invalid")),
    ],
)
async def test_whose_events_an_endpoint_takes(
    client: httpx.AsyncClient, resources: Resources, path: str, secret: str, sent: Sent, expected: tuple[int, str]
) -> None:
    answer = await post(client, sent(), path, secret=secret)

    if answer.status_code == 200:
        assert (200, answer.json()["verdict"]) == expected
    else:
        assert await problem_of(answer) == expected
    recorded = await read(resources, "SELECT account FROM stripe_events")
    assert recorded == ([{"account": sent()["account"] or ""}] if expected == (200, "applied") else [])


async def test_what_one_endpoint_does_not_serve_another_one_still_gets(client: httpx.AsyncClient) -> None:
    """Stripe sends each connected account's event to every endpoint for connected accounts, under one id."""
    sent = event("customer.created", customer(), account="acct_2")

    assert (await post(client, sent, TO_ONE, secret=ONE)).json() == {"verdict": "not_served"}
    assert (await post(client, sent, TO_ALL, secret=ALL)).json() == {"verdict": "applied"}


async def test_connected_accounts_are_kept_apart(client: httpx.AsyncClient, resources: Resources) -> None:
    named = {"metadata": {"tallystick_ref": "acme"}}
    await deliver(client, event("customer.created", customer("cus_own", **named)))
    theirs = [
        event("customer.created", customer("cus_theirs", **named), at=9, account="acct_1"),
        event("customer.subscription.created", subscription(customer="cus_theirs"), account="acct_1"),
        event("invoice.created", invoice(status="draft", customer="cus_theirs"), account="acct_1"),
        event("billing.meter.created", meter(), account="acct_1"),
    ]
    verdicts = [(await post(client, sent, TO_ONE, secret=ONE)).json()["verdict"] for sent in theirs]
    assert verdicts == ["applied", "applied", "applied", "ignored"]

    # The name is ours, their customer goes by its id, and has an access of its own.
    assert (await client.get("/v1/customers/acme")).json()["customer"] == "cus_own"
    assert await read_access(client, "acme") == ("none", "no_subscription", [])
    assert await read_access(client, "cus_theirs") == ("active", "subscription_active", ["price_1"])
    for table in ("subscriptions", "invoices", "prices"):
        assert await read(resources, f"SELECT account FROM {table}") == [{"account": "acct_1"}], table  # noqa: S608
    # Usage is not sent to connected accounts, so nothing is sealed for them, and no meter is theirs.
    assert await read(resources, "SELECT * FROM customer_references WHERE customer = 'cus_theirs'") == []
    assert await read(resources, "SELECT * FROM seal_requests") == []
    assert await read(resources, "SELECT * FROM meters") == []


async def test_a_connected_accounts_customer_that_is_known_from_a_link_only(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    sent = event("customer.subscription.created", subscription(customer="cus_theirs"), account="acct_1")
    await post(client, sent, TO_ONE, secret=ONE)

    assert await read(resources, "SELECT id, account, needs_refresh FROM customers") == [
        {"id": "cus_theirs", "account": "acct_1", "needs_refresh": True}
    ]


@pytest.mark.parametrize("own_first", [True, False])
async def test_an_id_that_two_accounts_have_is_the_own_ones(
    client: httpx.AsyncClient, resources: Resources, own_first: bool
) -> None:
    """People choose the ids of products; whoever has a connected account must not be able to change ours."""
    own = event("product.created", {"id": "gold", "object": "product", "active": True}, at=0)
    theirs = event("product.updated", {"id": "gold", "object": "product", "active": False}, at=9, account="acct_1")
    if own_first:
        await deliver(client, own)
    verdict = (await post(client, theirs, TO_ONE, secret=ONE)).json()["verdict"]
    if not own_first:
        await deliver(client, own)

    assert verdict == ("quarantined" if own_first else "applied")
    assert await read(resources, "SELECT account, active FROM products") == [{"account": "", "active": True}]
    if own_first:
        assert await read(resources, "SELECT verdict, error FROM stripe_events WHERE account = 'acct_1'") == [
            {"verdict": "quarantined", "error": "another account has this id"}
        ]


async def test_a_guess_at_the_account_gives_way_to_what_stripe_says(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await client.put("/v1/customers/acme", json={"customer": "cus_1"})  # it is theirs, which nobody could know
    created = event("customer.created", customer(), account="acct_1")

    assert (await post(client, created, TO_ONE, secret=ONE)).json() == {"verdict": "applied"}

    assert await read(resources, "SELECT account FROM customers") == [{"account": "acct_1"}]
    assert (await client.get("/v1/customers/acme")).status_code == 404


async def test_prices_of_items_belong_to_the_account_of_the_subscription(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources
) -> None:
    sent = event("customer.subscription.created", subscription(), account="acct_1")
    await post(client, sent, TO_ONE, secret=ONE)
    await post(client, event("price.updated", price(), at=1, account="acct_1"), TO_ONE, secret=ONE)

    assert await read(resources, "SELECT account, needs_refresh FROM prices") == [
        {"account": "acct_1", "needs_refresh": False}
    ]
