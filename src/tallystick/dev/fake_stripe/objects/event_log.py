"""The events list, thin events, and the endpoints that are told of them."""

from __future__ import annotations

from datetime import datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypedDict
from urllib import parse

from stripe.params.v2.core import EventListParamsCreated

from tallystick.dev.fake_stripe.clock import rfc3339
from tallystick.dev.fake_stripe.errors import invalid
from tallystick.dev.fake_stripe.rendering import render
from tallystick.dev.fake_stripe.resources import (
    PAGING,
    Route,
    find,
    in_range,
    merge_metadata,
    page,
    retrieving,
    set_fields,
)
from tallystick.dev.fake_stripe.settings import DAY_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

RETENTION_SECONDS = 30 * DAY_SECONDS
MOST_TYPES = 20
MOST_LISTED = 100


class ThinEventListParams(TypedDict, total=False):
    """The SDK's `v2.core.EventListParams`, and the `page` that the fake puts into `next_page_url`."""

    created: EventListParamsCreated
    limit: int
    object_id: str
    types: list[str]
    page: int


def list_events(account: Account, call: Call) -> Object:
    """GET /v1/events: of the last 30 days, newest first."""
    params = call.params
    types = params.get("types") or ([params["type"]] if "type" in params else None)
    if "types" in params and "type" in params:
        raise invalid("You may pass either `type` or `types`, but not both.", param="types")
    if types is not None and len(types) > MOST_TYPES:
        raise invalid(f"At most {MOST_TYPES} types can be given.", param="types")
    oldest = account.now() - RETENTION_SECONDS

    def meets(event: Object) -> bool:
        if types is not None and not any(fnmatchcase(event["type"], wanted) for wanted in types):
            return False
        if "delivery_success" in params:
            delivered = all(outcome == "succeeded" for outcome in event["_webhooks"].values())
            if delivered is not params["delivery_success"]:
                return False
        return in_range(event["created"], params.get("created"))

    recent = (event for event in account.state.newest_first("event") if event["created"] >= oldest)
    return page(account, call, (event for event in recent if meets(event)))


def retrieve_event(account: Account, call: Call) -> Object:
    """GET /v1/events/{id}: 30 days back."""
    event = find(account, "event", call.arguments["id"])
    if event["created"] < account.now() - RETENTION_SECONDS:
        find(account, "expired event", event["id"])
    return render(account, event)


def retrieve_thin_event(account: Account, call: Call) -> Object:
    """GET /v2/core/events/{id}: a thin event with its data."""
    return render(account, find(account, "v2.core.event", call.arguments["id"]))


def list_thin_events(account: Account, call: Call) -> Object:
    """GET /v2/core/events: thin events of the last 30 days, newest first, whether they have an endpoint or not."""
    params = call.params
    types, within = params.get("types"), params.get("created") or {}
    limit, begin = params.get("limit", 20), params.get("page", 0)
    if types is not None and len(types) > MOST_TYPES:
        raise invalid(f"At most {MOST_TYPES} types can be given.", param="types")
    if not 1 <= limit <= MOST_LISTED:
        raise invalid(f"limit is from 1 to {MOST_LISTED}.", param="limit")
    oldest = rfc3339(account.now() - RETENTION_SECONDS)
    moments = {name: _moment(moment, f"created[{name}]") for name, moment in within.items()}

    def meets(event: Object) -> bool:
        return (
            event["created"] >= oldest
            and (types is None or event["type"] in types)
            and ("object_id" not in params or (event.get("related_object") or {}).get("id") == params["object_id"])
            and in_range(_moment(event["created"], "created"), moments)
        )

    events = [event for event in account.state.newest_first("v2.core.event") if meets(event)]
    shown = events[begin : begin + limit]
    more = {name: value for name, value in params.items() if name in ("object_id", "limit")} | {"page": begin + limit}
    query = parse.urlencode([*more.items(), *((f"types[{n}]", name) for n, name in enumerate(types or ()))])
    query += "".join(f"&created[{name}]={parse.quote(moment)}" for name, moment in within.items())
    return {
        "data": [render(account, event) for event in shown],
        "next_page_url": f"{call.path}?{query}" if len(events) > begin + limit else None,
        "previous_page_url": None,
    }


def _moment(text: str, param: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise invalid("A time is written as in RFC 3339.", param=param) from None


def create_endpoint(account: Account, call: Call) -> Object:
    """POST /v1/webhook_endpoints: the answer is the only one that carries the secret."""
    params = call.params
    _check_url(params["url"])
    secret = account.ids.new("whsec")
    endpoint = make_endpoint(
        account, params["url"], [secret], params["enabled_events"], params.get("api_version") or None
    )
    set_fields(endpoint, call.params, "description")
    merge_metadata(endpoint, call.params)
    account.state.put(endpoint)
    return {**render(account, endpoint), "secret": secret}


def make_endpoint(
    account: Account, url: str, secrets: list[str], enabled_events: list[str], api_version: str | None
) -> Object:
    """An endpoint that gets every event from now on that its `enabled_events` name."""
    return account.state.put(
        {
            "id": account.ids.new("we"),
            "object": "webhook_endpoint",
            "api_version": api_version,
            "application": None,
            "created": account.now(),
            "description": None,
            "enabled_events": enabled_events,
            "livemode": False,
            "metadata": {},
            "status": "enabled",
            "url": url,
            "_secrets": secrets,
        }
    )


def _check_url(url: str) -> None:
    parts = parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise invalid("Invalid URL: an http or https address is needed.", param="url", code="url_invalid")


def update_endpoint(account: Account, call: Call) -> Object:
    """POST /v1/webhook_endpoints/{id}."""
    endpoint = find(account, "webhook_endpoint", call.arguments["id"])
    if "url" in call.params:
        _check_url(call.params["url"])
    set_fields(endpoint, call.params, "url enabled_events description")
    merge_metadata(endpoint, call.params)
    if "disabled" in call.params:
        endpoint["status"] = "disabled" if call.params["disabled"] else "enabled"
    account.state.put(endpoint)
    return render(account, endpoint)


def delete_endpoint(account: Account, call: Call) -> Object:
    """DELETE /v1/webhook_endpoints/{id}: what is pending for it is dropped."""
    endpoint = find(account, "webhook_endpoint", call.arguments["id"])
    account.state.remove("webhook_endpoint", endpoint["id"])
    account.deliveries.forget(endpoint["id"])
    return {"id": endpoint["id"], "object": "webhook_endpoint", "deleted": True}


def list_endpoints(account: Account, call: Call) -> Object:
    """GET /v1/webhook_endpoints."""
    return page(account, call, account.state.newest_first("webhook_endpoint"))


ENDPOINT = "url enabled_events description metadata"

ROUTES = [
    Route("GET", "/v1/events", list_events, "EventListParams", f"{PAGING} type types created delivery_success"),
    Route("GET", "/v1/events/{id}", retrieve_event, "EventRetrieveParams"),
    Route("GET", "/v2/core/events", list_thin_events, ThinEventListParams, "created limit object_id types page"),
    Route("GET", "/v2/core/events/{id}", retrieve_thin_event, "v2.core.EventRetrieveParams"),
    Route("POST", "/v1/webhook_endpoints", create_endpoint, "WebhookEndpointCreateParams", f"{ENDPOINT} api_version"),
    Route("GET", "/v1/webhook_endpoints", list_endpoints, "WebhookEndpointListParams", PAGING),
    Route("GET", "/v1/webhook_endpoints/{id}", retrieving("webhook_endpoint"), "WebhookEndpointRetrieveParams"),
    Route("POST", "/v1/webhook_endpoints/{id}", update_endpoint, "WebhookEndpointUpdateParams", f"{ENDPOINT} disabled"),
    Route("DELETE", "/v1/webhook_endpoints/{id}", delete_endpoint, "WebhookEndpointDeleteParams"),
]
