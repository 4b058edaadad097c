"""The faults: which there are, in what order a seed brings them, and how each is begun and taken back.

Whatever is taken back is only the fault itself: a killed process is started again, as its supervisor would do it, and
a cut or paused one is let go. The product has to find its own way from there.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic

import asyncpg
import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.faults.clients import Book
from tests.faults.machine import Machine, children_of

PROCESSES = ("api-1", "api-2", "worker-1", "worker-2")
SERVERS = ("postgres", "valkey")
DOORS = ("postgres", "valkey", "stripe", "api")

# Longer than the drain leaves a batch to a worker that has stopped moving (drain.py), so that it wakes up robbed.
LONG_SLEEP = (17.0, 20.0)

# kind: (weight, what it strikes, how long it lasts in seconds). The fake Stripe is never killed: it writes its state
# down every 0.2 s, which a kill would lose, and Stripe loses nothing.
KINDS: dict[str, tuple[int, tuple[str, ...], tuple[float, float]]] = {
    "kill": (8, PROCESSES + SERVERS, (0.0, 0.6)),
    "restart": (4, (*PROCESSES, *SERVERS, "stripe"), (0.0, 0.3)),
    "pause": (4, (*PROCESSES, *SERVERS, "stripe"), (0.2, 4.0)),
    "cut": (5, DOORS, (0.0, 0.0)),
    "stall": (4, DOORS, (0.3, 4.0)),
    "refuse": (3, DOORS, (0.2, 2.0)),
    "lose-answers": (5, DOORS, (0.2, 1.5)),
    "crash-backend": (2, ("postgres",), (0.0, 0.0)),
    "read-only": (3, ("postgres",), (0.5, 3.0)),
    "full": (3, ("valkey",), (0.5, 3.0)),
    "stripe-rate_limit": (2, ("stripe",), (0.5, 2.5)),
    "stripe-error_500": (2, ("stripe",), (0.5, 2.5)),
    "stripe-error_500_after": (2, ("stripe",), (0.5, 2.5)),
    "stripe-timeout_after": (3, ("stripe",), (0.5, 2.5)),
    "stripe-drop_before": (2, ("stripe",), (0.5, 2.5)),
    "stripe-slow": (2, ("stripe",), (0.5, 2.5)),
    "long-sleep": (1, ("worker-1", "worker-2"), LONG_SLEEP),
}
# The short run of the suite: every kind but the long sleep once, and a kill of each sort of part; none lasts long.
SHORT_KILLS = ("api-1", "worker-1", "valkey", "postgres")
SHORT_HOLD_SECONDS = 0.6
SHORT_GAP_SECONDS = 0.3
# Rest between the faults of one lane, on average.
GAP_SECONDS = 1.2


@dataclass(frozen=True)
class Fault:
    """One fault, as it was drawn. `gap_seconds`: how long its lane rests afterwards."""

    kind: str
    target: str
    hold_seconds: float
    gap_seconds: float


def draw(seed: int) -> Iterator[Fault]:
    """The endless sequence that belongs to a seed: every kind once, in some order, and then by weight."""
    chance = random.Random(seed)
    first = list(KINDS)
    chance.shuffle(first)
    while True:
        kind = first.pop() if first else chance.choices(list(KINDS), [plan[0] for plan in KINDS.values()])[0]
        _, targets, hold = KINDS[kind]
        yield Fault(kind, chance.choice(targets), chance.uniform(*hold), GAP_SECONDS * chance.uniform(0.2, 1.8))


def draw_short(seed: int) -> Iterator[Fault]:
    """A sequence that ends, with something of everything, for a run of seconds."""
    chance = random.Random(seed)
    chosen = [("kill", target) for target in SHORT_KILLS]
    chosen += [(kind, chance.choice(plan[1])) for kind, plan in KINDS.items() if kind not in ("kill", "long-sleep")]
    chance.shuffle(chosen)
    for kind, target in chosen:
        yield Fault(kind, target, min(chance.uniform(*KINDS[kind][2]), SHORT_HOLD_SECONDS), SHORT_GAP_SECONDS)


@dataclass
class Injector:
    """Begins faults and takes them back; two never strike one part at once."""

    machine: Machine
    book: Book
    injected: Counter[str] = field(default_factory=Counter)
    diary: list[str] = field(default_factory=list)
    until_accepted: list[float] = field(default_factory=list)
    until_well: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _busy: dict[str, asyncio.Lock] = field(default_factory=dict)
    _watches: set[asyncio.Task[None]] = field(default_factory=set)
    _began: float = field(default_factory=monotonic)

    async def run_lane(self, faults: Iterator[Fault], until: float) -> None:
        """Bring one fault after the other until they end, or until a monotonic time. Several lanes may share them."""
        for fault in faults:
            if monotonic() >= until:
                return
            async with self._busy.setdefault(fault.target, asyncio.Lock()):
                taken_back = await self.strike(fault)
            watch = asyncio.create_task(self._watch(taken_back))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
            await asyncio.sleep(fault.gap_seconds)

    async def strike(self, fault: Fault) -> float:
        """Begin, hold, take back; the monotonic time at which it was taken back: of a kill, before the new start."""
        self.injected[fault.kind] += 1
        self.diary.append(f"{monotonic() - self._began:7.1f} {fault.kind} {fault.target} {fault.hold_seconds:.2f} s")
        try:
            return await _ACTS.get(fault.kind, _misbehave)(self.machine, fault) or monotonic()
        except Exception as error:  # noqa: BLE001  a fault that fails is part of the report, and the run goes on
            self.errors.append(f"{fault.kind} {fault.target}: {type(error).__name__} {error}")
            return monotonic()

    async def watched(self) -> None:
        """Wait until it is known of every fault how long it took to be well again."""
        await asyncio.gather(*self._watches)

    async def _watch(self, since: float) -> None:
        """How long after the fault a request was accepted that began after it, and all processes said they are well."""

        async def accepted() -> float:
            while self.book.last_taken_from < since:  # noqa: ASYNC110  the clients have no event for each reader
                await asyncio.sleep(0.02)
            return monotonic() - since

        async def well() -> float:
            while not await self.machine.is_well():  # noqa: ASYNC110  it can only be asked
                await asyncio.sleep(0.1)
            return monotonic() - since

        taken, healthy = await asyncio.gather(accepted(), well())
        self.until_accepted.append(taken)
        self.until_well.append(healthy)


async def _kill(machine: Machine, fault: Fault) -> float:
    await machine.kill(fault.target)
    await asyncio.sleep(fault.hold_seconds)
    taken_back = monotonic()
    await machine.start(fault.target)
    return taken_back


async def _restart(machine: Machine, fault: Fault) -> float:
    await machine.stop(fault.target)
    await asyncio.sleep(fault.hold_seconds)
    taken_back = monotonic()
    await machine.start(fault.target)
    return taken_back


async def _pause(machine: Machine, fault: Fault) -> None:
    machine.send_signal(fault.target, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.hold_seconds)
    finally:
        machine.send_signal(fault.target, signal.SIGCONT)


async def _cut(machine: Machine, fault: Fault) -> None:
    machine.proxies[fault.target].cut()


async def _stall(machine: Machine, fault: Fault) -> None:
    machine.proxies[fault.target].stall()
    try:
        await asyncio.sleep(fault.hold_seconds)
    finally:
        machine.proxies[fault.target].flow()


async def _refuse(machine: Machine, fault: Fault) -> None:
    machine.proxies[fault.target].refuse()
    try:
        await asyncio.sleep(fault.hold_seconds)
    finally:
        await machine.proxies[fault.target].accept()


async def _lose_answers(machine: Machine, fault: Fault) -> None:
    machine.proxies[fault.target].answers_lost = True
    try:
        await asyncio.sleep(fault.hold_seconds)
    finally:
        machine.proxies[fault.target].answers_lost = False


async def _crash_backend(machine: Machine, fault: Fault) -> None:
    """PostgreSQL ends all its sessions and recovers when one of its children is killed."""
    children = children_of(machine.postgres.pid)
    if children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[-1], signal.SIGKILL)


async def _read_only(machine: Machine, fault: Fault) -> None:
    await insist(
        lambda: machine.execute("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    )
    try:
        await asyncio.sleep(fault.hold_seconds)
    finally:
        await insist(
            lambda: machine.execute("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
        )


async def _fill(machine: Machine, fault: Fault) -> None:
    """With a limit below what it holds, Valkey refuses every write, as when its memory is full."""
    redis = Redis.from_url(machine.valkey.url, socket_timeout=5)
    try:
        await insist(lambda: redis.config_set("maxmemory", "1"))
        try:
            await asyncio.sleep(fault.hold_seconds)
        finally:
            await insist(lambda: redis.config_set("maxmemory", "0"))
    finally:
        await redis.aclose()


async def _misbehave(machine: Machine, fault: Fault) -> None:
    """Stripe answers most calls of the worker wrongly: all meter events, and what it reads."""
    kind = fault.kind.removeprefix("stripe-")
    rules = [{"kind": kind, "method": "POST", "path": "/v1/billing/meter_events"}, {"kind": kind, "method": "GET"}]
    async with httpx.AsyncClient(base_url=machine.stripe_url, timeout=10) as control:
        for rule in rules:
            # Above the client's own limit of 2 s: a time-out; `slow` stays below it.
            seconds = "1" if kind == "slow" else "3"
            body = rule | {"probability": "0.7", "seconds": seconds, "path": rule.get("path", "/v1/*")}
            (await control.post("/_fake/faults", json=body)).raise_for_status()
        try:
            await asyncio.sleep(fault.hold_seconds)
        finally:
            await insist(lambda: control.delete("/_fake/faults"))


async def insist(act: Callable[[], Awaitable[object]]) -> None:
    """Do something to a part that may just be away, or on its way up, for another reason."""
    for _ in range(200):
        try:
            await act()
        except (OSError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError, httpx.HTTPError, TimeoutError):
            await asyncio.sleep(0.1)
        else:
            return
    raise TimeoutError("a fault could not be brought or taken back")


_ACTS: dict[str, Callable[[Machine, Fault], Awaitable[float | None]]] = {
    "kill": _kill,
    "restart": _restart,
    "pause": _pause,
    "long-sleep": _pause,
    "cut": _cut,
    "stall": _stall,
    "refuse": _refuse,
    "lose-answers": _lose_answers,
    "crash-backend": _crash_backend,
    "read-only": _read_only,
    "full": _fill,
}
