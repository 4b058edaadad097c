"""`query`: a month by day of one customer, among more and more customers that each have a year of hourly totals."""

import json
import secrets
from datetime import UTC, datetime, timedelta
from random import Random
from urllib.parse import urlencode

from sqlalchemy import text

from benchmarks.load import WrongAnswer, make_request, put_load
from benchmarks.report import Report, Side, Target, below
from benchmarks.rig import METER, Rig

DAYS_OF_A_YEAR = 365
DAYS_ASKED = 30
CUSTOMERS_PER_STATEMENT = 50
QUESTIONS_PER_SECOND = 100

# Each customer's and each hour's quantity is another, so that a sum over the wrong rows is a wrong sum. All are sealed,
# as those of a year are.
FILL = text("""
    INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, quantity, events, sealed)
    SELECT :run || '-' || customer, :meter, hour, hour + interval '1 hour', quantity, 1, quantity
      FROM generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS customer,
           generate_series(CAST(:start AS timestamptz), CAST(:end AS timestamptz), interval '1 hour') AS hour,
           LATERAL (SELECT customer + extract(hour FROM hour) AS quantity) AS of_hour
""")


async def measure_query(rig: Rig) -> Report:
    """A month by day for one customer, one request after the other, at each number of customers; no yardstick.

    Each question is asked twice. The first time its twenty pages may come from the disk, which says how much memory the
    machine has; the second time they are in memory, whatever the number of customers.
    """
    run = f"query-{secrets.token_hex(3)}"
    headers = await rig.make_headers(run)
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    random = Random(run)
    sides: list[Side] = []
    filled = answers = 0
    bar = rig.bars.add_task("query", total=max(rig.sizes))
    for customers in sorted(rig.sizes):
        while filled < customers:
            last = min(customers, filled + CUSTOMERS_PER_STATEMENT)
            year = {"start": end - timedelta(days=DAYS_OF_A_YEAR), "end": end - timedelta(hours=1)}
            await rig.fill(FILL, run=run, meter=METER, first=filled, last=last - 1, **year)
            filled = last
            rig.bars.update(bar, completed=filled)
        await rig.fill(text("ANALYZE usage_totals"))
        name = f"{customers:,} customers, {customers * DAYS_OF_A_YEAR * 24:,} totals"
        first, again = Side(name, "answers/s"), Side(f"{name}, asked again", "answers/s")
        for turn in range(rig.rounds + 1):
            asked = [random.randrange(customers) for _ in range(max(2, int(rig.seconds * QUESTIONS_PER_SECOND)))]
            requests = [make_request("GET", _question(run, customer, end), b"", headers) for customer in asked]

            def check(index: int, status: int, body: bytes, asked: list[int] = asked) -> None:
                _expect_month(asked[index], status, body)

            for side in (first, again):
                async with rig.measured(side if turn else Side("warming up", "")):
                    result = await put_load([rig.api_port], requests, connections=1, check=check)
                answers += len(asked)
                if turn:
                    side.rates.append(result.per_second)
                    side.latencies += result.latencies
        sides += [first, again]
    smallest, largest = sides[1].percentile_ms(50), sides[-1].percentile_ms(50)
    return Report(
        "query",
        sides,
        None,
        [
            below(20, sides[-2].percentile_ms(99), "ms for 99 % at the last size, asked for the first time"),
            Target(
                "as quick at the last size as at the first when asked again, within a quarter",
                f"{largest / smallest:.2f} times",
                reached=largest < 1.25 * smallest,
            ),
        ],
        f"{answers:,} answers, each with {DAYS_ASKED} days and the right sum of each day",
        memory=rig.memory(),
    )


def _question(run: str, customer: int, end: datetime) -> str:
    window = {"from": (end - timedelta(days=DAYS_ASKED)).isoformat(), "to": end.isoformat(), "window": "day"}
    return "/v1/usage?" + urlencode({"customer": f"{run}-{customer}", **window})


def _expect_month(customer: int, status: int, body: bytes) -> None:
    of_day = str(24 * customer + sum(range(24)))
    days = json.loads(body).get("data", []) if status == 200 else []
    if [day["quantity"] for day in days] != [of_day] * DAYS_ASKED:
        raise WrongAnswer(f"customer {customer}: {status}: {body[:300]!r}")
