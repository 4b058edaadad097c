"""A PostgreSQL of a test module's own, to be stopped, killed and frozen without anybody else noticing."""

import os
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from fastapi import FastAPI

from tallystick.dev.embedded import EmbeddedPostgres
from tallystick.resources import Resources


@contextmanager
def own_postgres(folder: Path) -> Iterator[EmbeddedPostgres]:
    # Durable: what was committed must be there after a crash.
    postgres = EmbeddedPostgres(folder / "postgres")
    postgres.start()
    try:
        yield postgres
    finally:
        postgres.stop()


async def connect_all(app: FastAPI) -> None:
    """Have the application's pool filled with connections that are open and idle."""
    resources: Resources = app.state.resources
    async with AsyncExitStack() as stack:
        for _ in range(resources.settings.database_pool_size):
            await stack.enter_async_context(resources.engine.connect())


def freeze(postgres: EmbeddedPostgres) -> list[int]:
    """Stop the server and all its children in their tracks: connections stay open and nobody answers. Whom to thaw."""
    assert postgres.pid is not None
    frozen = [postgres.pid, *map(int, Path(f"/proc/{postgres.pid}/task/{postgres.pid}/children").read_text().split())]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    return frozen


def thaw(frozen: list[int]) -> None:
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
