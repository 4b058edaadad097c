"""Requests with usage: any number of distinct events, of many customers, built as fast as they are sent."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count

from benchmarks.load import Check, WrongAnswer, make_request
from benchmarks.rig import METER

# As many totals as a transaction of the drain may touch, and no more than a small product has customers.
CUSTOMERS = 1_000
VALUE = Decimal("1.25")
# Odd, so that it maps the numbers up to 2⁶⁴ onto one another: ids that no index finds in order, as random ones are.
SCATTER = 0x9E3779B97F4A7C15


class UsageRequests:
    """The events of one source. `made`: how many there are so far, and so what the ledger must hold in the end."""

    def __init__(self, source: str, headers: Mapping[str, str]) -> None:
        self.source = source
        self.made = 0
        self._headers = headers
        self._numbers = count()
        self._at = (datetime.now(UTC) - timedelta(hours=2)).isoformat()

    @property
    def quantity(self) -> Decimal:
        return VALUE * self.made

    def make(self, requests: int, events: int) -> list[bytes]:
        """So many requests of so many new events each."""
        self.made += requests * events
        return [self._make_request(events) for _ in range(requests)]

    def make_probe(self) -> tuple[str, bytes]:
        """A new event of a customer that has no other: that customer, and the body."""
        number = next(self._numbers)
        self.made += 1
        customer = f"{self.source}-probe-{number}"
        at = datetime.now(UTC).isoformat()
        event = {"id": f"probe-{number}", "customer": customer, "meter": METER, "value": str(VALUE), "timestamp": at}
        return customer, json.dumps(event).encode()

    def _make_request(self, events: int) -> bytes:
        written = [
            f'{{"id":"u{number * SCATTER % 2**64:016x}","customer":"{self.source}-{number % CUSTOMERS}",'
            f'"meter":"{METER}","value":"{VALUE}","timestamp":"{self._at}"}}'
            for number, _ in zip(self._numbers, range(events), strict=False)
        ]
        body = written[0] if events == 1 else f"[{','.join(written)}]"
        return make_request("POST", "/v1/usage", body.encode(), self._headers)


def expect_accepted(events: int) -> Check:
    """A check that all events of each request were taken."""
    expected = b'{"accepted":%d,"duplicates":0,"rejected":[]}' % events

    def check(index: int, status: int, body: bytes) -> None:
        if (status, body) != (202, expected):
            raise WrongAnswer(f"{status}: {body[:300]!r}")

    return check
