"""Billing meters, the events that they count, corrections, and summaries."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe import metering
from tallystick.dev.fake_stripe.clock import rfc3339
from tallystick.dev.fake_stripe.errors import StripeError, invalid
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.ledger import WINDOW_SECONDS, aggregate
from tallystick.dev.fake_stripe.rendering import render
from tallystick.dev.fake_stripe.resources import PAGING, Route, find, named, page, retrieving, set_fields
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

SESSION_SECONDS = 15 * 60
STREAM_EVENTS = 100
MINUTE_SECONDS = 60


def create(account: Account, call: Call) -> Object:
    """POST /v1/billing/meters: one active meter for each event name."""
    params, now = call.params, account.now()
    known = metering.meter_for(account, params["event_name"])
    if known is not None and known["status"] == "active":
        raise invalid(f"There is an active meter for '{params['event_name']}' already.", param="event_name")
    mapping = params.get("customer_mapping") or {"event_payload_key": "stripe_customer_id", "type": "by_id"}
    meter: Object = {
        "id": account.ids.new("mtr"),
        "object": "billing.meter",
        "created": now,
        "customer_mapping": mapping,
        "default_aggregation": {"formula": params["default_aggregation"]["formula"]},
        "display_name": params["display_name"],
        "event_name": params["event_name"],
        "event_time_window": params.get("event_time_window"),
        "livemode": False,
        "status": "active",
        "status_transitions": {"deactivated_at": None},
        "updated": now,
        "value_settings": params.get("value_settings") or {"event_payload_key": "value"},
    }
    account.state.put(meter)
    emit(account, "billing.meter.created", meter)
    return render(account, meter)


def update(account: Account, call: Call) -> Object:
    """POST /v1/billing/meters/{id}."""
    meter = find(account, "billing.meter", call.arguments["id"])
    with changing(account, meter):
        set_fields(meter, call.params, "display_name")
        meter["updated"] = account.now()
    return render(account, meter)


def deactivate(account: Account, call: Call) -> Object:
    """POST /v1/billing/meters/{id}/deactivate."""
    return _switch(account, call, "inactive", "billing.meter.deactivated")


def reactivate(account: Account, call: Call) -> Object:
    """POST /v1/billing/meters/{id}/reactivate."""
    return _switch(account, call, "active", "billing.meter.reactivated")


def _switch(account: Account, call: Call, status: str, event: str) -> Object:
    meter = find(account, "billing.meter", call.arguments["id"])
    if meter["status"] == status:
        raise invalid(f"This meter is {status} already.", param="id")
    meter["status"] = status
    meter["status_transitions"] = {"deactivated_at": account.now() if status == "inactive" else None}
    meter["updated"] = account.now()
    account.state.put(meter)
    emit(account, event, meter)
    return render(account, meter)


def list_meters(account: Account, call: Call) -> Object:
    """GET /v1/billing/meters."""
    status = call.params.get("status")
    meters = account.state.newest_first("billing.meter")
    return page(account, call, (meter for meter in meters if status in (None, meter["status"])))


def create_event(account: Account, call: Call) -> Object:
    """POST /v1/billing/meter_events."""
    record = metering.accept(account, call.params, call.params.get("timestamp"), call.idempotency_key)
    return {
        "object": "billing.meter_event",
        "created": record["received"],
        "event_name": record["event_name"],
        "identifier": record["identifier"],
        "livemode": False,
        "payload": call.params["payload"],
        "timestamp": record["timestamp"],
    }


def create_event_v2(account: Account, call: Call) -> Object:
    """POST /v2/billing/meter_events: the same with RFC 3339 times."""
    moment = _moment(call.params.get("timestamp"))
    record = metering.accept(account, call.params, moment, call.idempotency_key)
    return {
        "object": "v2.billing.meter_event",
        "created": rfc3339(record["received"]),
        "event_name": record["event_name"],
        "identifier": record["identifier"],
        "livemode": False,
        "payload": call.params["payload"],
        "timestamp": rfc3339(record["timestamp"]),
    }


def _moment(timestamp: str | None) -> int | None:
    if timestamp is None:
        return None
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError:
        raise invalid("A timestamp is written as in RFC 3339.", param="timestamp") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def create_session(account: Account, call: Call) -> Object:
    """POST /v2/billing/meter_event_session: a token for the stream, good for 15 minutes."""
    del call
    now = account.now()
    session: Object = {
        "id": account.ids.new("mes"),
        "object": "v2.billing.meter_event_session",
        "authentication_token": account.ids.new("token"),
        "created": rfc3339(now),
        "expires_at": rfc3339(now + SESSION_SECONDS),
        "livemode": False,
    }
    account.state.put(
        {"object": "_stream_token", "id": session["authentication_token"], "expires": now + SESSION_SECONDS}
    )
    return session


def stream(account: Account, call: Call) -> Object:
    """POST /v2/billing/meter_event_stream: up to 100 events; what is wrong with one is reported later."""
    token = account.state.get("_stream_token", call.token)
    if token is None:
        raise StripeError(401, "The stream takes a meter event session's token, not an API key.")
    if token["expires"] <= account.now():
        raise StripeError(
            400,
            "This meter event session has expired: make a new one.",
            type="temporary_session_expired",
            code="billing_meter_event_session_expired",
        )
    events = call.params["events"]
    if not 1 <= len(events) <= STREAM_EVENTS:
        raise invalid(f"A request carries 1 to {STREAM_EVENTS} events.", param="events")
    moments = [_moment(event.get("timestamp")) for event in events]
    if account.settings.stream_refuses_repeats and any(
        account.ledger.taken(event.get("identifier") or "", account.now()) for event in events
    ):
        raise invalid(
            "A meter event with a duplicate identifier has already been submitted.", code="duplicate_meter_event"
        )
    for event, moment in zip(events, moments, strict=True):
        metering.accept(account, event, moment, call.idempotency_key, streamed=True)
    return {}


def adjust(account: Account, call: Call) -> Object:
    """POST /v1/billing/meter_event_adjustments: cancels the event of an identifier, within 24 hours of its receipt."""
    record = _cancelled(account, call)
    return {
        "object": "billing.meter_event_adjustment",
        "cancel": {"identifier": record["identifier"]},
        "event_name": record["event_name"],
        "livemode": False,
        "status": "pending",
        "type": "cancel",
    }


def adjust_v2(account: Account, call: Call) -> Object:
    """POST /v2/billing/meter_event_adjustments."""
    record = _cancelled(account, call)
    return {
        "id": account.ids.new("mea"),
        "object": "v2.billing.meter_event_adjustment",
        "cancel": {"identifier": record["identifier"]},
        "created": rfc3339(account.now()),
        "event_name": record["event_name"],
        "livemode": False,
        "status": "pending",
        "type": "cancel",
    }


def _cancelled(account: Account, call: Call) -> Object:
    identifier = (call.params.get("cancel") or {}).get("identifier")
    if not identifier:
        raise invalid("Missing required param: cancel[identifier].", param="cancel", code="parameter_missing")
    record = account.ledger.taken(identifier, account.now())
    if record is None or record["event_name"] != call.params["event_name"]:
        raise invalid(
            f"No event of the last 24 hours has the identifier {identifier}.", param="cancel", code="resource_missing"
        )
    if record["cancelled"]:
        raise invalid(f"The event with identifier {identifier} is cancelled already.", param="cancel")
    record["cancelled"] = True
    account.state.put(record)
    return record


def list_summaries(account: Account, call: Call) -> Object:
    """GET /v1/billing/meters/{id}/event_summaries: start_time <= timestamp < end_time, whole or by UTC hour or day.

    Newest first; hours and days without an event are left out. Events show up after the lag that is set.
    """
    meter = find(account, "billing.meter", call.arguments["id"])
    customer = named(account, call, "customer", "customer")
    start, end = call.params["start_time"], call.params["end_time"]
    window = call.params.get("value_grouping_window")
    step = WINDOW_SECONDS[window] if window else MINUTE_SECONDS
    for name, moment in (("start_time", start), ("end_time", end)):
        if moment % step:
            raise invalid(f"{name} must be aligned with {window or 'minute'} boundaries.", param=name)
    if start >= end:
        raise invalid("start_time must be before end_time.", param="end_time")
    summaries = list(_summaries(account, meter, customer["id"], start, end, step if window else end - start))
    return page(account, call, reversed(summaries))


def _summaries(
    account: Account, meter: Object, customer: str, start: int, end: int, step: int
) -> Iterator[dict[str, Any]]:
    seen_by = account.now() - account.settings.summary_lag_seconds
    events = account.ledger.between(meter["id"], customer, start, end, received_by=seen_by)
    buckets: dict[int, list[Object]] = {}
    for event in events:
        buckets.setdefault((event["timestamp"] - start) // step, []).append(event)
    formula = meter["default_aggregation"]["formula"]
    for number in sorted(buckets):
        begin = start + number * step
        yield {
            "id": f"mtrusg_{meter['id'].removeprefix('mtr_')[:12]}_{customer.removeprefix('cus_')[:12]}_{begin}_{step}",
            "object": "billing.meter_event_summary",
            "aggregated_value": _json_number(aggregate(buckets[number], formula, meter["event_time_window"])),
            "end_time": begin + step,
            "livemode": False,
            "meter": meter["id"],
            "start_time": begin,
        }


def _json_number(value: Decimal) -> int | float:
    """Stripe sends this one field as a JSON number, which its SDK reads as a float; so it is one here too."""
    return int(value) if value == value.to_integral_value() else float(value)


METERS = "/v1/billing/meters"
EVENT = "event_name payload identifier timestamp"

ROUTES = [
    Route("POST", "/v1/billing/meter_events", create_event, "billing.MeterEventCreateParams", EVENT),
    Route(
        "POST",
        METERS,
        create,
        "billing.MeterCreateParams",
        "event_name display_name default_aggregation customer_mapping value_settings event_time_window",
    ),
    Route("GET", METERS, list_meters, "billing.MeterListParams", f"{PAGING} status"),
    Route("GET", f"{METERS}/{{id}}", retrieving("billing.meter"), "billing.MeterRetrieveParams"),
    Route("POST", f"{METERS}/{{id}}", update, "billing.MeterUpdateParams", "display_name"),
    Route("POST", f"{METERS}/{{id}}/deactivate", deactivate, "billing.MeterDeactivateParams"),
    Route("POST", f"{METERS}/{{id}}/reactivate", reactivate, "billing.MeterReactivateParams"),
    Route(
        "GET",
        f"{METERS}/{{id}}/event_summaries",
        list_summaries,
        "billing.MeterEventSummaryListParams",
        f"{PAGING} customer start_time end_time value_grouping_window",
    ),
    Route(
        "POST",
        "/v1/billing/meter_event_adjustments",
        adjust,
        "billing.MeterEventAdjustmentCreateParams",
        "event_name type cancel",
    ),
    Route("POST", "/v2/billing/meter_events", create_event_v2, "v2.billing.MeterEventCreateParams", EVENT),
    Route("POST", "/v2/billing/meter_event_session", create_session, "v2.billing.MeterEventSessionCreateParams"),
    Route("POST", "/v2/billing/meter_event_stream", stream, "v2.billing.MeterEventStreamCreateParams", "events"),
    Route(
        "POST",
        "/v2/billing/meter_event_adjustments",
        adjust_v2,
        "v2.billing.MeterEventAdjustmentCreateParams",
        "event_name type cancel",
    ),
]
