"""Meter events on their way in: what is refused at once, what is refused later, and what counts."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe.clock import rfc3339
from tallystick.dev.fake_stripe.errors import StripeError, invalid
from tallystick.dev.fake_stripe.events import emit_thin
from tallystick.dev.fake_stripe.settings import DAY_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

OLDEST_SECONDS = 35 * DAY_SECONDS
AHEAD_SECONDS = 5 * 60
SIGNIFICANT_DIGITS = 15
IDENTIFIER_LENGTH = 100

# Reports carry samples, not every failure.
SAMPLES = 5

MESSAGES = {
    "archived_meter": "The meter of this event was deactivated.",
    "meter_event_customer_not_found": "There is no customer with the id in this event's payload.",
    "meter_event_invalid_value": "The value of this event is not a number.",
    "meter_event_no_customer_defined": "This event's payload names no customer.",
    "meter_event_value_too_many_digits": f"The value of this event has more than {SIGNIFICANT_DIGITS} digits.",
    "no_meter": "There is no meter for this event's name.",
    "timestamp_in_future": "The timestamp of this event is more than 5 minutes ahead.",
    "timestamp_too_far_in_past": "The timestamp of this event is more than 35 days old.",
}

# What a call of its own is told at once. The stream answers before it looks, and reports these as well.
REFUSED_AT_ONCE = frozenset(MESSAGES) - {"archived_meter", "meter_event_customer_not_found"}


def meter_for(account: Account, event_name: str) -> Object | None:
    """The meter of an event name: the active one, or a deactivated one if there is no other."""
    meters = account.state.where("billing.meter", "event_name", event_name)
    return next((meter for meter in meters if meter["status"] == "active"), meters[-1] if meters else None)


def accept(
    account: Account, event: Object, timestamp: int | None, idempotency_key: str | None, *, streamed: bool = False
) -> Object:
    """Takes one meter event in. `event` has event_name, payload and perhaps an identifier.

    Raises StripeError 400 for what Stripe refuses at once; with `streamed` only a report tells of it later. Returns the
    fake's own record of the event.
    """
    now = account.now()
    moment = now if timestamp is None else timestamp
    payload = event["payload"]
    identifier = event.get("identifier") or account.ids.new("mev")
    if len(identifier) > IDENTIFIER_LENGTH:
        raise invalid(f"An identifier has at most {IDENTIFIER_LENGTH} characters.", param="identifier")
    meter = meter_for(account, event["event_name"])
    error = _problem(account, meter, payload, moment)
    if error in REFUSED_AT_ONCE and not streamed:
        raise _refusal(error, event["event_name"])
    known = account.ledger.taken(identifier, now)
    if known is not None:
        if streamed:
            return known
        raise invalid(f"An event already exists with identifier {identifier}.", param="identifier")
    customer_key = meter["customer_mapping"]["event_payload_key"] if meter else ""
    value_key = meter["value_settings"]["event_payload_key"] if meter else ""
    record: Object = {
        "object": "_meter_event",
        "id": account.ids.new("mtrev"),
        "identifier": identifier,
        "event_name": event["event_name"],
        "meter": meter["id"] if meter else None,
        "customer": payload.get(customer_key),
        # A count meter needs no value: each event counts once.
        "value": payload.get(value_key, "1"),
        "timestamp": moment,
        "received": now,
        "cancelled": False,
        "error": error,
    }
    account.state.put(record)
    account.ledger.add(record)
    if error is not None:
        _gather(account, meter, error, idempotency_key or identifier)
    return record


def _problem(account: Account, meter: Object | None, payload: dict[str, str], moment: int) -> str | None:
    if meter is None:
        return "no_meter"
    now = account.now()
    if moment < now - OLDEST_SECONDS:
        return "timestamp_too_far_in_past"
    if moment > now + AHEAD_SECONDS:
        return "timestamp_in_future"
    value = payload.get(meter["value_settings"]["event_payload_key"])
    if value is None:
        if meter["default_aggregation"]["formula"] != "count":
            return "meter_event_invalid_value"
    elif (error := _value_problem(value)) is not None:
        return error
    customer = payload.get(meter["customer_mapping"]["event_payload_key"])
    if not customer:
        return "meter_event_no_customer_defined"
    if meter["status"] != "active":
        return "archived_meter"
    found = account.state.get("customer", customer)
    return "meter_event_customer_not_found" if found is None or found.get("deleted") else None


def _value_problem(value: str) -> str | None:
    # No exponent, no blanks, no underscores: digits, one sign, one point.
    if not value.isascii() or value.strip("+-.0123456789"):
        return "meter_event_invalid_value"
    try:
        digits = "".join(map(str, Decimal(value).as_tuple().digits)).lstrip("0")
    except InvalidOperation:
        return "meter_event_invalid_value"
    return "meter_event_value_too_many_digits" if len(digits) > SIGNIFICANT_DIGITS else None


def _refusal(error: str | None, event_name: str) -> StripeError:
    match error:
        case "no_meter":
            return invalid(f"No active meter found for event name '{event_name}'.", param="event_name")
        case "timestamp_too_far_in_past" | "timestamp_in_future":
            return invalid(MESSAGES[error], param="timestamp", code=error)
        case _:
            return invalid(MESSAGES[str(error)], param="payload", code=error)


def _gather(account: Account, meter: Object | None, error: str, request: str) -> None:
    """Adds an error to the report that is being gathered for its meter, and begins one if there is none."""
    report_id = meter["id"] if meter else "no_meter"
    report = account.state.get("_meter_errors", report_id)
    if report is None:
        now = account.now()
        due = now + account.settings.error_report_seconds
        report = {"object": "_meter_errors", "id": report_id, "start": now, "due": due, "types": {}}
        account.agenda.plan(due, "meter.report_errors", report_id)
    counted = report["types"].setdefault(error, {"count": 0, "samples": []})
    counted["count"] += 1
    if len(counted["samples"]) < SAMPLES:
        counted["samples"].append(request)
    account.state.put(report)


def report_errors(account: Account, report: Object) -> str:
    """The `meter.report_errors` transition: a thin event with what was gathered."""
    account.state.remove("_meter_errors", report["id"])
    total = sum(counted["count"] for counted in report["types"].values())
    error_types: list[dict[str, Any]] = [
        {
            "code": error,
            "error_count": counted["count"],
            "sample_errors": [
                {"error_message": MESSAGES[error], "request": {"identifier": sample}} for sample in counted["samples"]
            ],
        }
        for error, counted in report["types"].items()
    ]
    data = {
        "developer_message_summary": f"Meter events that could not be billed: {total}.",
        "reason": {"error_count": total, "error_types": error_types},
        "validation_start": rfc3339(report["start"]),
        "validation_end": rfc3339(account.now()),
    }
    meter = account.state.get("billing.meter", report["id"])
    name = "v1.billing.meter.error_report_triggered" if meter else "v1.billing.meter.no_meter_found"
    emit_thin(account, name, meter, data)
    return f"errors reported: {total}"
