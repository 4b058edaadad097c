"""An ASGI application behind a real socket, for as long as a test needs it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from queue import Queue
from threading import Thread
from typing import Any

import uvicorn


@asynccontextmanager
async def serve(app: Any) -> AsyncIterator[str]:
    """Serve `app` on a free port of 127.0.0.1 in this event loop; gives its base URL."""
    # asyncio sends small pieces at once (TCP_NODELAY) only where the protocol is named; or each answer waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    # By uvicorn's default a connection is cut that was idle for 5 s, and now and then just as a test sends on it.
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=2, timeout_keep_alive=600
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    try:
        await asyncio.wait([asyncio.create_task(server.ready.wait()), task], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            raise RuntimeError("the server ended before it was ready")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()
        await task
        listener.close()


@contextmanager
def serve_in_thread(app: Any) -> Iterator[str]:
    """Serve `app` in a thread with an event loop of its own, for tests whose own loops come and go."""
    address: Queue[str] = Queue()
    stop: Queue[Callable[[], object]] = Queue()

    async def run() -> None:
        async with serve(app) as url:
            stopped = asyncio.Event()
            loop = asyncio.get_running_loop()
            stop.put(lambda: loop.call_soon_threadsafe(stopped.set))
            address.put(url)
            await stopped.wait()

    thread = Thread(target=asyncio.run, args=(run(),), name="served app")
    thread.start()
    try:
        yield address.get(timeout=20)
    finally:
        stop.get(timeout=20)()
        thread.join()


class _Server(uvicorn.Server):
    """uvicorn that says when it listens, stops when it is told, and leaves the test runner's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready, self._told = asyncio.Event(), asyncio.Event()

    def stop(self) -> None:
        self._told.set()

    async def main_loop(self) -> None:
        while not self._told.is_set():
            await self.on_tick(0)  # which puts the time into the answers' heads
            with suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), timeout=1)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    def install_signal_handlers(self) -> None:
        return
