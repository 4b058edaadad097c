"""The webhook endpoint at Stripe: make it, keep its event types exactly those that are handled, and look at it.

https://docs.stripe.com/api/webhook_endpoints
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import structlog

from tallystick.errors import TallystickError
from tallystick.resources import Resources
from tallystick.stripe_gateway import API_VERSION
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.recovery import listed_types
from tallystick.webhooks.translate import HANDLED_TYPES

log = structlog.get_logger()

PATH = "/v1/webhook_endpoints"
# How an endpoint is known again as one that was made here, whatever proxy stands before it.
METADATA = {"made_by": "tallystick"}
OUR_PATH = "/webhooks/stripe"

OTHER_VERSION = (
    f"Stripe cannot change the API version of an endpoint. Both versions are understood here. To move to {API_VERSION}:"
    " run this again with --new, put both secrets into STRIPE_WEBHOOK_SECRET, separated by a comma, and delete the old"
    " endpoint at Stripe when events come signed with the new one."
)


class SetupError(TallystickError):
    """The endpoint cannot be made as asked; the text says why."""


@dataclass(frozen=True)
class Endpoint:
    """The endpoint after the setup. `secret` is known only of one that was just made; `hint`: what is left to do."""

    id: str
    url: str
    action: str
    secret: str | None = None
    hint: str | None = None

    def as_json(self) -> dict[str, str | None]:
        return vars(self)


async def set_up_endpoint(resources: Resources, url: str, *, new: bool = False) -> Endpoint:
    """Make the endpoint for `url` at Stripe, or bring the one that there is up to date; its secret stays as it is.

    `new` makes another one for the same url, as is needed to change the API version. Raises `SetupError` and Stripe's
    errors.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise SetupError(f"{url} is not an address such as https://billing.example.com{OUR_PATH}")
    found = [] if new else [endpoint for endpoint in await list_endpoints(Reader(resources)) if endpoint["url"] == url]
    if not found:
        return await _create(resources, url)
    # Of several for one url, the one that is up to date already; else the newest, which is listed first.
    endpoint = min(found, key=lambda one: one["api_version"] != API_VERSION)
    hint = OTHER_VERSION if endpoint["api_version"] != API_VERSION else None
    if not problems_of({**endpoint, "api_version": API_VERSION}):
        return Endpoint(endpoint["id"], url, "unchanged", hint=hint)
    await resources.stripe.v1.webhook_endpoints.update_async(
        endpoint["id"], {"enabled_events": _enabled_events(), "disabled": False, "metadata": METADATA}
    )
    log.info("webhook_endpoint_updated", id=endpoint["id"], url=url)
    return Endpoint(endpoint["id"], url, "updated", hint=hint)


async def _create(resources: Resources, url: str) -> Endpoint:
    made = await resources.stripe.v1.webhook_endpoints.create_async(
        {
            "url": url,
            "enabled_events": _enabled_events(),
            "api_version": API_VERSION,
            "description": "tallystick",
            "metadata": METADATA,
        }
    )
    log.info("webhook_endpoint_created", id=made.id, url=url)
    hint = "Put the secret into STRIPE_WEBHOOK_SECRET now: Stripe does not show it again by its API."
    return Endpoint(made.id, url, "created", secret=made.secret, hint=hint)


def _enabled_events() -> Any:
    # The SDK's type is a list of literals, which a tuple of names cannot be told to be.
    return listed_types()


async def list_endpoints(reader: Reader) -> list[dict[str, Any]]:
    """All of the account's webhook endpoints, newest first."""
    endpoints: list[dict[str, Any]] = []
    cursor, more = None, True
    while more:
        page, cursor = await reader.page(PATH, cursor)
        endpoints += page
        more = cursor is not None
    return endpoints


def is_ours(endpoint: Mapping[str, Any]) -> bool:
    """Whether an endpoint was made here, or leads here by the look of it."""
    return METADATA.items() <= (endpoint.get("metadata") or {}).items() or OUR_PATH in endpoint["url"]


def problems_of(endpoint: Mapping[str, Any]) -> Sequence[str]:
    """What is wrong with an endpoint of ours, in words."""
    problems = []
    if endpoint["status"] != "enabled":
        problems.append(f"it is {endpoint['status']}")
    enabled = set(endpoint["enabled_events"])
    # Thin events come to endpoints of another kind; whoever has them sent here does no harm.
    if missing := sorted(set(listed_types()) - enabled) if "*" not in enabled else []:
        problems.append(f"it lacks {len(missing)} event types, such as {missing[0]}")
    if superfluous := sorted(enabled - set(HANDLED_TYPES)):
        problems.append(f"it gets event types that are not handled, such as {superfluous[0]}")
    if endpoint["api_version"] != API_VERSION:
        problems.append(f"its API version is {endpoint['api_version'] or 'the default of the account'}")
    return problems
