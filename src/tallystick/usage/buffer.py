"""The buffer in Redis: ids claimed and events appended in one atomic step, on disk before anyone is told.

Keys, all in one Cluster slot:

    {tallystick}:usage:stream          batches of accepted events, waiting for the ledger
    {tallystick}:usage:bytes           their size, for the high-water mark
    {tallystick}:usage:ids:W:G:B       claimed ids of generation G, each W seconds long, bucket B: digest → body digest

An id is remembered for at least the dedupe window: a generation is half of it, and the present one and the two before
are asked. The oldest expires by itself. The buckets stay small enough for Redis to keep them as packed lists.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from tallystick.errors import TooBusy
from tallystick.redis_client import KEY_TAG, REDIS_ERRORS
from tallystick.usage.events import UsageEvent, plain

STREAM = f"{KEY_TAG}:usage:stream"
BYTES = f"{KEY_TAG}:usage:bytes"
IDS = f"{KEY_TAG}:usage:ids"
GROUP = "ledger"

# 2 bytes for the bucket and 8 within it: among 10⁹ ids, two share all ten with a chance of 10⁻⁶.
BUCKET_BYTES = 2
ID_BYTES = 8
# For all else that the sender chose: enough to tell a slip from a repeat.
BODY_BYTES = 6
FSYNC_TIMEOUT_MS = 2_000

# Enough for a mean, few enough to take milliseconds of a busy Redis.
SAMPLED_IDS = 10_000
SAMPLED_PAGES = 20

Claim = Literal["accepted", "duplicate", "conflict"]
_CLAIMS: dict[int, Claim] = {ord("a"): "accepted", ord("d"): "duplicate", ord("c"): "conflict"}

# One call a request. It always writes (the bytes counter at least), so that a batch of nothing but repeats also
# waits for the disk: the first copy of a repeat may have been written a moment ago by a request that has not heard
# back yet.
#
# KEYS: stream, bytes, and the present and the two earlier generations' prefixes. ARGV: lifetime of an id in seconds,
# high-water mark, digests one after the other, the batch. Unless all of it is new, the claims are appended with it.
CLAIM_AND_APPEND = f"""
local call, sub = redis.call, string.sub
local newest, older, oldest = KEYS[3], KEYS[4], KEYS[5]
local ttl, digests, batch = ARGV[1], ARGV[3], ARGV[4]
if call('INCRBY', KEYS[2], 0) > tonumber(ARGV[2]) then
  return 'full'
end
local claims, fresh = {{}}, 0
for at = 0, #digests - 1, {BUCKET_BYTES + ID_BYTES + BODY_BYTES} do
  local bucket = sub(digests, at + 1, at + {BUCKET_BYTES})
  local id = sub(digests, at + {BUCKET_BYTES + 1}, at + {BUCKET_BYTES + ID_BYTES})
  local body = sub(digests, at + {BUCKET_BYTES + ID_BYTES + 1}, at + {BUCKET_BYTES + ID_BYTES + BODY_BYTES})
  local seen = call('HGET', older .. bucket, id) or call('HGET', oldest .. bucket, id)
  if not seen then
    local key = newest .. bucket
    if call('HSETNX', key, id, body) == 1 then
      call('EXPIRE', key, ttl)
      fresh = fresh + 1
    else
      seen = call('HGET', key, id)
    end
  end
  claims[#claims + 1] = not seen and 'a' or seen == body and 'd' or 'c'
end
claims = table.concat(claims)
if fresh == #claims then
  call('XADD', KEYS[1], '*', 'events', batch)
elseif fresh > 0 then
  call('XADD', KEYS[1], '*', 'events', batch, 'claims', claims)
end
if fresh > 0 then
  call('INCRBY', KEYS[2], #batch)
end
return claims
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
    generations = _name_generations(now, dedupe_hours)
    rows = [_write(event) for event in events]
    arguments: list[bytes | str | int] = [
        len(generations) * _generation_seconds(dedupe_hours),
        max_bytes,
        b"".join(_digest(row, stamped=event.stamped) for row, event in zip(rows, events, strict=True)),
        json.dumps(rows, separators=(",", ":")),
    ]
    try:
        results = await _evaluate_durably(redis, [STREAM, BYTES, *generations], arguments, replicas)
    except REDIS_ERRORS as error:
        raise BufferUnavailable(type(error).__name__) from error
    if results == b"full":
        raise TooBusy("The usage buffer is full.", retry_after_seconds=5)
    return [_CLAIMS[result] for result in results]


def _generation_seconds(dedupe_hours: int) -> int:
    return dedupe_hours * 3600 // 2


def _name_generations(now: datetime, dedupe_hours: int) -> list[str]:
    """What the keys of the present generation and of the two before it begin with."""
    seconds = _generation_seconds(dedupe_hours)
    newest = int(now.timestamp()) // seconds
    return [f"{IDS}:{seconds}:{number}:" for number in range(newest, newest - 3, -1)]


async def _evaluate_durably(redis: Redis, keys: list[str], arguments: list[bytes | str | int], replicas: int) -> bytes:
    """Run the script and wait until its writes are in the append-only file (WAITAOF, Redis 7.2)."""
    for script in (_CLAIM_SHA, None):
        async with redis.pipeline(transaction=False) as pipeline:
            if script is None:
                pipeline.eval(CLAIM_AND_APPEND, len(keys), *keys, *arguments)
            else:
                pipeline.evalsha(script, len(keys), *keys, *arguments)
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
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


_CLAIM_SHA = _sha(CLAIM_AND_APPEND)


def _write(event: UsageEvent) -> list[Any]:
    """The event as it lies in the stream. Times are whole microseconds: no float ever holds one.

    Properties come last, and only where there are some: so events without are those of releases that knew of none.
    """
    row = [
        event.source,
        event.id,
        event.customer_ref,
        event.meter,
        plain(event.value),
        _to_microseconds(event.timestamp),
        int(event.stamped),
        _to_microseconds(event.received_at),
    ]
    if event.properties:
        row.append(event.properties)
    return row


def _digest(row: Sequence[Any], *, stamped: bool) -> bytes:
    """The digest of the key and that of the body. A stamped time is not the sender's, so it is left out."""
    source, id, customer_ref, meter, value, at, _, _, *properties = row
    body = f"{customer_ref}\0{meter}\0{value}\0{'' if stamped else at}"
    for name, text in properties[0] if properties else ():
        body += f"\0{name}\0{text}"
    return _digest_id(source, id) + hashlib.blake2b(body.encode(), digest_size=BODY_BYTES).digest()


def _digest_id(source: str, id: str) -> bytes:
    return hashlib.blake2b(f"{source}\0{id}".encode(), digest_size=BUCKET_BYTES + ID_BYTES).digest()


def read_batch(batch: bytes, claims: bytes | None = None) -> list[UsageEvent]:
    """The events of one stream entry: of those that came together, the ones whose id was new; all without `claims`."""
    rows = json.loads(batch)
    if claims is not None:
        rows = [row for row, claim in zip(rows, claims, strict=True) if claim == ord("a")]
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
        for source, id, customer, meter, value, at, stamped, got, *properties in rows
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

    def __init__(self, id: bytes, fields: dict[bytes, bytes]) -> None:
        self.id = id
        self.size = len(fields[b"events"])
        self.events = read_batch(fields[b"events"], fields.get(b"claims"))


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
    return [Entry(id, fields) for id, fields in entries]


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
    digest = _digest_id(source, id)
    bucket, field = digest[:BUCKET_BYTES], digest[BUCKET_BYTES:]
    async with redis.pipeline(transaction=False) as pipeline:
        for generation in _name_generations(now, dedupe_hours):
            pipeline.hexists(generation.encode() + bucket, field)
        return any(await pipeline.execute())
