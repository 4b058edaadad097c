"""Runs the fake Stripe as a server of its own."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import uvicorn

from tallystick.dev.fake_stripe.app import create_fake_stripe
from tallystick.dev.fake_stripe.state import TABLE
from tallystick.errors import TallystickError

# A held or slow connection must not keep the server from stopping.
STOP_SECONDS = 3
# Longer than clients keep a connection that is idle, so that it is never cut just as one sends on it.
KEEP_ALIVE_SECONDS = 75


class StateError(TallystickError):
    """The file cannot hold the state; the text says why."""


def serve_fake_stripe(
    host: str, port: int, state_path: Path | None, seed: int, announce: Callable[[], None] = lambda: None
) -> None:
    """Serves until SIGINT (returns) or SIGTERM (ends by it), saving first; `announce` is called before.

    Raises `StateError` for a file that is none of its own, and SystemExit when the port is taken.
    """
    if state_path is not None:
        _try_state(state_path)
    app = create_fake_stripe(state_path, seed)
    announce()
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )


def _try_state(path: Path) -> None:
    # Before the server starts: what fails within its start ends in a traceback.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(TABLE)
            connection.execute("SELECT body FROM objects ORDER BY position LIMIT 1").fetchall()
    except (OSError, sqlite3.Error) as error:
        raise StateError(f"{path} cannot hold the fake Stripe's state: {error}") from None
