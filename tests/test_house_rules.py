"""Rules that hold for the whole of the code, read from the code itself."""

import ast
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import stripe

from tallystick.resources import Resources
from tests.conftest import WEBHOOK_SECRET
from tests.usage.making import read_all

SOURCE = Path(__file__).parents[1] / "src" / "tallystick"
MODULES = sorted(SOURCE.rglob("*.py"))
LONGEST_FILE = 400

# The row's edge, the request's and the loop's: where one failure must not end the others.
BLIND_EXCEPTS = {
    "access/routes.py",
    "access/upkeep.py",
    "loops.py",
    "notifications/delivery.py",
    "plain_routes.py",
    "webhooks/inbox.py",
    "webhooks/refresh.py",
    "webhooks/replay.py",
}


def name_of(module: Path) -> str:
    return module.relative_to(SOURCE).as_posix()


def parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text(), str(module))


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_no_file_is_longer_than_a_reading(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_modules_are_named_for_what_they_hold(module: Path) -> None:
    assert module.stem not in {"utils", "util", "helpers", "helper", "manager", "service", "services", "common", "misc"}


@pytest.mark.parametrize("module", sorted((SOURCE / "usage").rglob("*.py")), ids=name_of)
def test_no_quantity_is_ever_a_float(module: Path) -> None:
    for node in ast.walk(parse(module)):
        assert not (isinstance(node, ast.Name) and node.id == "float"), f"line {node.lineno}"
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), f"line {node.lineno}"


def blind_excepts(module: Path) -> Iterator[int]:
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
        ):
            yield node.lineno


@pytest.mark.parametrize("module", [m for m in MODULES if "dev" not in m.parts], ids=name_of)
def test_everything_is_caught_only_at_the_edges(module: Path) -> None:
    assert not list(blind_excepts(module)) or name_of(module) in BLIND_EXCEPTS


NETWORK = re.compile(r"\.(stripe|redis)\b|httpx|_async\(")


def is_transaction(item: ast.withitem) -> bool:
    call = item.context_expr
    return isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("transaction", "begin"))


@pytest.mark.parametrize("module", [m for m in MODULES if "dev" not in m.parts], ids=name_of)
def test_no_transaction_is_open_while_the_network_is_waited_for(module: Path) -> None:
    """Invariant I5: inside a transaction nothing reaches for Stripe, Redis or HTTP."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.AsyncWith) and any(is_transaction(item) for item in node.items):
            awaited = [part for statement in node.body for part in ast.walk(statement) if isinstance(part, ast.Await)]
            reaching = [text for text in map(ast.unparse, awaited) if NETWORK.search(text)]
            assert not reaching, reaching


# What a table may hold beside ids, statuses, flags and times (invariant I6): the quantities that the product reported,
# the two strings of a meter event, and the ids, statuses and times that a notification tells.
JSON_COLUMNS = {("usage_deliveries", "payload"), ("usage_events", "properties"), ("notifications", "data")}
NUMERIC_TYPES = ("numeric", "double precision", "real", "money")
NUMERIC_COLUMNS = {
    *(("usage_totals", column) for column in ("quantity", "sealed")),
    ("usage_events", "value"),
    ("usage_conflicts", "value"),
    ("usage_deliveries", "value"),
    ("usage_retired", "quantity"),
    ("usage_group_totals", "quantity"),
    *(("usage_drifts", column) for column in ("ours", "stripes")),
    *(("usage_corrections", column) for column in ("value", "delta")),
    *(("usage_thresholds", column) for column in ("threshold", "quantity")),
    ("rate_limits", "tokens"),
}


async def test_no_column_could_hold_an_amount_or_a_payload(resources: Resources) -> None:
    columns = await read_all(
        resources,
        "SELECT table_name, column_name, data_type FROM information_schema.columns"
        " WHERE table_schema = 'public' AND table_name NOT LIKE 'usage_events_%'",
    )
    assert {(table, column) for table, column, kind in columns if kind in ("json", "jsonb")} == JSON_COLUMNS
    numeric = {(table, column) for table, column, kind in columns if kind in NUMERIC_TYPES}
    assert numeric == NUMERIC_COLUMNS
    names = " ".join(str(column) for _, column, _ in columns)
    assert not [word for word in ("amount", "card", "email", "body") if word in names]


async def test_what_stripe_says_about_money_and_people_is_not_kept(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    marked = {"amount": 918273645, "email": "marked@example.com", "last4": "9182"}
    invoice = {
        "id": "in_1",
        "object": "invoice",
        "customer": "cus_1",
        "status": "open",
        "amount_due": marked["amount"],
        "customer_email": marked["email"],
        "payment_settings": {"card": {"last4": marked["last4"]}},
        "lines": {"data": [{"amount": marked["amount"], "description": "marked line"}]},
    }
    header = {
        "id": "evt_1",
        "object": "event",
        "type": "invoice.updated",
        "livemode": False,
        "created": int(time.time()),
    }
    event = json.dumps(header | {"data": {"object": invoice}})
    signature = stripe.WebhookSignature.generate_signature_header(event, WEBHOOK_SECRET)
    answer = await client.post("/webhooks/stripe", content=event, headers={"Stripe-Signature": signature})
    assert answer.json() == {"verdict": "applied"}
    for (table,) in await read_all(resources, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        kept = str(await read_all(resources, f"SELECT t::text FROM {table} t"))  # noqa: S608  names from the catalog
        assert not [value for value in (*map(str, marked.values()), "marked line") if value in kept], table
