"""The buffer in Redis: ids claimed and events appended in one atomic step, on disk before anyone is told.

Keys, all in one Cluster slot:

    {tallystick}:usage:stream          batches of accepted events, waiting for the ledger
    {tallystick}:usage:bytes           their size, for the high-water mark
    {tallystick}:usage:ids:W:G         claimed ids of generation G, each W seconds long: digest → body digest

An id is remembered for at least the dedupe window: a generation is half of it, and the present one and the two before
are asked. The one before those is given up.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from tallystick.config import Settings
from tallystick.errors import TooBusy
from tallystick.redis_client import KEY_TAG, REDIS_ERRORS
from tallystick.usage.events import MAX_EVENTS, UsageEvent, plain

STREAM = f"{KEY_TAG}:usage:stream"
BYTES = f"{KEY_TAG}:usage:bytes"
IDS = f"{KEY_TAG}:usage:ids"
GROUP = "ledger"

# Among 10⁹ ids, two share all ten bytes with a chance of 10⁻⁶.
ID_BYTES = 10
# For all else that the sender chose: enough to tell a slip from a repeat.
BODY_BYTES = 6
FSYNC_TIMEOUT_MS = 2_000

# More requests share a call only up to so many events: a script stops all else that Redis does.
EVENTS_PER_CALL = 2 * MAX_EVENTS
# While one call waits for the disk, another is made and run.
CALLS_AT_ONCE = 2

# Of each generation, for the mean of what an id costs; all of them would keep a busy Redis for seconds.
SAMPLED_IDS = 1_000

Claim = Literal["accepted", "duplicate", "conflict"]
_CLAIMS: dict[int, Claim] = {ord("a"): "accepted", ord("d"): "duplicate", ord("c"): "conflict"}

# It always writes (the bytes counter at least), so that a batch of nothing but repeats also waits for the disk: the
# first copy of a repeat may have been written a moment ago by a request that has not heard back yet.
#
# KEYS: stream, bytes, the present generation, the two before it, and the one to be given up (UNLINK frees it in the
# background; when it expired, Redis might stop for it). ARGV: lifetime of a generation in seconds, high-water mark,
# digests one after the other, the batch. Unless all of it is new, the claims are appended with it.
CLAIM_AND_APPEND = f"""
local call, sub = redis.call, string.sub
local newest, older, oldest = KEYS[3], KEYS[4], KEYS[5]
local ttl, digests, batch = ARGV[1], ARGV[3], ARGV[4]
if call('INCRBY', KEYS[2], 0) > tonumber(ARGV[2]) then
  return 'full'
end
local ids, bodies = {{}}, {{}}
for at = 1, #digests, {ID_BYTES + BODY_BYTES} do
  ids[#ids + 1] = sub(digests, at, at + {ID_BYTES - 1})
  bodies[#bodies + 1] = sub(digests, at + {ID_BYTES}, at + {ID_BYTES + BODY_BYTES - 1})
end
local claims, known, new = {{}}, {{}}, {{}}
for first = 1, #ids, 1000 do
  local last = math.min(first + 999, #ids)
  local in_newest = call('HMGET', newest, unpack(ids, first, last))
  local in_older = call('HMGET', older, unpack(ids, first, last))
  local in_oldest = call('HMGET', oldest, unpack(ids, first, last))
  for place = 1, last - first + 1 do
    local id, body = ids[first + place - 1], bodies[first + place - 1]
    local seen = in_newest[place] or in_older[place] or in_oldest[place] or known[id]
    if not seen then
      known[id] = body
      new[#new + 1] = id
      new[#new + 1] = body
    end
    claims[#claims + 1] = not seen and 'a' or seen == body and 'd' or 'c'
  end
end
claims = table.concat(claims)
if #new > 0 then
  for first = 1, #new, 2000 do
    call('HSET', newest, unpack(new, first, math.min(first + 1999, #new)))
  end
  call('EXPIRE', newest, ttl, 'NX')
  call('UNLINK', KEYS[6])
  if #new == 2 * #claims then
    call('XADD', KEYS[1], '*', 'events', batch)
  else
    call('XADD', KEYS[1], '*', 'events', batch, 'claims', claims)
  end
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


class Buffer:
    """What one process appends: requests that come while a call is on its way share the next one.

    A call costs an fsync and some hundred microseconds of Redis and of this process, however many events it brings.
    """

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis, self._settings = redis, settings
        self._waiting: deque[tuple[Sequence[UsageEvent], asyncio.Future[list[Claim]]]] = deque()
        self._calls: set[asyncio.Task[None] | None] = set()

    async def append(self, events: Sequence[UsageEvent], now: datetime) -> list[Claim]:
        """Claim the ids and append the events whose id is new, on disk; one result for each event.

        Raises what `claim_and_append` raises. A caller that goes away changes nothing: its events are appended.
        """
        claimed: asyncio.Future[list[Claim]] = asyncio.get_running_loop().create_future()
        self._waiting.append((events, claimed))
        if len(self._calls) < CALLS_AT_ONCE:
            self._calls.add(asyncio.create_task(self._append_waiting(now), name="buffer"))
        return await claimed

    async def _append_waiting(self, now: datetime) -> None:
        while self._waiting:
            sharing = self._take()
            events = [event for some, _ in sharing for event in some]
            # Died here: nobody has heard anything, and everybody sends again.
            settings = self._settings
            outcomes = await asyncio.gather(
                claim_and_append(
                    self._redis,
                    events,
                    max(now, *(event.received_at for event in events)),
                    dedupe_hours=settings.usage_dedupe_hours,
                    max_bytes=settings.usage_buffer_max_bytes,
                    replicas=settings.usage_sync_replicas,
                ),
                return_exceptions=True,  # what went wrong belongs to each of those who share the call
            )
            _tell(sharing, outcomes[0])
        # At once, and not when the task is done: who comes between would wait for a call that is not made.
        self._calls.discard(asyncio.current_task())

    def _take(self) -> list[tuple[Sequence[UsageEvent], asyncio.Future[list[Claim]]]]:
        sharing = [self._waiting.popleft()]
        number = len(sharing[0][0])
        while self._waiting and number + len(self._waiting[0][0]) <= EVENTS_PER_CALL:
            number += len(self._waiting[0][0])
            sharing.append(self._waiting.popleft())
        return sharing


def _tell(
    sharing: Sequence[tuple[Sequence[UsageEvent], asyncio.Future[list[Claim]]]], outcome: list[Claim] | BaseException
) -> None:
    """Give each of those who shared a call its own claims, or what went wrong."""
    at = 0
    for events, claimed in sharing:
        if claimed.done():
            pass  # its caller has gone away
        elif isinstance(outcome, BaseException):
            claimed.set_exception(outcome)
        else:
            claimed.set_result(outcome[at : at + len(events)])
        at += len(events)


async def claim_and_append(
    redis: Redis, events: Sequence[UsageEvent], now: datetime, *, dedupe_hours: int, max_bytes: int, replicas: int = 0
) -> list[Claim]:
    """Claim the ids and append the events whose id is new, atomically and on disk; one result for each event.

    `replicas`: on how many replicas' disks too, so that a failover loses nothing either.

    Raises `TooBusy` above the high-water mark (nothing was taken) and `BufferUnavailable` when Redis did not confirm.
    """
    *asked, given_up = _name_generations(now, dedupe_hours)
    arguments: list[bytes | str | int] = [
        len(asked) * _generation_seconds(dedupe_hours),
        max_bytes,
        b"".join([_digest(event) for event in events]),
        _encode(events),
    ]
    try:
        results = await _evaluate_durably(redis, [STREAM, BYTES, *asked, given_up], arguments, replicas)
    except REDIS_ERRORS as error:
        raise BufferUnavailable(type(error).__name__) from error
    if results == b"full":
        raise TooBusy("The usage buffer is full.", retry_after_seconds=5)
    return [_CLAIMS[result] for result in results]


def _generation_seconds(dedupe_hours: int) -> int:
    return dedupe_hours * 3600 // 2


def _name_generations(now: datetime, dedupe_hours: int) -> list[str]:
    """The keys of the present generation, of the two before it, and of the one that is not asked any more."""
    seconds = _generation_seconds(dedupe_hours)
    newest = int(now.timestamp()) // seconds
    return [f"{IDS}:{seconds}:{number}" for number in range(newest, newest - 4, -1)]


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


def _digest(event: UsageEvent) -> bytes:
    """The digest of the key and that of the body. A stamped time is not the sender's, so it is left out."""
    at = "" if event.stamped else (event.timestamp - _EPOCH) // _MICROSECOND
    body = f"{event.customer_ref}\0{event.meter}\0{plain(event.value)}\0{at}"
    for name, text in event.properties:
        body += f"\0{name}\0{text}"
    return _digest_id(event.source, event.id) + hashlib.blake2b(body.encode(), digest_size=BODY_BYTES).digest()


def _digest_id(source: str, id: str) -> bytes:
    return hashlib.blake2b(f"{source}\0{id}".encode(), digest_size=ID_BYTES).digest()


_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)

# The events as they lie in the stream: JSON, an array for each event, with decimals and times as text.
_encode = msgspec.json.Encoder(decimal_format="string").encode
_decode = msgspec.json.Decoder(list[UsageEvent]).decode


def read_batch(batch: bytes, claims: bytes | None = None) -> list[UsageEvent]:
    """The events of one stream entry: of those that came together, the ones whose id was new; all without `claims`."""
    events = _decode(batch)
    if claims is None:
        return events
    return [event for event, claim in zip(events, claims, strict=True) if claim == ord("a")]


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


async def find_newest(redis: Redis) -> tuple[int, int]:
    """The place of the newest batch that was ever appended; compares with `place_of` of an entry."""
    try:
        about: Any = await redis.xinfo_stream(STREAM)
    except ResponseError as error:
        if "no such key" not in str(error):
            raise
        return 0, 0
    return _read_place(about["last-generated-id"])


def place_of(entry: Entry) -> tuple[int, int]:
    """Where in the stream a batch is: the later, the greater."""
    return _read_place(entry.id)


def _read_place(id: bytes) -> tuple[int, int]:
    milliseconds, _, number = id.partition(b"-")
    return int(milliseconds), int(number)


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
    """How many bytes of memory the remembered ids take, from a sample of them, and how many ids those are."""
    size = number = 0
    async for key in redis.scan_iter(match=f"{IDS}:*", count=1_000):
        async with redis.pipeline(transaction=False) as pipeline:
            pipeline.memory_usage(key, samples=SAMPLED_IDS)
            pipeline.hlen(key)
            bytes_, ids = await pipeline.execute()
        # A generation that was given up in between has no size.
        size += bytes_ or 0
        number += ids
    return size, number


async def forget_ids(redis: Redis) -> int:
    """Forget all claimed ids; how many generations there were. What waits for the ledger stays."""
    keys = [key async for key in redis.scan_iter(match=f"{IDS}:*", count=1_000)]
    return int(await redis.unlink(*keys)) if keys else 0


async def buffered_bytes(redis: Redis) -> int:
    """How much is waiting for the ledger."""
    return int(await redis.get(BYTES) or 0)


async def is_remembered(redis: Redis, source: str, id: str, now: datetime, *, dedupe_hours: int) -> bool:
    """Whether the id was claimed within the dedupe window. Raises Redis's errors: only Redis knows."""
    digest = _digest_id(source, id)
    async with redis.pipeline(transaction=False) as pipeline:
        for generation in _name_generations(now, dedupe_hours)[:-1]:
            pipeline.hexists(generation, digest)
        return any(await pipeline.execute())
