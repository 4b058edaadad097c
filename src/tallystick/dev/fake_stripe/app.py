"""The fake Stripe as one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tallystick.dev.fake_stripe.account import Account
from tallystick.dev.fake_stripe.api import Api
from tallystick.dev.fake_stripe.connections import remember_connection
from tallystick.dev.fake_stripe.control import Control
from tallystick.dev.fake_stripe.errors import unknown_url
from tallystick.dev.fake_stripe.pages import page_routes
from tallystick.dev.fake_stripe.transitions import ClockWork, plan_all

logger = logging.getLogger(__name__)

# Webhooks are tried again after so many real seconds; the last holds for all later tries.
WEBHOOK_RETRY_SECONDS = (0.2, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0)

# How long after a change the state is written: what a kill can lose.
SAVE_SECONDS = 0.2


class FakeStripe(Starlette):
    """A Starlette application that can drop the connection below a request, and keeps what it is about to tell."""

    account: Account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def keep_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.account.keep_before_telling()
            await send(message)

        if scope["type"] == "http":
            remember_connection(scope, send)
            await super().__call__(scope, receive, keep_and_send)
        else:
            await super().__call__(scope, receive, send)


def create_fake_stripe(
    state_path: Path | None = None,
    seed: int = 0,
    webhook_retry_seconds: tuple[float, ...] = WEBHOOK_RETRY_SECONDS,
    *,
    save_at_once: bool = False,
) -> Starlette:
    """The application: Stripe's API at `/v1` and `/v2`, its pages, and the control API at `/_fake/`.

    With `state_path` everything survives a restart in that SQLite file: written 0.2 s after a change, and on a clean
    stop. With `save_at_once` it is written before each answer and each webhook: then a kill loses nothing that anybody
    was told. `seed` decides all ids and all chance. `webhook_retry_seconds` are the pauses between tries of a webhook.
    """
    account = Account(state_path, seed, webhook_retry_seconds, save_at_once=save_at_once)
    api = Api(account)
    clockwork = ClockWork(account)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        account.open()
        plan_all(account)
        tasks = [asyncio.create_task(clockwork.run()), asyncio.create_task(_keep_saving(account))]
        try:
            async with account.deliveries.running():
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            account.note()
            account.state.close()

    async def not_found(request: Request, _: Exception) -> Response:
        return JSONResponse(unknown_url(request.method, request.url.path).body, 404)

    methods = ["GET", "POST", "DELETE"]
    app = FakeStripe(
        routes=[
            Route("/v1/{path:path}", api.answer, methods=methods),
            Route("/v2/{path:path}", api.answer, methods=methods),
            *Control(account, api, clockwork).routes(),
            *page_routes(account),
        ],
        lifespan=lifespan,
        exception_handlers={404: not_found, 405: not_found},
    )
    app.account = account
    return app


async def _keep_saving(account: Account) -> None:
    while True:
        await account.state.changed.wait()
        account.state.changed.clear()
        await asyncio.sleep(SAVE_SECONDS)
        try:
            account.state.save()
        except sqlite3.Error:
            # A full disk, or a reader that holds the file: tried again with the next change, and on stop.
            logger.exception("the fake Stripe's state could not be saved")
