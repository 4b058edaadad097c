"""PostgreSQL: the engine with its time limits, transactions, and what counts as 'storage failed'."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Protocol

import asyncpg
from sqlalchemy import PoolProxiedConnection, TextClause, event, text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    InvalidRequestError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tallystick.config import Settings

# Together they keep the worst case of one transaction below the 10 s after which a webhook sender should have its
# answer.
POOL_TIMEOUT_SECONDS = 2
CONNECT_TIMEOUT_SECONDS = 2
LOCK_TIMEOUT_MS = 3_000
STATEMENT_TIMEOUT_MS = 5_000
# The server enforces the statement's limit; this one is for a server that no longer answers at all.
COMMAND_TIMEOUT_SECONDS = 7
IDLE_IN_TRANSACTION_TIMEOUT_MS = 30_000

# The driver prepares longer statements anew each time. That which writes all kinds of the mirror has 19,000 characters.
MAX_PREPARED_BYTES = 64 * 1024

# A network that drops connections without a word, as firewalls do with idle ones, takes longer than this.
TRUSTED_FOR_SECONDS = 30

# What is past a retention is deleted in transactions of well below a second, and up to a million rows a run.
ROWS_PER_DELETE = 5_000
DELETES_PER_RUN = 200


def create_engine(settings: Settings, *, application_name: str) -> AsyncEngine:
    """A pool of connections with every time limit set. Nothing is connected yet."""
    engine = create_async_engine(
        settings.database_url,
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        pool_use_lifo=True,
        # Errors are logged; what was sent with a statement (references, ids) is nobody's business there.
        hide_parameters=True,
        connect_args={
            "async_creator_fn": _connect,
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": COMMAND_TIMEOUT_SECONDS,
            "max_cacheable_statement_size": MAX_PREPARED_BYTES,
            "server_settings": {
                "application_name": application_name,
                "timezone": "UTC",
                "lock_timeout": str(LOCK_TIMEOUT_MS),
                "statement_timeout": str(STATEMENT_TIMEOUT_MS),
                "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_TIMEOUT_MS),
                # Planning the set-based statements anew costs more than running them; their plans do not depend on
                # values.
                "jit": "off",
                # What is looked up here is in memory, or on a disk without moving parts. By PostgreSQL's default of 4,
                # reading a whole table of a thousand rows passes for cheaper than finding ten of them.
                "random_page_cost": "1.1",
            },
        },
    )
    _replace_cut_connections(engine)
    return engine


async def _connect(*arguments: Any, **options: Any) -> Any:
    """A new connection of the driver's."""
    try:
        return await asyncpg.connect(*arguments, **options)
    except RuntimeError as error:
        # uvloop says it of a connection that was cut between two steps of opening it.
        raise ConnectionResetError("PostgreSQL closed the connection while it was opened") from error


def _replace_cut_connections(engine: AsyncEngine) -> None:
    """A connection that was cut while it was idle is replaced before it is used, so that no request fails by it.

    The driver knows of the cut without asking. SQLAlchemy's `pool_pre_ping` would ask each time, at the price of three
    round trips for each transaction; here only a connection that has been idle for long is asked.
    """

    @event.listens_for(engine.sync_engine, "checkin")
    def note_return(_: Any, record: Any) -> None:
        record.info["returned_at"] = time.monotonic()

    @event.listens_for(engine.sync_engine, "checkout")
    def refuse_cut(connection: Any, record: Any, _: Any) -> None:
        idle = time.monotonic() - record.info.get("returned_at", time.monotonic())
        cut = connection.driver_connection.is_closed()
        if cut or (idle > TRUSTED_FOR_SECONDS and not _answers(engine, connection)):
            raise DisconnectionError  # the pool makes a new one


def _answers(engine: AsyncEngine, connection: Any) -> bool:
    try:
        return engine.dialect.do_ping(connection)
    except (engine.dialect.loaded_dbapi.Error, OSError, TimeoutError):
        return False


# What SQLSTATEs begin with that say nothing against the statement itself.
_STORAGE_SQLSTATE = {
    "08": "the connection",
    "25006": "a server that only reads, as a standby does",
    "40": "the transaction rolled back, as after a deadlock",
    "53": "resources: the disk, memory, connections",
    "55": "an object in use; 55P03 is the lock's time-out",
    "57": "an operator, a shutdown, a crash; 57014 is the statement's time-out",
    "58": "the system: I/O",
    "XX": "a fault inside PostgreSQL, damaged data among them",
}

# The second comes when PostgreSQL ends a session between two steps of a statement, and the driver hears of the end in
# the same breath as of the first step's success.
_CONNECTION_GONE = (asyncpg.InterfaceError, asyncpg.InternalClientError)


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error means that PostgreSQL could not do its work, rather than that we asked for nonsense."""
    if isinstance(error, PoolTimeout | TimeoutError | OSError | InterfaceError | OperationalError):
        return True
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        error = error.orig or error
    if isinstance(error, _CONNECTION_GONE):
        return True
    return str(getattr(error, "sqlstate", None) or "").startswith(tuple(_STORAGE_SQLSTATE))


def is_lock_timeout(error: DBAPIError) -> bool:
    """Whether a lock was not to be had within `lock_timeout`."""
    return getattr(error.orig, "sqlstate", None) == "55P03"


# PostgreSQL is there, and ended a statement that met a lock, took too long, or was in a deadlock.
_HELD_UP = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError, asyncpg.DeadlockDetectedError)


def is_held_up(error: BaseException) -> bool:
    """Whether a direct transaction failed by something that others may not meet: a row's lock, or a slow statement."""
    return isinstance(error, _HELD_UP)


STORAGE_ERRORS = (SQLAlchemyError, OSError, TimeoutError, asyncpg.PostgresError, *_CONNECTION_GONE)


_DIALECT = PGDialect_asyncpg()  # type: ignore[no-untyped-call]


@contextmanager
def _told_when_cut_again() -> Iterator[None]:
    """Raise `ConnectionError` where the pool says otherwise that it made a new connection and that was cut, too.

    SQLAlchemy has no error of its own for this; by its class alone it would pass for a misuse of ours.
    """
    try:
        yield
    except InvalidRequestError as error:
        if error.args != ("This connection is closed",):
            raise
        raise ConnectionError("PostgreSQL ends new sessions at once") from error


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction: committed at the end of the block, rolled back by an exception."""
    with _told_when_cut_again():
        async with engine.begin() as connection:
            yield connection


class Row(asyncpg.Record):  # type: ignore[misc]  # the driver has no types
    """A row of a direct transaction: its columns are attributes, as they are of SQLAlchemy's."""

    __getattr__ = asyncpg.Record.__getitem__


class Rows(list[Any]):
    """The rows that a statement of a direct transaction returned, with the one method of SQLAlchemy's that is used."""

    def scalars(self) -> list[Any]:
        """The first column."""
        return [row[0] for row in self]


class Connection(Protocol):
    """What a function needs that runs in its caller's transaction, of either kind."""

    async def execute(self, statement: TextClause, parameters: Mapping[str, Any], /) -> Any:
        """Run a statement with parameters by name; its rows can be iterated over."""


class DirectConnection:
    """A connection whose statements go to the driver, with nothing in between but the names of their parameters."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def execute(self, statement: TextClause, parameters: Mapping[str, Any], /) -> Rows:
        """Run a statement with parameters by name. Raises what the driver raises (`STORAGE_ERRORS`)."""
        sql, names = _number(statement)
        return Rows(await self._driver.fetch(sql, *[parameters[name] for name in names], record_class=Row))


@lru_cache
def _number(statement: TextClause) -> tuple[str, tuple[str, ...]]:
    """The statement with its parameters as `$1`, `$2`, and their names in this order."""
    compiled = statement.compile(dialect=_DIALECT)
    return str(compiled), tuple(compiled.positiontup or ())


async def _take_from_pool(engine: AsyncEngine) -> PoolProxiedConnection:
    try:
        with _told_when_cut_again():
            return await engine.raw_connection()
    except engine.dialect.loaded_dbapi.Error as error:  # of SQLAlchemy's adapter, which it hides everywhere else
        raise (error.__cause__ or error) from None


@asynccontextmanager
async def direct_transaction(engine: AsyncEngine) -> AsyncIterator[DirectConnection]:
    """A transaction as `transaction` is, for flows of many short statements.

    SQLAlchemy's part of those costs more than the driver's (docs/decisions/0016-direct-transactions.md). The connection
    is one of its pool, with the same limits.
    """
    pooled = await _take_from_pool(engine)
    driver: Any = pooled.driver_connection
    ended = False
    try:
        await driver.execute("BEGIN")
        try:
            yield DirectConnection(driver)
        except asyncpg.PostgresError:
            await driver.execute("ROLLBACK")
            ended = True
            raise
        # PostgreSQL answers ROLLBACK, and no error, where a statement had failed before.
        if await driver.execute("COMMIT") != "COMMIT":
            raise ConnectionError("PostgreSQL rolled the transaction back")
        ended = True
    finally:
        if not ended:  # cancelled, cut, or a bug of ours: PostgreSQL rolls it back, and the pool makes a new connection
            driver.terminate()
        pooled.close()


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[DirectConnection]:
    """A connection for one statement that only reads: without BEGIN and COMMIT it costs one round trip, not three."""
    pooled = await _take_from_pool(engine)
    driver: Any = pooled.driver_connection
    usable = False
    try:
        try:
            yield DirectConnection(driver)
        except asyncpg.PostgresError:
            usable = True  # refused, and the connection as good as before
            raise
        usable = True
    finally:
        if not usable:  # what it was sent last may still be going on
            driver.terminate()
        pooled.close()


async def fetch_patiently(
    connection: AsyncConnection, statement: str, parameters: Sequence[Any], patience: timedelta
) -> list[Mapping[str, Any]]:
    """Run a statement that may take longer than a request's may, within the connection's transaction; its rows.

    Parameters are the driver's (`$1`). The rest of the transaction keeps the longer limit of the server. Raises
    `TimeoutError` after `patience`, and `ConnectionError` for whatever else PostgreSQL says.
    """
    # The engine's connections give up after seconds, the server's side (`statement_timeout`) and the driver's alike,
    # and SQLAlchemy cannot tell the driver to wait longer for one statement.
    milliseconds = patience // timedelta(milliseconds=1)
    await connection.execute(text(f"SET LOCAL statement_timeout = {milliseconds}"))
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    try:
        rows: list[Mapping[str, Any]] = await driver.fetch(statement, *parameters, timeout=patience.total_seconds() + 2)
    except asyncpg.QueryCanceledError as error:
        raise TimeoutError(f"it took longer than {patience}") from error
    except asyncpg.PostgresError as error:
        raise ConnectionError(f"PostgreSQL could not do it: {type(error).__name__}") from error
    return rows


async def delete_old(engine: AsyncEngine, statement: TextClause, oldest: datetime) -> int:
    """Run a statement that deletes up to `:limit` rows older than `:oldest`, a transaction each time; how many rows.

    Until there are none left, or for some hundred times: the rest is for the next run.
    """
    deleted = 0
    for _ in range(DELETES_PER_RUN):
        async with transaction(engine) as connection:
            rows = (await connection.execute(statement, {"oldest": oldest, "limit": ROWS_PER_DELETE})).rowcount
        # Died here: the next run deletes the rest.
        deleted += rows
        if rows < ROWS_PER_DELETE:
            break
    return deleted


def to_columns(names: Sequence[str], rows: Sequence[tuple[object, ...]]) -> dict[str, list[object]]:
    """The rows as parameters of one array a column, for `unnest`: PostgreSQL reads those faster than JSON."""
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}
