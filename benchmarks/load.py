"""A load generator: requests over kept connections, as many as answers come back, every answer checked.

It writes and reads HTTP/1.1 by hand: on a machine that also runs the server, a full client would be most of what
is measured.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import quantiles
from time import perf_counter_ns


@dataclass
class Result:
    """What a round of load came to; times in nanoseconds."""

    requests: int = 0
    took: int = 0
    latencies: list[int] = field(default_factory=list)

    @property
    def per_second(self) -> int:
        return self.requests * 1_000_000_000 // max(1, self.took)

    def percentile_ms(self, percent: int) -> str:
        """A percentile of the latencies, in milliseconds."""
        cuts = quantiles(self.latencies, n=100) if len(self.latencies) > 1 else [0] * 99
        return f"{cuts[percent - 1] / 1_000_000:.1f}"


def make_request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """One POST, ready to be written."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def put_load(
    port: int, requests: Iterator[bytes], *, connections: int, check: Callable[[int, bytes], None]
) -> Result:
    """Send all requests over `connections` connections; `check(status, body)` raises on an answer that is not right."""
    result = Result()
    started = perf_counter_ns()

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        try:
            for request in requests:
                sent = perf_counter_ns()
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head[9:12])
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                check(status, await reader.readexactly(length))
                result.latencies.append(perf_counter_ns() - sent)
        finally:
            writer.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    result.requests = len(result.latencies)
    result.took = perf_counter_ns() - started
    return result
