"""What the flows are compared with, served as tallystick is: routes that do next to nothing.

GET  /nothing                       a no-op
POST /v1/usage                      read the body, say how long it was
POST /v1/billing/meter_events       take a meter event as Stripe does, and count it: a Stripe without limits
POST /v2/billing/meter_event_session, …/meter_event_stream     the same for the stream, a hundred events a request
GET  /taken                         how many identifiers were taken, and the sum of their values
"""

import json
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

NOTHING = b'{"nothing":true}'


async def answer(request: Request) -> Response:
    """Answer without looking."""
    return Response(NOTHING, media_type="application/json")


async def read(request: Request) -> Response:
    """Read the body and say how long it was."""
    return JSONResponse({"bytes": len(await request.body())}, status_code=202)


async def take_meter_event(request: Request) -> Response:
    """Keep an identifier and its value (https://docs.stripe.com/api/billing/meter-event/create); 400 for a repeat."""
    form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
    identifier, customer = form["identifier"], form["payload[stripe_customer_id]"]
    if not keep(request, identifier, customer, form["payload[value]"]):
        message = f"An event already exists with identifier {identifier}."
        return JSONResponse({"error": {"type": "invalid_request_error", "message": message}}, 400)
    return JSONResponse(
        {
            "object": "billing.meter_event",
            "created": int(form["timestamp"]),
            "event_name": form["event_name"],
            "identifier": identifier,
            "livemode": False,
            "payload": {"value": form["payload[value]"], "stripe_customer_id": customer},
            "timestamp": int(form["timestamp"]),
        }
    )


async def open_session(request: Request) -> Response:
    """A token for the stream, for 15 minutes (https://docs.stripe.com/api/v2/billing/meter-event-stream)."""
    now = datetime.now(UTC)
    return JSONResponse(
        {
            "object": "v2.billing.meter_event_session",
            "id": "mes_benchmark",
            "authentication_token": "token",
            "created": now.isoformat(),
            "expires_at": (now + timedelta(minutes=15)).isoformat(),
            "livemode": False,
        }
    )


async def take_stream(request: Request) -> Response:
    """Keep the identifiers and values of up to a hundred events; a repeat is taken without a word, and counted once."""
    events = json.loads(await request.body())["events"]
    if len(events) > 100:
        return JSONResponse({"error": {"code": "too_many_events", "message": "100 at most"}}, 400)
    for event in events:
        keep(request, event["identifier"], event["payload"]["stripe_customer_id"], event["payload"]["value"])
    return JSONResponse({})


def keep(request: Request, identifier: str, customer: str, value: str) -> bool:
    """Count an identifier, unless it was there before; whether it was new."""
    taken: dict[str, tuple[str, Decimal]] = request.app.state.taken
    if identifier in taken:
        request.app.state.repeats += 1
        return False
    taken[identifier] = customer, Decimal(value)
    return True


async def count_taken(request: Request) -> Response:
    """What was taken so far of the customers whose ids begin with `?customer=`, and the repeats of all."""
    taken: dict[str, tuple[str, Decimal]] = request.app.state.taken
    values = [value for of, value in taken.values() if of.startswith(request.query_params["customer"])]
    repeats = request.app.state.repeats
    return JSONResponse({"identifiers": len(values), "sum": str(sum(values, Decimal(0))), "repeats": repeats})


def main() -> None:
    """Serve on the port of the first argument."""
    app = Starlette(
        routes=[
            Route("/nothing", answer),
            Route("/v1/usage", read, methods=["POST"]),
            Route("/v1/billing/meter_events", take_meter_event, methods=["POST"]),
            Route("/v2/billing/meter_event_session", open_session, methods=["POST"]),
            Route("/v2/billing/meter_event_stream", take_stream, methods=["POST"]),
            Route("/taken", count_taken),
        ]
    )
    app.state.taken = {}
    app.state.repeats = 0
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", log_config=None, access_log=False)


if __name__ == "__main__":
    main()
