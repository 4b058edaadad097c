"""What an operator does about parked deliveries: look, send again, write off.

Nothing is sent again that Stripe would refuse, or that could be billed twice:

    outcome unknown       never; Stripe's summaries decide (usage/reconciliation.py)
    refused at once       under its identifier, which Stripe never took
    reported afterwards   under a new identifier: Stripe took the old one and billed nothing, and would only answer
                          "already exists" for a day
    too late, too old     only when it is carried into the open period
    meter changed         only once a meter with the old formula has the name again; else it would be parked again

Each decision is one of the delivery's tries, with who made it and when, so the trace shows it.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.rules import Rules
from tallystick.usage.events import plain
from tallystick.usage.late import carry, find_closed, find_misnamed
from tallystick.usage.parking import CARRY_OR, SETTLE_OR, explain_reason
from tallystick.usage.parts import OLDEST_TO_SEND

_COLUMNS = """
    d.id, d.identifier, d.customer, d.event_name, d.value, d.events, d.aggregation, d.sender, d.timestamp, d.state,
    d.reason, d.attempts, d.created_at, d.settled_at, d.carried_from, d.unknown_since
"""

LIST = text(f"""
    SELECT {_COLUMNS} FROM usage_deliveries d
     WHERE d.state = 'parked'
       AND (CAST(:reason AS text) IS NULL OR split_part(d.reason, ':', 1) = :reason)
       AND (CAST(:customer AS text) IS NULL OR d.customer = :customer)
       AND (CAST(:meter AS text) IS NULL OR d.event_name = :meter)
       AND d.id > :after
     ORDER BY d.id LIMIT :limit
""")  # noqa: S608  put together from constants

FIND = text(f"SELECT {_COLUMNS} FROM usage_deliveries d WHERE d.identifier = :identifier")  # noqa: S608

FIND_ATTEMPTS = text("""
    SELECT attempt, at, outcome, reason, http_status, request_id
      FROM usage_delivery_attempts WHERE delivery_id = :id ORDER BY attempt
""")

# `taken`: Stripe answered that it took it, or reported an error of it later; then its identifier is used up.
LOCK = text(f"""
    SELECT {_COLUMNS},
           EXISTS (SELECT FROM usage_delivery_attempts a
                    WHERE a.delivery_id = d.id AND (a.outcome = 'sent' OR starts_with(a.request_id, 'evt_'))) AS taken
      FROM usage_deliveries d WHERE d.identifier = ANY(:identifiers) ORDER BY d.id FOR UPDATE
""")  # noqa: S608

# An operator's decision is numbered like a try, so that a worker that comes back late no longer has a say.
DECIDE = text("""
    WITH decided AS (
        UPDATE usage_deliveries d
           SET state = r.state, reason = r.reason, identifier = r.identifier, attempts = d.attempts + 1,
               next_attempt_at = :now, lease_until = NULL, confirmed_at = NULL,
               unknown_since = CASE WHEN d.sender = 'usage_records' THEN d.unknown_since END,
               settled_at = CASE WHEN r.state = 'pending' THEN NULL ELSE CAST(:now AS timestamptz) END
          FROM json_to_recordset(CAST(:rows AS json))
            AS r(id bigint, state text, reason text, identifier text, noted text, outcome text)
         WHERE d.id = r.id AND d.state = 'parked'
        RETURNING d.id, d.attempts, r.noted, r.outcome
    )
    INSERT INTO usage_delivery_attempts (delivery_id, attempt, at, outcome, reason)
    SELECT id, attempts, CAST(:now AS timestamptz), outcome, noted FROM decided
""")

ALTERNATIVES = {
    "not_parked": "It is not parked.",
    "no_second_left": "The last second of its billing period says another value already. Settle the difference by an"
    " invoice item at Stripe, or void it.",
    "outcome_unknown": "Stripe may have taken it: its summaries decide, and `tallystick reconcile --stripe` asks them"
    " now. What they do not show is sent again by itself.",
    "meter_changed": "Another meter with another formula has the name. Give the name back to a meter with the old"
    " formula first, settle it by an invoice item at Stripe, or void it.",
    "period_closed": "The invoice that would have billed it is final. Carry it into the open period, settle it by an"
    " invoice item at Stripe, or void it.",
    "older_than_35_days": "Stripe takes no usage that is older than 35 days. Carry it into the open period, settle it"
    " by an invoice item at Stripe, or void it.",
    "cannot_be_carried": "It comes too late, and cannot be carried. A latest, greatest or distinct value belongs to its"
    " own period; many events of a meter that counts would be counted as one; and a usage record of which a try was not"
    " answered may have been taken there: look at the item's usage at Stripe. Settle it by an invoice item at Stripe,"
    " or void it.",
    "no_open_period": "No open period of the customer bills this meter. Settle it by an invoice item at Stripe, or void"
    " it.",
}


@dataclass(frozen=True)
class Decision:
    """What became of a delivery that was to be sent again or voided. `refused`: a key of `ALTERNATIVES`."""

    identifier: str
    refused: str | None = None
    sent_as: str | None = None

    def as_json(self) -> dict[str, str | None]:
        """`identifier`, `sent_as`, and of a refusal its code and the alternatives."""
        detail = ALTERNATIVES[self.refused] if self.refused else None
        return {**vars(self), "detail": detail}


async def list_parked(
    connection: AsyncConnection,
    *,
    reason: str | None = None,
    customer: str | None = None,
    meter: str | None = None,
    after: int = 0,
    limit: int,
) -> list[dict[str, Any]]:
    """Parked deliveries, oldest first; `reason` without Stripe's text, `customer` a `cus_…` id. None stands for all.

    `after` is the `number` of the last one of the page before.
    """
    wanted = {"reason": reason, "customer": customer, "meter": meter, "after": after, "limit": limit}
    return [_show(row) | _explain(row) for row in (await connection.execute(LIST, wanted)).mappings()]


async def explain(connection: AsyncConnection, identifier: str, rules: Rules, now: datetime) -> dict[str, Any] | None:
    """A delivery with every try and answer, what its reason means, and whether it may be sent again; None: unknown."""
    row = (await connection.execute(FIND, {"identifier": identifier})).mappings().one_or_none()
    if row is None:
        return None
    attempts = [dict(each) for each in (await connection.execute(FIND_ATTEMPTS, {"id": row["id"]})).mappings()]
    closed = await find_closed(connection, [row["id"]], rules)
    refused = _refusal(row, await find_misnamed(connection, [row["id"]]), closed, now)
    explained = _explain(row) if row["state"] == "parked" else dict.fromkeys(("happened", "remedy"))
    if refused == "cannot_be_carried":
        explained |= {"remedy": SETTLE_OR}
    return (
        _show(row)
        | explained
        | {
            "tries": attempts,
            "resend": refused or "possible",
            "resend_detail": ALTERNATIVES[refused] if refused else None,
        }
    )


async def resend(
    connection: AsyncConnection, identifiers: Collection[str], rules: Rules, now: datetime, *, by: str, carried: bool
) -> list[Decision]:
    """Send parked deliveries again, as soon as a worker comes by; one decision for each that exists.

    `by` names who asks; with `carried`, what is too late or too old moves into the open period. The caller commits.
    """
    rows = (await connection.execute(LOCK, {"identifiers": sorted(identifiers)})).mappings().all()
    parked = [row["id"] for row in rows if row["state"] == "parked"]
    misnamed, closed = await find_misnamed(connection, parked), await find_closed(connection, parked, rules)
    decisions, written = [], []
    for row in rows:
        refused = _refusal(row, misnamed, closed, now)
        moved = ""
        if carried and refused in ("period_closed", "older_than_35_days"):
            if not await carry(connection, [row["id"]], rules, now):
                refused = "no_open_period"
            else:
                refused, moved = None, ", carried into the open period"
        if refused:
            decisions.append(Decision(row["identifier"], refused))
            continue
        identifier = _next_identifier(row["identifier"]) if row["taken"] else row["identifier"]
        renamed = "" if identifier == row["identifier"] else f", no longer as {row['identifier']}, which Stripe took"
        noted = f"resent by {by}{moved}{renamed}"
        written.append(_write(row, "pending", None, identifier, noted, "retry"))
        decisions.append(Decision(row["identifier"], sent_as=identifier))
    await connection.execute(DECIDE, {"rows": json.dumps(written), "now": now})
    return decisions


async def void(
    connection: AsyncConnection, identifiers: Collection[str], now: datetime, *, by: str, note: str
) -> list[Decision]:
    """Write parked deliveries off: they are never sent, and stay counted as `voided`. The caller commits."""
    rows = (await connection.execute(LOCK, {"identifiers": sorted(identifiers)})).mappings().all()
    noted = f"voided by {by}: {note}"
    parked = [row for row in rows if row["state"] == "parked"]
    written = [_write(row, "voided", noted, row["identifier"], noted, "parked") for row in parked]
    await connection.execute(DECIDE, {"rows": json.dumps(written), "now": now})
    return [Decision(row["identifier"], None if row["state"] == "parked" else "not_parked") for row in rows]


def _refusal(row: Mapping[Any, Any], misnamed: Collection[int], closed: Collection[int], now: datetime) -> str | None:
    if row["state"] != "parked":
        return "not_parked"
    if row["reason"] in ("outcome_unknown", "no_second_left"):
        return str(row["reason"])
    if row["id"] in misnamed:
        return "meter_changed"
    if row["id"] in closed:
        late = "period_closed"
    elif row["timestamp"] < (now - OLDEST_TO_SEND).timestamp():
        late = "older_than_35_days"
    else:
        return None
    return late if _can_be_carried(row) else "cannot_be_carried"


def _can_be_carried(row: Mapping[Any, Any]) -> bool:
    """Only what adds up may be billed in another period than its own, and nothing that Stripe may have taken there."""
    adds_up = row["aggregation"] == "sum" or (row["aggregation"] == "count" and row["events"] == 1)
    return adds_up and row["unknown_since"] is None


def _explain(row: Mapping[Any, Any]) -> dict[str, str | None]:
    happened, remedy = explain_reason(row["reason"])
    return {"happened": happened, "remedy": SETTLE_OR if remedy == CARRY_OR and not _can_be_carried(row) else remedy}


def _next_identifier(identifier: str) -> str:
    again = re.fullmatch(r"(.+)-r(\d+)", identifier)
    return f"{again[1]}-r{int(again[2]) + 1}" if again else f"{identifier}-r2"


def _write(
    row: Mapping[Any, Any], state: str, reason: str | None, identifier: str, noted: str, outcome: str
) -> dict[str, Any]:
    return {
        "id": row["id"],
        "state": state,
        "reason": reason,
        "identifier": identifier,
        "noted": noted,
        "outcome": outcome,
    }


def _show(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "number": row["id"],
        "identifier": row["identifier"],
        "customer": row["customer"],
        "meter": row["event_name"],
        "quantity": plain(row["value"]),
        "events": row["events"],
        "aggregation": row["aggregation"],
        "sender": row["sender"],
        "timestamp": datetime.fromtimestamp(row["timestamp"], UTC),
        "carried_from": row["carried_from"],
        "state": row["state"],
        "reason": row["reason"],
        "since": row["settled_at"],
    }
