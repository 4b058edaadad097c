"""The sender for much usage: v2's meter event stream, up to 100 deliveries a request. Live mode only.

Stripe answers before it looks at the events. What it cannot bill comes back as an error report
(`usage/error_reports.py`). A repeat of an identifier counts once: whether it is taken or refused is said nowhere, so
both are understood.
"""

import asyncio
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from time import monotonic

import stripe
from stripe import StripeClient
from stripe.params.v2.billing import MeterEventStreamCreateParamsEvent

from tallystick.stripe_gateway import MeterEventSession, error_code, request_id
from tallystick.stripe_limits import STREAM_EVENTS_PER_REQUEST
from tallystick.usage.senders.outcomes import Message, Outcome, read_outcome

# Said by Stripe when the session has ended before its time.
SESSION_EXPIRED = "billing_meter_event_session_expired"


async def send_stream(
    session: MeterEventSession, messages: Sequence[Message], now: datetime, *, lanes: int, seconds: int
) -> list[Outcome]:
    """Stream the messages, `lanes` requests at a time; an outcome for each, in order.

    A request that Stripe refuses as a whole is said again in halves: one message which cannot be read must not take the
    others along, and that one was taken before says nothing about the others. After `seconds` no further request is
    begun.
    """
    free = asyncio.Semaphore(lanes)
    until = monotonic() + seconds

    async def send(some: Sequence[Message]) -> list[Outcome]:
        if monotonic() > until:
            return [Outcome("retry", "out_of_time")] * len(some)
        async with free:
            outcome = await _stream(session, some, now)
        is_refused = outcome.state == "parked" or outcome.reason == "repeat"
        if not is_refused or len(some) == 1:
            return [outcome] * len(some)
        middle = len(some) // 2
        return await send(some[:middle]) + await send(some[middle:])

    size = STREAM_EVENTS_PER_REQUEST
    requests = [messages[at : at + size] for at in range(0, len(messages), size)]
    return [outcome for answered in await asyncio.gather(*map(send, requests)) for outcome in answered]


async def _stream(session: MeterEventSession, messages: Sequence[Message], now: datetime) -> Outcome:
    try:
        token = await session.current(now)
    except stripe.StripeError as error:
        return _without_session(error)
    key = _new_key(messages)
    try:
        await _request(session.client, token, key, messages)
    except stripe.StripeError as error:
        if error.http_status != 401 and error_code(error) != SESSION_EXPIRED:
            return read_outcome(error)
    else:
        return Outcome("sent", http_status=200, request_id=key)
    # The token ended before its time, which says nothing against the messages: once more with a new one.
    key = _new_key(messages)
    try:
        await _request(session.client, await session.current(now, not_this=token), key, messages)
    except stripe.StripeError as error:
        ended = error.http_status == 401 or error_code(error) == SESSION_EXPIRED
        return _without_session(error) if ended else read_outcome(error)
    return Outcome("sent", http_status=200, request_id=key)


def _new_key(messages: Sequence[Message]) -> str:
    # An error report names a request by its key, and a key that named one of many deliveries would blame the wrong one.
    return messages[0].idempotency_key() if len(messages) == 1 else f"stream-{secrets.token_hex(12)}"


class _Events(list[MeterEventStreamCreateParamsEvent]):
    """The events of a request, which the SDK sends as JSON like any list.

    It writes all parameters as a form besides, of which v2 makes no use: half of the processor time of a delivery. What
    has an `id` goes into a form as that.
    """

    id = "events"


async def _request(client: StripeClient, token: str, key: str, messages: Sequence[Message]) -> None:
    events = _Events(
        {
            "event_name": message.event_name,
            "identifier": message.identifier,
            "payload": message.payload,
            "timestamp": datetime.fromtimestamp(message.timestamp, UTC).isoformat().replace("+00:00", "Z"),
        }
        for message in messages
    )
    await client.v2.billing.meter_event_stream.create_async(
        {"events": events}, {"api_key": token, "idempotency_key": key}
    )


def _without_session(error: stripe.StripeError) -> Outcome:
    """No session, so nothing was said: the deliveries wait, whatever the answer was. In test mode there is none."""
    reason = error_code(error) or type(error).__name__
    return Outcome("retry", f"no_stream_session: {reason}", http_status=error.http_status, request_id=request_id(error))
