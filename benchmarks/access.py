"""`access`: the read that a product makes before it lets a customer in; yardstick: a no-op route."""

import secrets
from itertools import count

from benchmarks.load import WrongAnswer, make_request, put_load
from benchmarks.report import Report, Side, at_least, below
from benchmarks.rig import Rig
from benchmarks.stripe_events import StripeEvents
from benchmarks.turns import http_lane, take_turns

CONNECTIONS = 64


async def measure_access(rig: Rig) -> Report:
    """Access of many customers, read by reference over 64 connections; yardstick: a no-op route."""
    customers = max(rig.sizes)
    events = StripeEvents(secrets.token_hex(3), rig.stack.environment["STRIPE_WEBHOOK_SECRET"], customers)
    headers = await rig.make_headers(f"access-{events.run}")
    # Four times round, each customer has got its own event and its subscription's.
    await put_load([rig.api_port], events.make(4 * customers), connections=32, check=_expect_ok)
    numbers = count()
    asked: list[int] = []

    def make(requests: int) -> list[bytes]:
        asked[:] = [next(numbers) % customers for _ in range(requests)]
        return [make_request("GET", f"/v1/customers/{events.run}-{place}/access", b"", headers) for place in asked]

    def check(index: int, status: int, body: bytes) -> None:
        customer = f'"customer":"cus_{events.run}{asked[index]}","ref":"{events.run}-{asked[index]}","access":"active"'
        if status != 200 or customer.encode() not in body:
            raise WrongAnswer(f"asked for {asked[index]}: {status}: {body[:300]!r}")

    nothing = make_request("GET", "/nothing", b"", {})
    lanes = [
        http_lane(
            Side("tallystick", "requests/s"), [rig.api_port], make, check, connections=CONNECTIONS, first_guess=500
        ),
        http_lane(
            Side("a no-op route", "requests/s"),
            [rig.bare_port],
            lambda requests: [nothing] * requests,
            _expect_ok,
            connections=CONNECTIONS,
            first_guess=5_000,
        ),
    ]
    await take_turns(rig, lanes, "access")
    report = Report(
        "access",
        [lanes[0].side],
        lanes[1].side,
        [],
        f"{next(numbers):,} answers, each the right customer's, active",
        memory=rig.memory(),
    )
    report.targets += [
        at_least(0.4, report.ratio or 0, "of the yardstick"),
        below(20, report.flows[0].percentile_ms(99), "ms for 99 %"),
    ]
    return report


def _expect_ok(index: int, status: int, body: bytes) -> None:
    if status != 200:
        raise WrongAnswer(f"{status}: {body[:300]!r}")
