"""No secret, signature, portal URL or personal data comes out anywhere: everything is driven with marked ones.

Three real processes log at DEBUG into files, one of them without PostgreSQL and Redis, and every command is run.
Afterwards the logs, the answers, the metrics, the commands' outputs, every table and every key of Redis are searched
for the marks.
"""

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe
import typer
from redis.asyncio import Redis
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typer.testing import CliRunner

from tallystick import cli, db
from tallystick.auth import SCOPES, create_key, roll_key
from tallystick.resources import Resources
from tests.conftest import FakeStripe
from tests.serving import serve
from tests.tokens import AUDIENCE, ISSUER, KEYS, make_claims, make_token
from tests.usage.making import METER, make_meter, read_all, run
from tests.waiting import wait_until

CARD = "4242424242424242"
# A reference may be a name or an address of a person. It is stored and answered, since it is what the product asks for,
# and has no place in logs and metrics.
REFERENCE = "erika.mustermann@reference.example"
REDIS_USER = "leaks"
MADE_SECRET = re.compile(r"(?:tsk_[0-9a-f]{12}_|whsec_)([\w-]{20,})")


@dataclass
class Marks:
    """What must not be found, by name; and the texts to search, by where they are from."""

    secret: dict[str, str] = field(default_factory=lambda: {"card number": CARD})
    texts: dict[str, str] = field(default_factory=dict)

    def make(self, name: str, prefix: str = "") -> str:
        self.secret[name] = prefix + secrets.token_hex(20)
        return self.secret[name]

    def found(self) -> list[tuple[str, str]]:
        """Each mark that stands in a text, with the text's name."""
        return [
            (name, place)
            for place, searched in self.texts.items()
            for name, mark in self.secret.items()
            if mark in searched or mark.encode().hex() in searched  # as bytea is shown
        ] + [
            ("reference", place)
            for place, searched in self.texts.items()
            if place.startswith(("log", "metrics")) and REFERENCE in searched
        ]


@dataclass
class Driven:
    """The two processes, and what they were given."""

    api: httpx.AsyncClient
    alone: httpx.AsyncClient  # a process that reaches neither PostgreSQL nor Redis
    marks: Marks
    resources: Resources
    fake_stripe: FakeStripe
    received: list[str]
    environment: Mapping[str, str]
    cut_off: Mapping[str, str]  # that of the process alone
    answers: list[httpx.Response] = field(default_factory=list)

    async def call(
        self, method: str, path: str, credentials: str | None, *, by: httpx.AsyncClient | None = None, **body: Any
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {credentials}"} if credentials else {}
        answer = await (by or self.api).request(method, path, headers=headers | body.pop("headers", {}), **body)
        self.answers.append(answer)
        return answer

    async def command(self, *arguments: str, alone: bool = False) -> str:
        """What a command prints, errors included; `alone`: where nothing can be reached."""
        runner = CliRunner(env=dict(self.cut_off if alone else self.environment))
        ran = await asyncio.to_thread(runner.invoke, cli.app, list(arguments))
        said = f"{ran.output}\n{ran.exception or ''}"
        for number, made in enumerate(MADE_SECRET.findall(said)):
            # Shown this once; from here on it must be nowhere.
            self.marks.secret[f"secret {number} of {arguments[:2]}"] = made
            said = said.replace(made, "")
        self.marks.texts[f"output of {len(self.marks.texts)}: {' '.join(arguments[:2])}"] = said
        return said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running(command: str, environment: Mapping[str, str], log: Path) -> AsyncIterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tallystick", command], env=environment, stdout=output, stderr=output
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 20)


@asynccontextmanager
async def receiver(received: list[str]) -> AsyncIterator[str]:
    async def receive(request: Request) -> Response:
        received.append((await request.body()).decode())
        return Response(status_code=204 if len(received) > 1 else 500)

    async def list_keys(request: Request) -> Response:
        return Response(json.dumps({"keys": KEYS}), media_type="application/json")

    routes = [Route("/hook", receive, methods=["POST"]), Route("/jwks", list_keys, methods=["GET"])]
    async with serve(Starlette(routes=routes)) as url:
        yield url


@asynccontextmanager
async def redis_user(redis: Redis, password: str) -> AsyncIterator[None]:
    await redis.execute_command("ACL", "SETUSER", REDIS_USER, "on", f">{password}", "~*", "&*", "+@all")
    try:
        yield
    finally:
        await redis.execute_command("ACL", "DELUSER", REDIS_USER)


@asynccontextmanager
async def driving(resources: Resources, fake_stripe: FakeStripe, tmp_path: Path) -> AsyncIterator[Driven]:
    """The processes. When they have ended, their logs and metrics are in `marks.texts`."""
    settings = resources.settings
    marks, port, metrics_port, received = Marks(), free_port(), free_port(), list[str]()
    database_password, redis_password = marks.make("database password"), marks.make("Redis password")
    async with receiver(received) as hook, redis_user(resources.redis, redis_password):
        rules = tmp_path / "rules.toml"
        # Standard Webhooks' secrets are base64: 40 hexadecimal digits are 30 bytes of it.
        rules.write_text(
            f'[[notifications]]\nname = "product"\nallow_private_network = true\n'
            f'url = "{hook}/hook?token={marks.make("address of a receiver")}"\n'
            f'secrets = ["{marks.make("notification secret", "whsec_")}"]\n'
        )
        environment = {
            **{name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "HOME")},
            "DATABASE_URL": settings.database_url.replace("+asyncpg", "").replace("@", f":{database_password}@"),
            "REDIS_URL": settings.redis_url.replace("://", f"://{REDIS_USER}:{redis_password}@"),
            "STRIPE_API_BASE": fake_stripe.url,
            "STRIPE_API_KEY": marks.make("Stripe's API key", "sk_test_"),
            "STRIPE_WEBHOOK_SECRET": marks.make("webhook secret", "whsec_"),
            "TALLYSTICK_JWT_SECRET": marks.make("token secret"),
            "TALLYSTICK_JWT_ISSUER": ISSUER,
            "TALLYSTICK_JWT_AUDIENCE": AUDIENCE,
            "TALLYSTICK_PORTAL_RETURN_ORIGINS": "https://app.example.com",
            "TALLYSTICK_LOG_LEVEL": "DEBUG",
            "TALLYSTICK_PORT": str(port),
            "TALLYSTICK_WORKER_METRICS_PORT": str(metrics_port),
            "TALLYSTICK_RULES_FILE": str(rules),
        }
        alone_port = free_port()
        cut_off = {name: value for name, value in environment.items() if name != "TALLYSTICK_JWT_SECRET"} | {
            "DATABASE_URL": f"postgresql://postgres:{database_password}@127.0.0.1:1/none",
            "REDIS_URL": f"redis://{REDIS_USER}:{redis_password}@127.0.0.1:1/0",
            "TALLYSTICK_JWT_JWKS_URL": f"{hook}/jwks?token={marks.make('address of a key set')}",
            "TALLYSTICK_PORT": str(alone_port),
        }
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as api,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{alone_port}", timeout=20) as alone,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{metrics_port}", timeout=20) as worker,
        ):
            driven = Driven(api, alone, marks, resources, fake_stripe, received, environment, cut_off)
            async with (
                running("serve", environment, tmp_path / "api.log"),
                running("worker", environment, tmp_path / "worker.log"),
                running("serve", cut_off, tmp_path / "alone.log"),
            ):
                await wait_until(lambda: answers(api, "/healthz"))
                await wait_until(lambda: answers(alone, "/healthz"))
                await wait_until(lambda: answers(worker, "/metrics"))
                yield driven
                marks.texts["metrics of the API"] = (await api.get("/metrics")).text
                marks.texts["metrics of the worker"] = (await worker.get("/metrics")).text
                marks.texts["metrics of the one alone"] = (await alone.get("/metrics")).text
            for name in ("api", "worker", "alone"):
                marks.texts[f"log of the {name}"] = (tmp_path / f"{name}.log").read_text()


async def answers(client: httpx.AsyncClient, path: str) -> bool:
    try:
        return (await client.get(path)).status_code == 200
    except httpx.TransportError:
        return False


async def read_everything(driven: Driven) -> None:
    """Read all that was kept and answered into `marks.texts`."""
    marks = driven.marks
    for number, answer in enumerate(driven.answers):
        marks.texts[f"answer {number} to {answer.request.method} {answer.request.url.path}"] = str(
            (dict(answer.headers), answer.text)
        )
    marks.texts |= await read_tables(driven.resources) | await read_redis(driven.resources.redis)
    marks.texts["what the receiver got"] = "".join(driven.received)


async def read_tables(resources: Resources) -> dict[str, str]:
    """Every row of every table as text."""
    names = await read_all(resources, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return {
        f"table {name}": str(await read_all(resources, f"SELECT t::text FROM {name} t"))  # noqa: S608  from the catalog
        for (name,) in names
    }


async def read_redis(redis: Redis) -> dict[str, str]:
    """Every key with its value as text."""
    reading: dict[bytes, Callable[[Any], Awaitable[Any]]] = {
        b"string": lambda key: redis.get(key),
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"set": lambda key: redis.smembers(key),
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
        b"hash": lambda key: redis.hgetall(key),
        b"stream": lambda key: redis.xrange(key),
    }
    found: dict[str, str] = {}
    for key in await redis.keys("*"):
        kind: Any = await redis.type(key)  # bytes, since nothing is decoded here
        found[f"Redis {key!r}"] = str((key, await reading[kind](key)))
    return found


async def test_nothing_that_is_secret_or_personal_comes_out(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tallystick.webhooks.drift.PAUSE_SECONDS", 0)
    async with driving(resources, fake_stripe, tmp_path) as driven:
        await drive_everything(driven)
    await read_everything(driven)
    texts = driven.marks.texts
    assert driven.marks.found() == []
    # The search saw what it had to see.
    assert len(texts["log of the api"].splitlines()) > 5
    assert "tallystick_usage_events_total" in texts["metrics of the API"]
    assert REFERENCE in texts["table customers"]
    assert METER in texts["table usage_totals"]
    assert REFERENCE in texts["table usage_corrections"] + texts["table usage_events"]
    assert "request_failed" in texts["log of the api"]
    assert "delivery_not_sent" in str([said for place, said in texts.items() if place.startswith("output of")])
    assert "storage-failed" in texts["log of the alone"]
    assert sum(name.startswith("secret ") for name in driven.marks.secret) == 2, "a key and an endpoint's secret"


async def drive_everything(driven: Driven) -> None:
    marks = driven.marks
    await make_meter(driven.resources)
    made = await driven.fake_stripe.client.v1.customers.create_async(
        {"email": f"{marks.make('email')}@example.com", "metadata": {"tallystick_ref": REFERENCE}}
    )
    async with db.transaction(driven.resources.engine) as connection:
        key = await create_key(connection, name="driver", source="driver", scopes=list(SCOPES))
        old = await create_key(connection, name="rolled", source="driver", scopes=["usage:write"])
        rolled = await roll_key(connection, old.split("_")[1], timedelta(0), datetime.now(UTC)) or ""
    for name, key_text in (("API key", key), ("rolled key", rolled), ("key that was rolled away", old)):
        marks.secret[name] = key_text.split("_", 2)[2]

    await drive_webhooks(driven, made.id)
    await drive_usage(driven, key, rolled, old)
    await drive_links(driven, key, made.id)
    await drive_portal(driven, key)
    await drive_what_is_away(driven, key)
    await drive_deliveries(driven, key)
    await drive_commands(driven)
    await wait_until(lambda: was_told(driven.received))
    await driven.call("GET", f"/v1/customers/{REFERENCE}/access", key)
    await driven.call("GET", f"/v1/customers/{REFERENCE}/timeline", key)
    await driven.call("GET", "/v1/customers/unknown/access", marks.make("unknown key", "tsk_000000000000_"))
    await driven.call("POST", "/v1/access", key, json={"customers": [marks.make("one of too many")] * 101})


async def drive_links(driven: Driven, key: str, customer: str) -> None:
    path = f"/v1/customers/{REFERENCE}"
    assert (await driven.call("PUT", path, key, json={"customer": customer})).status_code == 200
    await driven.call("PUT", f"/v1/customers/{CARD}", key, json={"customer": customer})
    # A bug of ours: PostgreSQL repeats the reference that it did not take.
    await run(driven.resources, f"ALTER TABLE customer_links ADD CONSTRAINT a_bug CHECK (ref <> 'x{REFERENCE}')")
    try:
        answer = await driven.call("PUT", f"/v1/customers/x{REFERENCE}", key, json={"customer": customer})
    finally:
        await run(driven.resources, "ALTER TABLE customer_links DROP CONSTRAINT a_bug")
    assert answer.status_code == 500
    assert (await driven.call("DELETE", path, key)).status_code < 300
    await driven.call("GET", f"{path}/quota?meter={METER}", key)


async def drive_what_is_away(driven: Driven, key: str) -> None:
    """With the process that reaches neither PostgreSQL nor Redis, and verifies tokens by a key set."""
    marks, alone = driven.marks, driven.alone
    for claims, status in ((make_claims(sub=REFERENCE), 503), (make_claims(sub=REFERENCE, exp=1), 401)):
        token = make_token(claims)
        marks.secret[f"token {len(marks.secret)}"] = token.rpartition(".")[2]
        assert (await driven.call("POST", "/v1/portal/sessions", token, by=alone, json={})).status_code == status
    usage = {"id": "e9", "customer": REFERENCE, "meter": METER}
    assert (await driven.call("POST", "/v1/usage", key, by=alone, json=usage)).status_code == 503
    assert (await driven.call("GET", f"/v1/customers/{REFERENCE}/access", key, by=alone)).status_code == 503
    assert (await driven.call("GET", "/readyz", None, by=alone)).status_code == 503
    event = {"id": "evt_9", "object": "event", "created": int(time.time()), "livemode": False, "type": "x", "data": {}}
    assert (await post_event(driven, json.dumps(event), "webhook secret", by=alone)).status_code == 500


async def drive_deliveries(driven: Driven, key: str) -> None:
    """Usage that Stripe refuses, and what can be asked and decided about it."""
    at = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
    usage = [{"id": f"late-{n}", "customer": REFERENCE, "meter": METER, "timestamp": at} for n in range(2)]
    assert (await driven.call("POST", "/v1/usage", key, json=usage)).status_code == 202
    await driven.command("flush")

    async def is_parked() -> bool:
        return bool(await read_all(driven.resources, "SELECT 1 FROM usage_deliveries WHERE state = 'parked'"))

    await wait_until(is_parked)
    listed = await driven.call("GET", "/v1/usage/parked", key)
    identifier = listed.json()["data"][0]["identifier"]
    await driven.command("parked", "explain", identifier)
    for path, body in (("resend", {}), ("void", {"note": "nobody's"})):
        await driven.call("POST", f"/v1/usage/parked/{identifier}/{path}", key, json=body)
    correction = {"id": "c1", "event_id": "late-0", "action": "void", "reason": "a mistake"}
    assert (await driven.call("POST", "/v1/usage/corrections", key, json=correction)).status_code < 300
    await driven.call("POST", "/v1/usage/corrections", key, json=correction | {"reason": CARD})
    for path in ("/v1/usage/corrections", "/v1/usage/events/late-0", "/v1/usage/conservation", "/v1/periods"):
        assert (await driven.call("GET", path, key)).status_code == 200
    for path in ("/v1/events/evt_0", f"/v1/events/evt_{driven.marks.make('no event')[:20]}"):
        await driven.call("GET", path, key)


# Each command with arguments, but for those that run until they are stopped.
COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "migrate": [()],
    "flush": [("--json",)],
    "doctor": [(), ("--json",)],
    "keys create": [("other", "--scope", "usage:read"), (CARD, "--scope", "usage:read")],
    "keys list": [(), ("--json",)],
    "keys roll": [("000000000000",)],
    "keys revoke": [("000000000000",)],
    "access recompute": [()],
    "notifications list": [(), ("--json",)],
    "notifications replay": [("--dead",)],
    "corrections list": [("--all",), ("--all", "--json")],
    "corrections settle": [("c1", "--note", CARD)],
    "corrections refuse": [("c1", "--note", "no")],
    "parked list": [(), ("--json",)],
    "parked explain": [("1-1",)],
    "parked resend": [("--all",)],
    "parked void": [("1-1", "--note", CARD)],
    "recover": [("--json",)],
    "replay": [("evt_0",), ("evt_unknown",)],
    "sync": [(), ("--check", "--json")],
    "webhooks setup": [("--url", "https://billing.example.com/webhooks/stripe")],
    "reconcile": [("--stripe",), ("--json",)],
    "periods": [("--json",)],
}
LONG_RUNNING = {"run", "demo", "fake-stripe", "serve", "worker"}


async def drive_commands(driven: Driven) -> None:
    for name, calls in COMMANDS.items():
        for arguments in calls:
            await driven.command(*name.split(), *arguments)
    for name in ("doctor", "flush", "keys list"):
        await driven.command(*name.split(), alone=True)


def test_every_command_is_driven() -> None:
    group: Any = typer.main.get_command(cli.app)
    names = {
        f"{name} {part}".strip()
        for name, command in group.commands.items()
        for part in getattr(command, "commands", [""])
    }
    assert names == COMMANDS.keys() | LONG_RUNNING


async def was_told(received: list[str]) -> bool:
    return len(received) > len(set(received))  # the first was answered 500, and so was sent again


async def drive_webhooks(driven: Driven, customer: str) -> None:
    marks = driven.marks
    personal = {
        "name": marks.make("name"),
        "email": f"{marks.make('email of an event')}@example.com",
        "phone": marks.make("phone"),
        "address": {"line1": marks.make("address")},
        "metadata": {"tallystick_ref": REFERENCE, "note": marks.make("metadata")},
    }
    objects: list[dict[str, Any]] = [
        {"id": customer, "object": "customer", "delinquent": False, "invoice_settings": {}} | personal,
        {
            "id": "in_1",
            "object": "invoice",
            "customer": customer,
            "status": "open",
            "customer_email": f"{marks.make('email of an invoice')}@example.com",
            "hosted_invoice_url": marks.make("address of an invoice", "https://pay.example.com/"),
            "lines": {"data": [{"description": marks.make("line")}]},
            "attempted": True,
        },
        {
            "id": "pm_1",
            "object": "payment_method",
            "customer": customer,
            "type": "card",
            "card": {"last4": "4242", "fingerprint": marks.make("fingerprint"), "exp_month": 1, "exp_year": 2031},
            "billing_details": {"name": personal["name"], "email": personal["email"]},
        },
        {"id": "pi_1", "object": "payment_intent", "client_secret": marks.make("client secret"), "customer": customer},
    ]
    types = ("customer.created", "invoice.payment_failed", "payment_method.attached", "payment_intent.created")
    for number, (type_, payload) in enumerate(zip(types, objects, strict=True)):
        event = {
            "id": f"evt_{number}",
            "object": "event",
            "api_version": "2026-10-28.endive",
            "created": int(time.time()),
            "livemode": False,
            "type": type_,
            "data": {"object": payload},
        }
        assert (await post_event(driven, json.dumps(event), "webhook secret")).status_code == 200
    # Refused: another's signature, a body that is none, an event that makes no sense.
    marks.make("another's secret", "whsec_")
    await post_event(driven, json.dumps({"mail": personal["email"]}), "another's secret")
    await post_event(driven, f"{{'{personal['name']}'", "webhook secret")
    await post_event(driven, json.dumps({"id": personal["phone"], "object": "event"}), "webhook secret")


async def post_event(driven: Driven, body: str, secret: str, by: httpx.AsyncClient | None = None) -> httpx.Response:
    signature = stripe.WebhookSignature.generate_signature_header(body, driven.marks.secret[secret])
    driven.marks.secret[f"signature {len(driven.marks.secret)}"] = signature.rpartition("v1=")[2]
    headers = {"Stripe-Signature": signature}
    return await driven.call("POST", "/webhooks/stripe", None, by=by, content=body, headers=headers)


async def drive_usage(driven: Driven, key: str, rolled: str, expired: str) -> None:
    marks = driven.marks
    good = {"id": "e1", "customer": REFERENCE, "meter": METER, "value": "2"}
    assert (await driven.call("POST", "/v1/usage", key, json=good)).status_code == 202
    assert (await driven.call("POST", "/v1/usage", rolled, json=good | {"id": "e2"})).status_code == 202
    assert (await driven.call("POST", "/v1/usage", expired, json=good)).status_code == 401
    for bad in (
        good | {"value": "3"},
        good | {"value": marks.make("value")},
        good | {"timestamp": marks.make("timestamp")},
        {"note": marks.make("unknown field's value")} | good,
        [marks.make("no object")],
    ):
        await driven.call("POST", "/v1/usage", key, json=bad)
    await driven.call("POST", "/v1/usage", key, content=f'{{"id": "{marks.make("broken JSON")}"')
    await driven.call("GET", f"/v1/usage?customer={REFERENCE}&from={marks.make('parameter')}", key)
    await driven.call("GET", f"/v1/usage?customer={REFERENCE}", key)


async def drive_portal(driven: Driven, key: str) -> None:
    marks = driven.marks
    secret = marks.secret["token secret"]
    good = make_token(make_claims(sub=REFERENCE), key=secret, algorithm="HS256", headers={})
    bad = [
        make_token(make_claims(sub=REFERENCE, exp=1), key=secret, algorithm="HS256", headers={}),
        make_token(make_claims(sub=REFERENCE), key="x" * 40, algorithm="HS256", headers={}),
        make_token(make_claims(sub=marks.make("subject")), headers={"kid": marks.make("key id")}),
        marks.make("no token"),
    ]
    for number, token in enumerate([good, *bad]):
        marks.secret[f"token {number}"] = token.rpartition(".")[2]
    for token in bad:
        assert (await driven.call("POST", "/v1/portal/sessions", token, json={})).status_code == 401
    rule = {"method": "POST", "path": "/v1/billing_portal/sessions", "kind": "error_500", "times": 1}
    await driven.fake_stripe.control.post("/_fake/faults", json=rule)
    elsewhere = f"https://evil.example/{marks.make('address to go to')}"
    for body in ({"customer": REFERENCE}, {"customer": CARD}, {"customer": REFERENCE, "return_url": elsewhere}):
        assert (await driven.call("POST", "/v1/portal/sessions", key, json=body)).status_code >= 400
    await driven.resources.redis.delete(*await driven.resources.redis.keys("*portal*"))
    made = await driven.call("POST", "/v1/portal/sessions", good, json={})
    assert made.status_code == 201
    # The one answer that has it is the one that was asked for.
    marks.secret["portal URL"] = made.json()["url"].rpartition("/")[2]
    driven.answers.remove(made)


async def test_the_search_finds_what_was_planted(resources: Resources) -> None:
    marks = Marks({"mark": "planted"})
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("INSERT INTO customers (id, ref) VALUES ('cus_1', :mark)"), {"mark": marks.secret["mark"]}
        )
    await resources.redis.xadd("stream", {"field": marks.secret["mark"]})
    await resources.redis.set("string", marks.secret["mark"])
    await resources.redis.hset("hash", "field", marks.secret["mark"])
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("INSERT INTO api_keys (id, name, source, scopes, secret_sha256) VALUES ('k', 'k', 'k', '{}', :mark)"),
            {"mark": marks.secret["mark"].encode()},
        )
    marks.texts = await read_tables(resources) | await read_redis(resources.redis)
    marks.texts["log"] = json.dumps({"event": marks.secret["mark"]})
    planted = {"table customers", "table api_keys", "Redis b'stream'", "Redis b'string'", "Redis b'hash'", "log"}
    assert {place for _, place in marks.found()} == planted
