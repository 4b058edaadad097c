"""Real parts for every test: PostgreSQL, Valkey and the fake Stripe, one each a test process, emptied before each test.

Nothing is mocked below the wire. The servers do not fsync, which no test here can tell; those that kill servers start
their own.
"""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from stripe import StripeClient

from tallystick import db, schema
from tallystick.app import create_app
from tallystick.auth import SCOPES, create_key
from tallystick.config import Settings
from tallystick.dev.embedded import EmbeddedPostgres, EmbeddedValkey
from tallystick.dev.fake_stripe.app import create_fake_stripe
from tallystick.dev.server_process import is_alive
from tallystick.resources import Resources, open_resources
from tallystick.rules import RulesFile
from tallystick.stripe_gateway import MeterEventSession
from tallystick.usage.partitions import make_partitions
from tests.serving import serve_in_thread

WEBHOOK_SECRET = "whsec_for_tests_0123456789"
SOURCE = "tests"


OWN_FOLDER = pytest.StashKey[Path]()
OWN_FOLDERS = "tallystick-tests-"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give each run of root's a folder of its own, and delete those of runs that have ended.

    Root's servers run as somebody else, who may pass through pytest's common folder until the next run of pytest closes
    it: PostgreSQL ends at its next checkpoint then.
    """
    if os.geteuid() != 0 or config.option.basetemp or hasattr(config, "workerinput"):
        return
    for left in Path(tempfile.gettempdir()).glob(f"{OWN_FOLDERS}[0-9]*-*"):
        if not is_alive(int(left.name.removeprefix(OWN_FOLDERS).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    config.stash[OWN_FOLDER] = Path(tempfile.mkdtemp(prefix=f"{OWN_FOLDERS}{os.getpid()}-"))
    config.option.basetemp = str(config.stash[OWN_FOLDER] / "run")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Delete that folder; after a failure it is kept until the next run."""
    folder = session.config.stash.get(OWN_FOLDER, None)
    if folder is not None and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest, so that none of them is left running alone at the end."""
    marks = {item: item.get_closest_marker("timeout") for item in items}
    items.sort(key=lambda item: -mark.args[0] if (mark := marks[item]) else 0)


@dataclass(frozen=True)
class Servers:
    """The two servers of this test process."""

    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    postgres = EmbeddedPostgres(folder / "postgres", durable=False)
    valkey = EmbeddedValkey(folder / "valkey")
    postgres.start()
    try:
        valkey.start()
        yield Servers(postgres, valkey)
    finally:
        valkey.stop()
        postgres.stop()


@dataclass(frozen=True)
class FakeStripe:
    """A running fake Stripe: its address, and the real SDK's client for it."""

    url: str
    client: StripeClient
    control: httpx.AsyncClient


@pytest.fixture(scope="session")
def fake_stripe_url() -> Iterator[str]:
    """One fake Stripe a test process, in a thread of its own; tests that use it get it empty from `fake_stripe`."""
    with serve_in_thread(create_fake_stripe(webhook_retry_seconds=(0.05, 0.2, 1, 5))) as url:
        yield url


@pytest.fixture(scope="session")
async def used_fake_stripe(fake_stripe_url: str) -> AsyncIterator[FakeStripe]:
    settings = make_settings(stripe_api_base=fake_stripe_url)
    async with (
        httpx.AsyncClient(base_url=fake_stripe_url, timeout=30) as control,
        open_resources(settings, application_name="tests") as resources,
    ):
        yield FakeStripe(fake_stripe_url, resources.stripe, control)


@pytest.fixture
async def fake_stripe(used_fake_stripe: FakeStripe) -> FakeStripe:
    (await used_fake_stripe.control.post("/_fake/reset")).raise_for_status()
    return used_fake_stripe


def make_settings(**changed: object) -> Settings:
    """Settings for a test; whatever is not given points nowhere."""
    values: dict[str, object] = {
        "database_url": "postgresql://127.0.0.1:1/none",
        "redis_url": "redis://127.0.0.1:1/0",
        "stripe_api_key": SecretStr("sk_test_for_tests"),
        "stripe_webhook_secret": (SecretStr(WEBHOOK_SECRET),),
        "stripe_api_base": "http://127.0.0.1:1",
        "portal_return_origins": ("https://app.example.com",),
        "host": "127.0.0.1",
        "port": 0,
    }
    return Settings.model_validate(values | changed)


@pytest.fixture
def settings(servers: Servers, fake_stripe_url: str) -> Settings:
    return make_settings(
        database_url=servers.postgres.url,
        redis_url=servers.valkey.url,
        stripe_api_base=fake_stripe_url,
        database_pool_size=5,
    )


@pytest.fixture(scope="session")
async def open_once() -> AsyncIterator[Callable[[Settings], Awaitable[Resources]]]:
    """Opens resources, or finds them opened: to connect anew takes longer than most tests."""
    opened: dict[Settings, Resources] = {}
    async with AsyncExitStack() as stack:

        async def open_once(settings: Settings) -> Resources:
            if settings not in opened:
                resources = open_resources(settings, application_name="tests")
                opened[settings] = await stack.enter_async_context(resources)
            return opened[settings]

        yield open_once


@pytest.fixture
async def resources(settings: Settings, open_once: Callable[[Settings], Awaitable[Resources]]) -> Resources:
    """Open resources over an empty, migrated database and an empty Valkey."""
    opened = await open_once(settings)
    await empty_stores(opened)
    session = MeterEventSession(opened.stripe)
    return replace(opened, rules=RulesFile(settings.rules_file), meter_event_session=session)


# Children first; `installation` keeps its one row.
TABLES = [
    "notification_deliveries",
    "notifications",
    "usage_corrections",
    "usage_delivery_attempts",
    "usage_deliveries",
    "usage_group_totals",
    "usage_uniques",
    "usage_totals",
    "usage_events",
    "usage_stamps",
    "usage_conflicts",
    "usage_retired",
    "usage_thresholds",
    "usage_threshold_looks",
    "usage_threshold_meters",
    "usage_drifts",
    "usage_checks",
    "meter_error_reports",
    "seal_requests",
    "rate_limits",
    "meters",
    "api_keys",
    "customer_timeline",
    "customer_access",
    "access_rules",
    "customer_links",
    "changed_refs",
    "period_boundaries",
    "billing_periods",
    "active_entitlements",
    "entitlement_summaries",
    "checkout_sessions",
    "payment_methods",
    "invoices",
    "subscription_items",
    "subscriptions",
    "prices",
    "products",
    "customers",
    "event_recovery",
    "mirror_sync",
    "mirror_sync_lists",
    "stripe_event_failures",
    "stripe_events",
]

_migrated: set[str] = set()


async def empty_stores(resources: Resources) -> None:
    """Delete all rows (far quicker than TRUNCATE on small tables) and all keys; migrate when this is the first time."""
    url = resources.settings.database_url
    if url not in _migrated:
        await schema.migrate(resources.engine)
        async with db.transaction(resources.engine) as connection:
            await make_partitions(connection, datetime.now(UTC))
        _migrated.add(url)
    async with db.transaction(resources.engine) as connection:
        # All in one round trip, which SQLAlchemy does not offer; a round trip for each would take most of the time.
        raw = await connection.get_raw_connection()
        driver: Any = raw.driver_connection
        await driver.execute(";".join(f"DELETE FROM {table}" for table in TABLES))  # noqa: S608  names from the list above
    await resources.redis.flushdb()


# FastAPI makes an application's routes ready at its first request, which takes longer than most tests; all that
# belongs to one test is made anew when the application starts.
built_app = cache(create_app)


@pytest.fixture
async def app(resources: Resources) -> AsyncIterator[FastAPI]:
    """The application, started, over the resources' stores."""
    application = built_app(resources.settings)
    async with application.router.lifespan_context(application):
        yield application


@pytest.fixture
async def api_key(resources: Resources) -> str:
    """A key with every scope, whose source is `SOURCE`."""
    async with db.transaction(resources.engine) as connection:
        return await create_key(connection, name="tests", source=SOURCE, scopes=list(SCOPES))


@asynccontextmanager
async def open_client(app: FastAPI, api_key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://tallystick", headers=headers, timeout=20
    ) as client:
        yield client


@pytest.fixture
async def client(app: FastAPI, api_key: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application that sends the API key."""
    async with open_client(app, api_key) as opened:
        yield opened


@pytest.fixture
async def anonymous(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application without a key."""
    async with open_client(app, None) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer's own environment sets must not change a test."""
    for name in list(os.environ):
        if name.startswith(("TALLYSTICK_", "STRIPE_")) or name in ("DATABASE_URL", "REDIS_URL"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def project_root() -> Path:
    return Path(__file__).parents[1]
