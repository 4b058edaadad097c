"""PostgreSQL fails in every way that it can: the answer is 500, nothing is half written, and the repeat succeeds."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from structlog.testing import capture_logs

from tallystick import auth, db
from tallystick.app import create_app
from tallystick.config import Settings
from tallystick.dev.server_process import is_alive
from tallystick.errors import Problem
from tallystick.resources import Resources
from tallystick.webhooks import inbox
from tallystick.webhooks.inbox import record_events
from tallystick.webhooks.verification import StripeEvent
from tests.conftest import Servers, open_client
from tests.usage.making import METER, make_meter
from tests.waiting import wait_until
from tests.webhooks.own_postgres import connect_all, freeze, own_postgres, thaw
from tests.webhooks.stripe_events import customer, event, post, read, read_access, subscription, verified

OTHERS = "FROM pg_stat_activity WHERE application_name = 'tallystick api' AND pid <> pg_backend_pid()"


@pytest.fixture(scope="module")
def servers(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with own_postgres(tmp_path_factory.mktemp("own")) as postgres:
        yield Servers(postgres, servers.valkey)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits as in production, only shorter: nobody wants to wait for seconds here."""
    monkeypatch.setattr(db, "LOCK_TIMEOUT_MS", 300)
    monkeypatch.setattr(inbox, "COMMIT_WITHIN_SECONDS", 0.6)
    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 0.9)
    monkeypatch.setitem(inbox.AGAIN_LIMITS, "lock_timeout", "30ms")


async def assert_refused_then_applied(
    client: httpx.AsyncClient,
    resources: Resources,
    broken: Callable[[], Awaitable[object]],
    mended: Callable[[], object],
) -> None:
    sent = event("customer.subscription.created", subscription())
    await broken()
    try:
        answer = await post(client, sent)
    finally:
        result = mended()
        if isinstance(result, Awaitable):
            await result
    assert answer.status_code == 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:tallystick:problem:storage-failed"
    for table in ("stripe_events", "customers", "subscriptions", "subscription_items", "customer_access"):
        assert await read(resources, f"SELECT * FROM {table}") == [], table  # noqa: S608

    repeat = await repeat_some_times(client, sent)
    assert (repeat.status_code, repeat.json()) == (200, {"verdict": "applied"})
    assert (await read_access(client))[0] == "active"


async def repeat_some_times(client: httpx.AsyncClient, sent: object) -> httpx.Response:
    """As Stripe does; a server that has just started may be slower than the short limits."""
    repeat = await post(client, sent)
    for _ in range(5):
        if repeat.status_code != 500:
            break
        repeat = await post(client, sent)
    return repeat


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_postgresql_is_stopped_or_crashes(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, servers: Servers, how: str
) -> None:
    await connect_all(app)
    down = servers.postgres.stop if how == "stop" else servers.postgres.kill

    async def start() -> None:
        await asyncio.to_thread(servers.postgres.start)

    await assert_refused_then_applied(client, resources, lambda: asyncio.to_thread(down), start)


async def test_postgresql_crashes_in_the_middle_of_a_transaction(
    client: httpx.AsyncClient, resources: Resources, servers: Servers
) -> None:
    sent = event("customer.subscription.created", subscription())
    async with resources.engine.connect() as other:
        await other.execute(text("INSERT INTO customers (id) VALUES ('cus_1')"))
        waiting = await post_until_blocked(client, resources, sent)
        await asyncio.to_thread(servers.postgres.kill)
        answer = await waiting
        await other.invalidate()
    await asyncio.to_thread(servers.postgres.start)

    assert answer.status_code == 500
    assert await read(resources, "SELECT id FROM stripe_events UNION SELECT id FROM customers") == []
    assert (await post(client, sent)).json() == {"verdict": "applied"}


async def test_postgresql_refuses_connections(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, servers: Servers
) -> None:
    """As while it starts, or has too many: it answers, by an error of its own."""
    sent = event("customer.subscription.created", subscription())
    assert (await post(client, sent)).status_code == 200
    assert (await read_access(client))[0] == "active"  # the key is known from now on
    elsewhere = await asyncpg.connect(servers.postgres.url.replace("/tallystick", "/postgres"))
    await elsewhere.execute("ALTER DATABASE tallystick ALLOW_CONNECTIONS false")
    try:
        await app.state.resources.engine.dispose()
        read_answer, webhook = await client.get("/v1/customers/cus_1/access"), await post(client, sent)
    finally:
        await elsewhere.execute("ALTER DATABASE tallystick ALLOW_CONNECTIONS true")
        await elsewhere.close()
    assert (read_answer.status_code, webhook.status_code) == (503, 500)
    assert webhook.json()["type"] == "urn:tallystick:problem:storage-failed"
    assert (await read_access(client))[0] == "active"
    assert (await post(client, sent)).json() == {"verdict": "duplicate"}


async def test_postgresql_is_frozen(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, servers: Servers
) -> None:
    """Neither dead nor alive: connections stay open, new ones are taken by the system, and nobody answers."""
    await connect_all(app)
    frozen: list[int] = []

    async def freeze_all() -> None:
        frozen.extend(freeze(servers.postgres))

    await assert_refused_then_applied(client, resources, freeze_all, lambda: thaw(frozen))


@pytest.mark.parametrize("told_as", [ConnectionResetError, RuntimeError, KeyError])
async def test_who_listens_in_its_place_closes_every_connection(
    app: FastAPI,
    client: httpx.AsyncClient,
    resources: Resources,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    told_as: type[Exception],
) -> None:
    """As a proxy does whose server is away. uvloop may tell it as a RuntimeError; KeyError stands for any surprise."""
    monkeypatch.setattr(auth, "FRESH_FOR", timedelta(0))
    await make_meter(resources)
    usage = {"customer": "acme", "meter": METER, "value": "1"}
    assert (await client.post("/v1/usage", json=usage | {"id": "before"})).status_code == 202
    await connect_all(app)
    connect = asyncpg.connect

    async def connect_and_tell(*arguments: Any, **options: Any) -> Any:
        try:
            return await connect(*arguments, **options)
        except OSError as error:
            raise told_as("closed") from error

    monkeypatch.setattr(asyncpg, "connect", connect_and_tell)
    sent = [event("customer.created", customer(f"cus_{n}")) for n in range(inbox.BATCHES_AT_ONCE + 1)]
    await asyncio.to_thread(servers.postgres.stop)
    in_its_place = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", servers.postgres.port)
    try:
        with capture_logs() as logs:
            answers = [await post(client, one) for one in sent]
            meanwhile = await client.post("/v1/usage", json=usage | {"id": "meanwhile"})
    finally:
        in_its_place.close()
        await in_its_place.wait_closed()
        await asyncio.to_thread(servers.postgres.start)

    assert {answer.json()["type"] for answer in answers} == {"urn:tallystick:problem:storage-failed"}
    for one in sent:
        assert (await repeat_some_times(client, one)).json() == {"verdict": "applied"}
    if told_as is not KeyError:
        assert meanwhile.status_code == 202
        assert "stripe_event_failed" not in {line["event"] for line in logs}
    assert await read(resources, "SELECT id FROM stripe_event_failures") == []


async def test_postgresql_is_a_standby_that_is_promoted(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, servers: Servers
) -> None:
    """As after a failover whose new primary is not there yet: it answers, and takes no writes."""
    await connect_all(app)

    async def become_standby() -> None:
        await asyncio.to_thread(servers.postgres.stop)
        (servers.postgres.data_dir / "standby.signal").touch()
        await asyncio.to_thread(servers.postgres.start)

    async def promote() -> None:
        async with resources.engine.connect() as connection:
            assert await connection.scalar(text("SELECT pg_promote()"))

    await assert_refused_then_applied(client, resources, become_standby, promote)


async def test_all_connections_are_in_use(app: FastAPI, client: httpx.AsyncClient, resources: Resources) -> None:
    engine: AsyncEngine = app.state.resources.engine
    async with AsyncExitStack() as held:

        async def hold_all() -> None:
            for _ in range(resources.settings.database_pool_size):
                await held.enter_async_context(engine.connect())

        await assert_refused_then_applied(client, resources, hold_all, held.aclose)


async def test_postgresql_is_read_only(client: httpx.AsyncClient, resources: Resources) -> None:
    async def set_read_only(value: str) -> None:
        async with resources.engine.connect() as connection:
            await connection.execute(text("SET default_transaction_read_only = off"))
            await connection.commit()
            await connection.execute(text(f"ALTER DATABASE tallystick SET default_transaction_read_only = {value}"))
            await connection.execute(text(f"SELECT pg_terminate_backend(pid) {OTHERS}"))
            await connection.commit()

    await assert_refused_then_applied(client, resources, lambda: set_read_only("on"), lambda: set_read_only("off"))


async def test_a_row_is_locked_by_somebody_else(client: httpx.AsyncClient, resources: Resources) -> None:
    async with resources.engine.connect() as other:

        async def lock() -> None:
            # An insert that is not committed yet: whoever inserts the same customer has to wait for it.
            await other.execute(text("INSERT INTO customers (id) VALUES ('cus_1')"))

        await assert_refused_then_applied(client, resources, lock, other.rollback)


async def submit_together(app: FastAPI, sent: Iterable[dict[str, Any]]) -> list[str]:
    """What becomes of events that share a batch: the verdict, or the problem's type."""
    resources: Resources = app.state.resources
    received = [verified(resources, one) for one in sent]
    answers = await asyncio.gather(*map(app.state.inbox.submit, received), return_exceptions=True)
    return [answer.type if isinstance(answer, Problem) else str(answer) for answer in answers]


async def test_a_locked_customer_does_not_keep_those_who_come_with_it(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 5)
    sent = [event("customer.created", customer(f"cus_{n}")) for n in range(8)]
    async with blocked(resources) as other:
        told = await submit_together(app, sent)
        await other.rollback()

    assert told == ["applied", "storage-failed"] + ["applied"] * 6
    assert (await post(client, sent[1])).json() == {"verdict": "applied"}


@pytest.mark.parametrize("state", ["57014", "40P01"])
async def test_a_slow_or_deadlocked_customer_does_not_keep_those_who_come_with_it(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, state: str
) -> None:
    # A trigger stands for what is slow about the customer; the error is PostgreSQL's own.
    async with db.transaction(resources.engine) as connection:
        await connection.exec_driver_sql(
            "CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql"
            f" AS 'BEGIN RAISE EXCEPTION USING ERRCODE = $${state}$$; END'"
        )
        await connection.exec_driver_sql(
            "CREATE TRIGGER hold_up BEFORE INSERT ON customers FOR EACH ROW WHEN (new.id = 'cus_1')"
            " EXECUTE FUNCTION hold_up()"
        )
    sent = [event("customer.created", customer(f"cus_{n}")) for n in range(8)]
    try:
        told = await submit_together(app, sent)
    finally:
        async with db.transaction(resources.engine) as connection:
            await connection.exec_driver_sql("DROP FUNCTION hold_up CASCADE")

    assert told == ["applied", "storage-failed"] + ["applied"] * 6
    assert (await post(client, sent[1])).json() == {"verdict": "applied"}


async def test_what_was_held_up_is_not_tried_again_when_nobody_waits_any_more(
    app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 0.1)
    tried: list[int] = []

    async def record(connection: db.Connection, events: Sequence[StripeEvent], *rest: Any) -> list[inbox.Verdict]:
        tried.append(len(events))
        return await record_events(connection, events, *rest)

    monkeypatch.setattr(inbox, "record_events", record)
    async with blocked(resources) as other:
        told = await submit_together(app, [event("customer.created", customer(f"cus_{n}")) for n in range(8)])
        await app.state.inbox.stop()  # once the batch is settled
        await other.rollback()

    assert told == ["storage-failed"] * 8
    assert tried == [8]


async def test_when_postgresql_fails_after_a_bug_the_rest_of_the_batch_is_not_tried(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    async def record(_: db.Connection, events: Sequence[StripeEvent], *__: Any) -> list[inbox.Verdict]:
        tried.append(len(events))
        raise TimeoutError if len(tried) > 1 else KeyError

    monkeypatch.setattr(inbox, "record_events", record)

    told = await submit_together(app, [event("customer.created", customer(f"cus_{n}")) for n in range(8)])

    assert told == ["storage-failed"] * 8
    assert tried == [8, 1]


async def test_the_connection_is_cut_in_the_middle(client: httpx.AsyncClient, resources: Resources) -> None:
    sent = event("customer.subscription.created", subscription())
    async with blocked(resources) as other:
        waiting = await post_until_blocked(client, resources, sent)
        await other.execute(text(f"SELECT pg_terminate_backend(pid) {OTHERS} AND wait_event_type = 'Lock'"))
        answer = await waiting

    assert answer.status_code == 500
    assert await read(resources, "SELECT id FROM stripe_events UNION SELECT id FROM subscriptions") == []
    assert (await post(client, sent)).json() == {"verdict": "applied"}


async def test_an_idle_connection_that_was_cut_is_replaced(client: httpx.AsyncClient, resources: Resources) -> None:
    assert (await post(client, event("customer.created", customer()))).status_code == 200
    pids = [row["pid"] for row in await read(resources, f"SELECT pid {OTHERS}")]
    assert pids
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM unnest(CAST(:pids AS int[])) p(pid)"), {"pids": pids}
        )

    async def is_cut() -> bool:  # a session is in no list any more some time before its process closes the connection
        return not any(is_alive(pid) for pid in pids)

    await wait_until(is_cut)
    await read(resources, "SELECT 1")  # one more round trip, in which the event loop hears of it
    assert (await post(client, event("customer.updated", customer(), at=1))).json() == {"verdict": "applied"}


async def test_callers_that_go_away_lose_nothing_and_break_nothing(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    sent = [event("customer.subscription.created", subscription(), at=at) for at in range(inbox.BATCHES_AT_ONCE + 1)]
    for one in sent:
        async with blocked(resources) as other:
            waiting = await post_until_blocked(client, resources, one)
            waiting.cancel()
            await asyncio.wait([waiting])
            await other.rollback()
        # The repeat waits for the first copy's commit, and is recognised.
        assert (await post(client, one)).json() == {"verdict": "duplicate"}

    assert (await read_access(client))[0] == "active"


async def test_a_caller_that_gave_up_waiting_finds_its_event_committed(
    client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 0.05)
    monkeypatch.setattr(inbox, "COMMIT_WITHIN_SECONDS", 5)
    sent = event("customer.subscription.created", subscription())
    async with blocked(resources) as other:
        answer = await post(client, sent)
        await other.rollback()
    assert answer.status_code == 500

    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 5)
    monkeypatch.setattr(inbox, "COMMIT_WITHIN_SECONDS", 5)
    again = await post(client, sent)
    while again.status_code == 500:  # its first commit may still be under way; Stripe would send again too
        again = await post(client, sent)
    assert again.json() == {"verdict": "duplicate"}


async def test_too_many_waiting_events_are_refused(
    client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MAX_WAITING", 3)
    sent = [event("customer.subscription.created", subscription()) for _ in range(10)]
    async with blocked(resources) as other:
        answers = [asyncio.create_task(post(client, one)) for one in sent]
        await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        await other.rollback()
    told = {(answer.status_code, answer.headers.get("retry-after")) for answer in await asyncio.gather(*answers)}

    assert told == {(200, None), (503, "5")}
    assert {(await post(client, one)).status_code for one in sent} == {200}
    assert len(await read(resources, "SELECT id FROM stripe_events")) == len(sent)


async def test_what_was_taken_is_committed_before_the_stop(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources
) -> None:
    async with blocked(resources) as other:
        sent = event("customer.subscription.created", subscription())
        taken = await post_until_blocked(client, resources, sent)
        stopping = asyncio.create_task(app.state.inbox.stop())
        await asyncio.sleep(0)
        refused = await post(client, event("customer.created", customer()))
        await other.rollback()
        await stopping

    assert (await taken).json() == {"verdict": "applied"}
    assert refused.status_code == 500


async def test_what_cannot_be_committed_before_the_stop_is_answered_at_once(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "COMMIT_WITHIN_SECONDS", 60)
    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 60)
    monkeypatch.setattr(inbox, "STOP_WITHIN_SECONDS", 0)
    async with blocked(resources) as other:
        taken = await post_until_blocked(client, resources, event("customer.created", customer()))
        await app.state.inbox.stop()
        async with asyncio.timeout(10):
            answer = await taken
        await other.rollback()

    assert (answer.status_code, answer.json()["detail"]) == (500, "The service is stopping.")


async def test_a_frozen_server_does_not_keep_the_process_from_its_end(
    settings: Settings, resources: Resources, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "COMMAND_TIMEOUT_SECONDS", 60)
    monkeypatch.setattr(inbox, "COMMIT_WITHIN_SECONDS", 60)
    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 60)
    monkeypatch.setattr(inbox, "STOP_WITHIN_SECONDS", 0.1)
    monkeypatch.setattr("tallystick.resources.CLOSE_WITHIN_SECONDS", 0.1)
    ending = create_app(settings)
    async with AsyncExitStack() as afterwards:
        async with asyncio.timeout(15), ending.router.lifespan_context(ending):
            client = await afterwards.enter_async_context(open_client(ending, None))
            pool: Any = ending.state.resources.engine.pool
            await connect_all(ending)
            afterwards.callback(thaw, freeze(servers.postgres))
            waiting = asyncio.create_task(post(client, event("customer.created", customer())))

            async def is_being_committed() -> bool:
                return bool(pool.checkedout())

            await wait_until(is_being_committed)
            waiting.cancel()  # as the server does with what it cannot answer in time
        assert waiting.cancelled()


@asynccontextmanager
async def blocked(resources: Resources) -> AsyncIterator[AsyncConnection]:
    """While this is open, and until a rollback, whoever touches the customer cus_1 waits."""
    async with resources.engine.connect() as connection:
        touch = "INSERT INTO customers (id) VALUES ('cus_1') ON CONFLICT (id) DO UPDATE SET updated_at = now()"
        await connection.execute(text(touch))
        yield connection


async def post_until_blocked(
    client: httpx.AsyncClient, resources: Resources, sent: object
) -> asyncio.Task[httpx.Response]:
    """A request that waits for a lock; one that has given up before it was seen waiting is sent again."""
    waiting = asyncio.create_task(post(client, sent))
    async with resources.engine.connect() as watching:
        while not await watching.scalar(text(f"SELECT count(*) {OTHERS} AND wait_event_type = 'Lock'")):
            await watching.rollback()  # the view is frozen within a transaction
            await asyncio.sleep(0.005)
            if waiting.done():
                waiting = asyncio.create_task(post(client, sent))
    return waiting
