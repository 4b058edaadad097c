"""The terminal: what all commands share. Results go to standard output, progress and errors to standard error."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console

from tallystick.errors import SettingsError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table

    from tallystick.resources import Resources

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# Wider than any row.
WHOLE = 10_000

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong, and stop with exit code 1."""
    err.print("[bold red]error:[/] ", end="", markup=True)
    err.print(message, markup=False)
    sys.exit(1)


def claim_port(port: int, name: str, host: str) -> int:
    """A free port: the given one, which must be free on every address of the host, or any for 0.

    Raises `SettingsError`, whose text has the `name` of the setting. A server that finds it out by itself says so in
    many lines, or by a traceback.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, _, _, address in found:
            with socket.socket(family, kind) as probe:
                # As servers have it: what is left of connections of an earlier one does not matter.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                port = port or int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"port {port} ({name}) is taken: is another tallystick running?") from None
        if error.errno != errno.EAFNOSUPPORT:  # no IPv6 here, which servers pass over
            raise SettingsError(f"port {port} ({name}) of {host} cannot be used: {error.strerror}") from None
    return port


def print_table(table: Table) -> None:
    """Print a table with nothing left out.

    At a terminal long cells are folded between their words, and a word stays whole, such as an id, which is there to
    be copied. Elsewhere a program may look for something, so that each row is whole.
    """
    for column in table.columns:
        words = " ".join([str(column.header), *map(str, column.cells)]).split()
        column.min_width = max(map(cell_len, words), default=0)
        column.overflow = "fold"
    if out.is_terminal:
        out.print(table)
    else:
        Console(file=out.file, width=WHOLE, highlight=False, soft_wrap=True).print(table)


def progress(*columns: ProgressColumn) -> Progress:
    """A bar at a terminal, gone when the work is done; nothing elsewhere, where it would leave an empty line."""
    from rich.progress import Progress

    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, on the event loop that the service runs on: much quicker than Python's own."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def with_resources(work: Callable[[Resources], Coroutine[Any, Any, T]]) -> T:
    """Run a command's work over open resources; storage and Stripe errors end in one line."""
    # Imported when a command runs: `--help` needs none of them, and together they take a second.
    from tallystick.config import load_settings
    from tallystick.resources import open_resources

    settings = load_settings()

    async def call() -> T:
        async with open_resources(settings, application_name="tallystick cli") as resources:
            return await work(resources)

    with failures_in_one_line(), only_warnings_logged():
        return run_async(call())


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """End in one line when PostgreSQL, Redis or Stripe fails: which of them, and what to look at."""
    from tallystick import db, stripe_gateway
    from tallystick.redis_client import REDIS_ERRORS

    try:
        yield
    except (*db.STORAGE_ERRORS, *REDIS_ERRORS, *stripe_gateway.STRIPE_ERRORS) as error:
        fail(explain_failure(error))


def explain_failure(error: Exception, stripe: str = "it") -> str:
    """What a failing part said, in one line, which repeats no password and no value of a statement's.

    `stripe` is how the line calls Stripe, as by its address.
    """
    from redis.exceptions import RedisError

    from tallystick import db, stripe_gateway

    if isinstance(error, stripe_gateway.STRIPE_ERRORS):
        if error.http_status == 401:
            return "Stripe: STRIPE_API_KEY is refused"
        part, hint = "Stripe", f"can {stripe} be reached from here?"
    elif isinstance(error, RedisError):
        part, hint = "Redis", "is REDIS_URL right, and the server up?"
    elif isinstance(error, db.STORAGE_ERRORS) and getattr(error, "filename", None) is None:
        part, hint = "PostgreSQL", "is DATABASE_URL right, and the server up?"
    else:
        return f"{type(error).__name__}: {_first_line(error)}"
    causes = list(_causes(error))
    for cause in causes:
        if (state := getattr(cause, "sqlstate", None)) is not None:
            return _explain_state(state, cause)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"{part}: its certificate is not trusted ({cause.verify_message}); see sslrootcert"
        if isinstance(cause, ConnectionRefusedError):
            return f"{part}: connection refused; {hint}"
        if isinstance(cause, socket.gaierror):  # what was taken for the host may be a part of the password
            return f"{part}: its host cannot be resolved; {hint} {_percent_encoding()}"
        if isinstance(cause, TimeoutError):
            return f"{part}: no answer in time; {hint}"
        if "rejected SSL" in str(cause):
            return f"{part}: the server has no TLS, which DATABASE_URL asks for; see sslmode"
    return f"{part}: {_first_line(getattr(error, 'orig', None) or error)}"


def _explain_state(state: str, error: BaseException) -> str:
    """What PostgreSQL itself said, by its SQLSTATE."""
    if state in ("42P01", "42703"):  # a table or a column that is not there
        return "the schema is not up to date: tallystick migrate"
    if state == "3D000":
        return f"PostgreSQL: {_first_line(error)}; make it, or mend DATABASE_URL"
    if state.startswith("28"):
        return f"PostgreSQL: {_first_line(error)}; is DATABASE_URL right? {_percent_encoding()}"
    if state.startswith("22"):  # the text has the value
        return f"PostgreSQL: it cannot take a value (SQLSTATE {state})"
    return f"PostgreSQL: {_first_line(error)}"


def _percent_encoding() -> str:
    from tallystick.config import PERCENT_ENCODING

    return f"({PERCENT_ENCODING})"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, which may be a circle where one was raised again."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


@contextmanager
def only_warnings_logged() -> Iterator[None]:
    """A command's standard output is its result: of what is logged, warnings go to standard error."""
    import structlog

    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.configure(**before)
