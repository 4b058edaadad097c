"""A TCP proxy in front of one part: it can cut, stall and refuse connections, and lose answers on their way back."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from tallystick.dev.server_process import find_free_port

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024


@dataclass(eq=False)
class Passage:
    """One connection: its client, the end towards it, the end towards the target, and the port of that last end."""

    client: str
    near: asyncio.WriteTransport
    far: asyncio.WriteTransport
    far_port: int = field(init=False)

    def __post_init__(self) -> None:
        self.far_port = self.far.get_extra_info("sockname")[1]

    def abort(self) -> None:
        self.near.abort()
        self.far.abort()


class Proxy:
    """Connections go to the next of `targets` in turn, or to another one if that refuses.

    Each of `clients` has a port of its own, so that it is known whose a connection is. `held` and `lost` count what
    `stall` has kept back and which answers `loses_answers` has swallowed.
    """

    def __init__(self, targets: Sequence[int], clients: Sequence[str]) -> None:
        self.targets = list(targets)
        self.ports = dict.fromkeys(clients, 0)
        self.loses_answers = False
        self.held = 0
        self.lost = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._turn = count()
        self._servers: list[asyncio.Server] = []
        self._open: set[Passage] = set()

    async def listen(self) -> None:
        """Accept connections, on the same ports as before."""
        for client, port in self.ports.items():
            # Not one of those that the system gives to outgoing connections: it must still be there after `refuse`.
            self.ports[client] = port or find_free_port()
            # A burst of new connections after a cut must not be refused by a short queue.
            self._servers.append(
                await asyncio.start_server(partial(self._pass_on, client), HOST, self.ports[client], backlog=4096)
            )

    def refuse(self) -> int:
        """Let nobody connect, and cut those who are; how many were."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        return self.cut()

    async def accept(self) -> None:
        """The end of `refuse`."""
        if not self._servers:
            await self.listen()

    def passages(self, client: str | None = None) -> list[Passage]:
        """The open connections of one client, or of all."""
        return [passage for passage in self._open if client in (None, passage.client)]

    def cut(self, client: str | None = None) -> int:
        """Break every connection (of one client), with whatever was under way on it; how many there were."""
        passages = self.passages(client)
        for passage in passages:
            passage.abort()
        return len(passages)

    def stall(self) -> None:
        """Keep the connections and pass nothing on, in either direction."""
        self._flowing.clear()

    def flow(self) -> None:
        """The end of `stall`: everything that was held arrives."""
        self._flowing.set()

    async def _pass_on(self, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await self._connect()
        if upstream is None:
            writer.transport.abort()
            return
        far_reader, far_writer = upstream
        passage = Passage(client, writer.transport, far_writer.transport)
        self._open.add(passage)
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
            self._open.discard(passage)
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
                if not self._flowing.is_set():
                    self.held += 1
                    await self._flowing.wait()
                if answers and self.loses_answers:
                    self.lost += 1
                    writer.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            return  # the other end is gone, and so is this connection


@asynccontextmanager
async def open_proxy(*targets: int, clients: Sequence[str]) -> AsyncIterator[Proxy]:
    """A proxy in front of these ports of 127.0.0.1, with a port for each client, for as long as the block runs."""
    proxy = Proxy(targets, clients)
    await proxy.listen()
    try:
        yield proxy
    finally:
        proxy.flow()
        proxy.refuse()
