"""Step 1 of receiving: which endpoint a request is for, and whether its body is Stripe's, fresh, and meant for it.

`POST /webhooks/stripe` has the secrets of the environment and serves the account of the API key. The rules file adds
`POST /webhooks/stripe/NAME`, each with secrets, a mode and an account of its own. Nothing is written here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NoReturn

import msgspec
import stripe
from prometheus_client import Counter
from pydantic import SecretStr

from tallystick.errors import NotFound, Untrusted
from tallystick.json_faults import explain, refuse_constant
from tallystick.metrics import WEBHOOK_SECRETS
from tallystick.resources import Resources
from tallystick.webhooks.translate import id_of, instant
from tallystick.webhooks.translate import text as usable_text

# The endpoint of the environment's secrets. `[webhooks.default]` in the rules file takes its place, so that its secrets
# can be rolled without a restart too.
DEFAULT = "default"
EVERY_CONNECTED_ACCOUNT = "*"


@dataclass(frozen=True)
class Endpoint:
    """Whose events are taken at one path. `account`: '' the own one, `acct_…` that one, `*` every connected one."""

    name: str
    secrets: tuple[SecretStr, ...]
    livemode: bool
    account: str


@dataclass(frozen=True)
class StripeEvent:
    """An event that was verified: what is recorded of it, and its body, which is not.

    `account` is the connected account that it is about, or '' for the own one.
    """

    id: str
    type: str
    livemode: bool
    api_version: str | None
    object_id: str | None
    created: datetime
    body: Mapping[str, Any]
    account: str = ""


def find_endpoint(resources: Resources, name: str | None, now: datetime) -> Endpoint:
    """The endpoint of this name, or of the plain path for None. Raises `NotFound` (404)."""
    settings, endpoints = resources.settings, resources.rules.current(now).webhooks
    found = endpoints.get(DEFAULT if name is None else name)
    if found is not None:
        return Endpoint(name or DEFAULT, found.secrets, found.livemode, found.account)
    if name is None:
        return Endpoint(DEFAULT, settings.stripe_webhook_secret, settings.livemode, "")
    raise NotFound("The rules file has no webhook endpoint of this name.", type="webhook-endpoint-unknown")


def read_event(raw: bytes, signature: str | None, endpoint: Endpoint, tolerance: int, now: datetime) -> StripeEvent:
    """Verify a body with its `Stripe-Signature` header and read the event from it. Raises `Untrusted` (400).

    It may have been signed `tolerance` seconds ago, or as far ahead.
    """
    try:
        body = raw.decode()
    except UnicodeDecodeError as error:
        _refuse("webhook-body-invalid", f"The body is not UTF-8: byte {error.start + 1} is none of it.")
    _verify(body, signature, endpoint, tolerance, now)
    event = _parse(body)
    created = event.get("created")
    match event.get("object"):
        case "event":
            at, subject, account = instant(created), _object(event.get("data")).get("object"), event.get("account")
        case "v2.core.event":  # a thin event carries only a link to its object
            at, subject, account = _rfc3339(created), event.get("related_object"), event.get("context")
        case _:
            _refuse("webhook-body-invalid", "The body is not an event.")
    event_id, type_, livemode = usable_text(event.get("id")), usable_text(event.get("type")), event.get("livemode")
    of_account = "" if account is None else usable_text(account)
    if event_id is None or type_ is None or at is None or of_account is None or not isinstance(livemode, bool):
        usable = {"id": event_id, "type": type_, "created": at, "account": of_account}
        lacks = next((name for name, value in usable.items() if value is None), "livemode")
        _refuse("webhook-body-invalid", f"The event lacks a usable {lacks!r}.", lacks)
    api_version = usable_text(event.get("api_version"))
    return StripeEvent(event_id, type_, livemode, api_version, id_of(subject), at, event, of_account)


def is_served(event: StripeEvent, endpoint: Endpoint, *, livemode: bool) -> bool:
    """Whether this endpoint takes the event. Raises `Untrusted` (400) for what can only be a mistake in the set-up.

    To an endpoint for connected accounts Stripe sends the events of all of them, and those of test mode to a live one
    as well (https://docs.stripe.com/connect/webhooks). These are no mistake, and refusing them would only have Stripe
    send them for days and then switch the endpoint off. `livemode` is the mode of the API key.
    """
    if endpoint.livemode is not livemode:
        _refuse("webhook-wrong-mode", "The rules file gives this endpoint another mode than the API key has.")
    if not endpoint.account:
        if event.livemode is not livemode:
            _refuse("webhook-wrong-mode", "Live and test events go to the endpoint whose API key has their mode.")
        if event.account:
            _refuse("webhook-account-not-served", "Events of connected accounts are not served here.")
        return True
    if not event.account:
        _refuse("webhook-account-not-served", "Only events of connected accounts are served here.")
    return event.livemode is livemode and endpoint.account in (EVERY_CONNECTED_ACCOUNT, event.account)


@lru_cache(maxsize=100)
def fingerprint(secret: SecretStr) -> str:
    """What a secret is called in the metrics: enough to tell it from the others, and no help in guessing it."""
    return hashlib.sha256(secret.get_secret_value().encode()).hexdigest()[:8]


@lru_cache(maxsize=100)
def _count_verified(endpoint: str, secret: SecretStr) -> Counter:
    # Finding a labelled counter costs more than adding to it.
    return WEBHOOK_SECRETS.labels(endpoint, fingerprint(secret))


def _verify(body: str, header: str | None, endpoint: Endpoint, tolerance: int, now: datetime) -> None:
    # The SDK compares signatures as ASCII, and raises TypeError for anything else.
    if header is None or not header.isascii():
        _refuse("webhook-signature-invalid", "There is no Stripe-Signature header, or it is malformed.")
    for secret in endpoint.secrets:
        try:
            stripe.WebhookSignature.verify_header(body, header, secret.get_secret_value())
        except stripe.SignatureVerificationError:
            continue
        matched = secret
        break
    else:
        _refuse("webhook-signature-invalid", "The signature fits none of the endpoint's secrets.")
    # The SDK would check the age only into the past.
    try:
        signed_at = int(next(part[2:] for part in header.split(",") if part.startswith("t=")))
    except ValueError:  # the SDK reads `t=1=x` as 1
        _refuse("webhook-signature-invalid", "The Stripe-Signature header is malformed.")
    age = int(now.timestamp()) - signed_at
    if age > tolerance:
        _refuse("webhook-too-old", "It was signed too long ago; Stripe signs every retry afresh.")
    if age < -tolerance:
        _refuse("webhook-from-the-future", "It was signed in the future; is this machine's clock right?")
    _count_verified(endpoint.name, matched).inc()


def _parse(body: str) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        event = _parse_leniently(body)
    if not isinstance(event, dict):
        _refuse("webhook-body-invalid", "The body is not a JSON object.")
    return event


def _parse_leniently(body: str) -> Any:
    """What the quick parser refuses and Stripe may sign all the same, as half of a character; and what is wrong."""
    try:
        return json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason, field = explain(body.encode(), error)
        _refuse("webhook-body-invalid", f"The body is not valid JSON: {reason}.", field)


def _refuse(reason: str, detail: str, field: str | None = None) -> NoReturn:
    raise Untrusted(detail, type=reason, field=field) from None


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rfc3339(value: object) -> datetime | None:
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
        return at.astimezone(UTC) if at is not None and at.tzinfo is not None else None
    except (ValueError, OverflowError):  # the second: in UTC it would be of the year 0 or 10000
        return None
