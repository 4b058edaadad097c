"""Redis (or Valkey): the client with its time limits."""

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tallystick.config import Settings

# Longer than an fsync on a busy disk, short enough that a request can still take the direct path to PostgreSQL.
SOCKET_TIMEOUT_SECONDS = 3
CONNECT_TIMEOUT_SECONDS = 1

# All keys share one hash tag, so that a Cluster keeps them in one slot and one script may touch them together.
KEY_TAG = "{tallystick}"

# uvloop says RuntimeError of a connection that was cut between two steps of opening it.
REDIS_ERRORS = (RedisError, OSError, TimeoutError, RuntimeError)


def create_redis(settings: Settings) -> Redis:
    """A client over a pool, not connected yet. It never retries by itself: each caller knows what a retry means."""
    return Redis.from_url(
        settings.redis_url,
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
        protocol=2,  # the shape of every answer that the buffer reads
        retry=Retry(NoBackoff(), 0),
        health_check_interval=30,
    )
