"""Events: one for each change that Stripe tells of, kept for the events list and handed to the webhooks."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe.clock import rfc3339
from tallystick.dev.fake_stripe.errors import StripeError
from tallystick.dev.fake_stripe.rendering import render
from tallystick.dev.fake_stripe.state import Object
from tallystick.dev.fake_stripe.versions import API_VERSION

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

# What an object's events are called, where that is not the object's own name.
NAMES = {"subscription": "customer.subscription"}


def emit(account: Account, event_type: str, item: Object, previous: Object | None = None) -> Object:
    """Makes an event about an object as it is, queues it for all endpoints that listen, and returns it."""
    data: Object = {"object": copy.deepcopy(render(account, item))}
    if previous is not None:
        data["previous_attributes"] = previous
    cause = account.cause
    event: Object = {
        "id": account.ids.new("evt"),
        "object": "event",
        "api_version": API_VERSION,
        "created": account.now(),
        "data": data,
        "livemode": False,
        "pending_webhooks": 0,
        "request": {"id": cause and cause.id, "idempotency_key": cause and cause.idempotency_key},
        "type": event_type,
        "_webhooks": {},
        "_made_at_real_time": int(time.time()),
    }
    account.state.put(event)
    account.deliveries.announce(event)
    return event


def emit_thin(account: Account, event_type: str, related: Object | None, data: Object) -> Object:
    """Makes a thin event: an endpoint gets its name and what it is about, and fetches the rest from /v2/core/events."""
    event: Object = {
        "id": account.ids.new("evt"),
        "object": "v2.core.event",
        "type": event_type,
        "created": rfc3339(account.now()),
        "livemode": False,
        "context": None,
        "reason": None,
        "data": data,
        "_webhooks": {},
    }
    if related is not None:
        event["related_object"] = {
            "id": related["id"],
            "type": related["object"],
            "url": f"/v1/billing/meters/{related['id']}",
        }
    account.state.put(event)
    account.deliveries.announce(event)
    return event


@contextmanager
def changing(account: Account, item: Object) -> Iterator[Object]:
    """Keeps what the block does to an object, and emits its `….updated` event if anything visible came of it.

    A block that raises leaves the object as it was.
    """
    before, whole = copy.deepcopy(render(account, item)), copy.deepcopy(item)
    try:
        yield item
    except StripeError:
        item.clear()
        item.update(whole)
        raise
    account.state.put(item)
    previous = difference(before, render(account, item))
    if previous:
        emit(account, f"{NAMES.get(item['object'], item['object'])}.updated", item, previous)


def difference(before: Object, after: Object) -> Object:
    """`previous_attributes`: the old values of what changed, with hashes reduced to their changed keys."""
    changed: dict[str, Any] = {}
    for name, old in before.items():
        new = after.get(name)
        if old == new:
            continue
        changed[name] = difference(old, new) if isinstance(old, dict) and isinstance(new, dict) else old
    changed.update(dict.fromkeys(after.keys() - before.keys()))
    return changed
