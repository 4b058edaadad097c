"""The terminal: what all commands share. Results go to standard output, progress and errors to standard error."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console

if TYPE_CHECKING:
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


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, on the event loop that the service runs on: much quicker than Python's own."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def with_resources(work: Callable[[Resources], Coroutine[Any, Any, T]]) -> T:
    """Run a command's work over open resources; storage and Stripe errors end in one line."""
    # Imported when a command runs: `--help` needs none of them, and together they take a second.
    from tallystick import db, stripe_gateway
    from tallystick.config import load_settings
    from tallystick.redis_client import REDIS_ERRORS
    from tallystick.resources import open_resources

    settings = load_settings()

    async def call() -> T:
        async with open_resources(settings, application_name="tallystick cli") as resources:
            return await work(resources)

    try:
        with only_warnings_logged():
            return run_async(call())
    except (*db.STORAGE_ERRORS, *REDIS_ERRORS, *stripe_gateway.STRIPE_ERRORS) as error:
        fail(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


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
