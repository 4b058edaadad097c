"""The buffer in Redis: ids claimed and events appended in one atomic step, on disk before anyone is told.

Keys, all in one Cluster slot:

    {tallystick}:usage:stream          batches of accepted events, waiting for the ledger
    {tallystick}:usage:bytes           their size, for the high-water mark
    {tallystick}:usage:ids:G:B         claimed ids of generation G (a stretch of time), bucket B: digest → body digest

An id is remembered for at least the dedupe window: as many generations are asked as the window covers, and the oldest
expires by itself. The buckets stay small enough for Redis to keep them as packed lists, about 30 bytes an id.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from tallystick.errors import TooBusy
from tallystick.redis_client import KEY_TAG, REDIS_ERRORS
from tallystick.usage.events import UsageEvent, digest_id, plain

STREAM = f"{KEY_TAG}:usage:stream"
BYTES = f"{KEY_TAG}:usage:bytes"
IDS = f"{KEY_TAG}:usage:ids"
GROUP = "ledger"

GENERATION = timedelta(hours=24)
FSYNC_TIMEOUT_MS = 2_000

# Enough for a mean, few enough to take milliseconds of a busy Redis.
SAMPLED_IDS = 10_000
SAMPLED_PAGES = 20

Claim = Literal["accepted", "duplicate", "conflict"]
_CLAIMS: dict[int, Claim] = {ord("a"): "accepted", ord("d"): "duplicate", ord("c"): "conflict"}

# One call a request. It always writes (the bytes counter at least), so that a batch of nothing but repeats also
# waits for the disk: the first copy of a repeat may have been written a moment ago by a request that has not heard
# back yet.
CLAIM_AND_APPEND = """
local stream, bytes_key, ids = KEYS[1], KEYS[2], KEYS[3]
local generation, generations, ttl, high_water = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]),
tonumber(ARGV[4]) if tonumber(redis.call('INCRBY', bytes_key, 0)) > high_water then
  return 'full'
end
local digests = ARGV[5]
local results, fresh, touched = {}, {}, {}
for i = 1, #ARGV - 5 do
  local at = (i - 1) * 16
  local id, body = string.sub(digests, at + 1, at + 10), string.sub(digests, at + 11, at + 16)
  local bucket = string.byte(id, 1) * 256 + string.byte(id, 2)
  local seen = false
  for g = generation, generation - generations, -1 do
    seen = redis.call('HGET', ids .. ':' .. g .. ':' .. bucket, id)
    if seen then break end
  end
  if not seen then
    local key = ids .. ':' .. generation .. ':' .. bucket
    redis.call('HSET', key, id, body)
    touched[key] = true
    fresh[#fresh + 1] = ARGV[i + 5]
    results[i] = 'a'
  elseif seen == body then
    results[i] = 'd'
  else
    results[i] = 'c'
  end
end
for key in pairs(touched) do
  redis.call('EXPIRE', key, ttl)
end
if #fresh > 0 then
  local batch = '[' .. table.concat(fresh, ',') .. ']'
  redis.call('XADD', stream, '*', 'events', batch)
  redis.call('INCRBY', bytes_key, #batch)
end
return table.concat(results)
"""

# Counts down what it really deletes, so that two drains that took the same entry count it once.
ACKNOWLEDGE = """
local stream, bytes_key = KEYS[1], KEYS[2]
for i = 2, #ARGV, 2 do
  redis.call('XACK', stream, ARGV[1], ARGV[i])
  if redis.call('XDEL', stream, ARGV[i]) == 1 then
    redis.call('DECRBY', bytes_key, ARGV[i + 1])
  end
end
"""


class BufferUnavailable(Exception):
    """Redis did not confirm that the events are on disk: they may or may not be there."""


async def claim_and_append(
    redis: Redis, events: Sequence[UsageEvent], now: datetime, *, dedupe_hours: int, max_bytes: int, replicas: int = 0
) -> list[Claim]:
    """Claim the ids and append the events whose id is new, atomically and on disk; one result for each event.

    `replicas`: on how many replicas' disks too, so that a failover loses nothing either.

    Raises `TooBusy` above the high-water mark (nothing was taken) and `BufferUnavailable` when Redis did not confirm.
    """
    generations = -(-timedelta(hours=dedupe_hours) // GENERATION)
    arguments: list[bytes | str | int] = [
        int(now.timestamp()) // int(GENERATION.total_seconds()),
        generations,
        int(GENERATION.total_seconds()) * (generations + 1),
        max_bytes,
        b"".join(event.id_digest() + event.body_digest() for event in events),
        *(_write(event) for event in events),
    ]
    try:
        results = await _evaluate_durably(redis, arguments, replicas)
    except REDIS_ERRORS as error:
        raise BufferUnavailable(type(error).__name__) from error
    if results == b"full":
        raise TooBusy("The usage buffer is full.", retry_after_seconds=5)
    return [_CLAIMS[result] for result in results]


async def _evaluate_durably(redis: Redis, arguments: list[bytes | str | int], replicas: int) -> bytes:
    """Run the script and wait until its writes are in the append-only file (WAITAOF, Redis 7.2)."""
    for script in (_CLAIM_SHA, None):
        async with redis.pipeline(transaction=False) as pipeline:
            if script is None:
                pipeline.eval(CLAIM_AND_APPEND, 3, STREAM, BYTES, IDS, *arguments)
            else:
                pipeline.evalsha(script, 3, STREAM, BYTES, IDS, *arguments)
            pipeline.execute_command("WAITAOF", 1, replicas, FSYNC_TIMEOUT_MS)
            results, synced = await pipeline.execute(raise_on_error=False)
        if isinstance(results, NoScriptError):
            continue  # a restarted server has forgotten the script; EVAL teaches it again
        for result in (results, synced):
            if isinstance(result, Exception):
                raise result
        if synced[0] < 1 or synced[1] < replicas:
            raise BufferUnavailable("the append-only file was not synced in time")
        assert isinstance(results, bytes)
        return results
    raise BufferUnavailable("the script could not be loaded")


def _sha(script: str) -> str:
    import hashlib

    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


_CLAIM_SHA = _sha(CLAIM_AND_APPEND)


def _write(event: UsageEvent) -> str:
    """The event as it lies in the stream. Times are whole microseconds: no float ever holds one.

    Properties come last, and only where there are some: so events without are those of releases that knew of none.
    """
    fields = [
        event.source,
        event.id,
        event.customer_ref,
        event.meter,
        plain(event.value),
        _to_microseconds(event.timestamp),
        int(event.stamped),
        _to_microseconds(event.received_at),
    ]
    return json.dumps([*fields, event.properties] if event.properties else fields, separators=(",", ":"))


def read_batch(batch: bytes) -> list[UsageEvent]:
    """The events of one stream entry."""
    return [
        UsageEvent(
            source,
            id,
            customer,
            meter,
            Decimal(value),
            _from_microseconds(at),
            bool(stamped),
            _from_microseconds(got),
            tuple((name, property_value) for name, property_value in properties[0]) if properties else (),
        )
        for source, id, customer, meter, value, at, stamped, got, *properties in json.loads(batch)
    ]


_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)


def _to_microseconds(at: datetime) -> int:
    return (at - _EPOCH) // _MICROSECOND


def _from_microseconds(at: int) -> datetime:
    return _EPOCH + timedelta(microseconds=at)


class Entry:
    """One batch in the stream: its id, its size and its events."""

    __slots__ = ("events", "id", "size")

    def __init__(self, id: bytes, batch: bytes) -> None:
        self.id = id
        self.size = len(batch)
        self.events = read_batch(batch)


async def read_entries(redis: Redis, consumer: str, count: int, *, reclaim_after: timedelta) -> list[Entry]:
    """The next batches for this consumer; first those that another took and did not finish within `reclaim_after`."""
    try:
        _, abandoned, *_ = await redis.xautoclaim(
            STREAM, GROUP, consumer, min_idle_time=int(reclaim_after.total_seconds() * 1000), count=count
        )
        entries: list[Any] = [entry for entry in abandoned if entry[1] is not None]
        if not entries:
            answer: Any = await redis.xreadgroup(GROUP, consumer, {STREAM: ">"}, count=count)
            entries = answer[0][1] if answer else []
    except ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        await _create_group(redis)
        return await read_entries(redis, consumer, count, reclaim_after=reclaim_after)
    return [Entry(id, fields[b"events"]) for id, fields in entries]


async def _create_group(redis: Redis) -> None:
    try:
        await redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


async def acknowledge(redis: Redis, entries: Sequence[Entry]) -> None:
    """Remove batches that the ledger holds. A crash before this hands them out again, to a ledger that knows them."""
    arguments: list[bytes | str | int] = [GROUP]
    for entry in entries:
        arguments += [entry.id, entry.size]
    await redis.eval(ACKNOWLEDGE, 2, STREAM, BYTES, *arguments)


async def measure_ids(redis: Redis) -> tuple[int, int]:
    """How many bytes of memory some remembered ids take, and how many ids those are: a sample, not all of them."""
    size = number = cursor = 0
    for _ in range(SAMPLED_PAGES):
        cursor, keys = await redis.scan(cursor, match=f"{IDS}:*", count=1_000)
        async with redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.memory_usage(key, samples=0)
                pipeline.hlen(key)
            measured = await pipeline.execute()
        # A bucket that expired in between has no size.
        size += sum(bytes_ for bytes_ in measured[::2] if bytes_ is not None)
        number += sum(measured[1::2])
        if cursor == 0 or number >= SAMPLED_IDS:
            break
    return size, number


async def buffered_bytes(redis: Redis) -> int:
    """How much is waiting for the ledger."""
    return int(await redis.get(BYTES) or 0)


async def is_remembered(redis: Redis, source: str, id: str, now: datetime, *, dedupe_hours: int) -> bool:
    """Whether the id was claimed within the dedupe window. Raises Redis's errors: only Redis knows."""
    digest = digest_id(source, id)
    bucket = digest[0] * 256 + digest[1]
    newest = int(now.timestamp()) // int(GENERATION.total_seconds())
    oldest = newest - -(-timedelta(hours=dedupe_hours) // GENERATION)
    async with redis.pipeline(transaction=False) as pipeline:
        for generation in range(oldest, newest + 1):
            pipeline.hexists(f"{IDS}:{generation}:{bucket}", digest)
        return any(await pipeline.execute())
