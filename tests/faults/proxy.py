"""A TCP proxy in front of one part: it can cut, stall and refuse connections, and lose answers on their way back."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024


class Proxy:
    """Connections to `port` go to the next of `targets` in turn, or to another one if that refuses."""

    def __init__(self, targets: Sequence[int]) -> None:
        self.targets = list(targets)
        self.port = 0
        self.answers_lost = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._turn = count()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.WriteTransport] = set()

    async def listen(self) -> None:
        """Accept connections, on the same port as before."""
        # A burst of new connections after a cut must not be refused by a short queue.
        self._server = await asyncio.start_server(self._pass_on, HOST, self.port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Let nobody connect, and cut those who are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    async def accept(self) -> None:
        """The end of `refuse`."""
        if self._server is None:
            await self.listen()

    def cut(self) -> None:
        """Break every connection, with whatever was under way on it."""
        for transport in list(self._open):
            transport.abort()

    def stall(self) -> None:
        """Keep the connections and pass nothing on, in either direction."""
        self._flowing.clear()

    def flow(self) -> None:
        """The end of `stall`: everything that was held arrives."""
        self._flowing.set()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await self._connect()
        if upstream is None:
            writer.transport.abort()
            return
        far_reader, far_writer = upstream
        transports = {writer.transport, far_writer.transport}
        self._open |= transports
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, answers=False)),
            asyncio.create_task(self._pump(far_reader, writer, answers=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._open -= transports
            for end in (writer, far_writer):
                end.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        first = next(self._turn)
        for step in range(len(self.targets)):
            try:
                return await asyncio.open_connection(HOST, self.targets[(first + step) % len(self.targets)])
            except OSError:
                continue
        return None

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                await self._flowing.wait()
                if answers and self.answers_lost:
                    writer.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            return  # the other end is gone, and so is this connection


@asynccontextmanager
async def open_proxy(*targets: int) -> AsyncIterator[Proxy]:
    """A proxy in front of these ports of 127.0.0.1, for as long as the block runs."""
    proxy = Proxy(targets)
    await proxy.listen()
    try:
        yield proxy
    finally:
        proxy.flow()
        proxy.refuse()
