"""What runs of the harness have found, each in small."""

from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import Connection

from tallystick.usage.buffer import BufferUnavailable, claim_and_append
from tests.conftest import Servers
from tests.usage.making import make_event


async def test_a_connection_to_redis_that_is_cut_while_it_opens_is_an_outage_and_no_bug(servers: Servers) -> None:
    class Cut(Connection):
        async def _connect(self) -> None:
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    redis = Redis.from_url(servers.valkey.url, connection_class=Cut)
    with pytest.raises(BufferUnavailable):
        await claim_and_append(redis, [make_event()], datetime.now(UTC), dedupe_hours=24, max_bytes=10**6)
    await redis.aclose()
