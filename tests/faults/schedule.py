"""The faults: which there are, in what order a seed brings them, and how each is begun and taken back.

Whatever is taken back is only the fault itself: a killed process is started again, as its supervisor would do it, and
a cut or paused one is let go. The product has to find its own way from there.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar

import asyncpg
import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.faults.clients import Book
from tests.faults.machine import Machine, children_of
from tests.faults.proxy import HOST

Answer = TypeVar("Answer")

WORKERS = ("worker-1", "worker-2")
PROCESSES = ("api-1", "api-2", *WORKERS)
SERVERS = ("postgres", "valkey")
DOORS = ("postgres", "valkey", "stripe", "api")

END_SESSION = "count(*) FILTER (WHERE pg_terminate_backend(pid, 1000)) > 0"

# Longer than the drain leaves a batch to a worker that has stopped moving (drain.py), so that it wakes up robbed.
LONG_SLEEP = (17.0, 20.0)

# A fault that has met nothing yet goes on for so long at most: a connection may be idle, or a part away for another
# reason, PostgreSQL above all, which on a slow disk recovers for a while. Faults that never meet anything do not count.
MEET_SECONDS = 30.0
# How long a part may be away when a fault is to be brought or taken back.
INSIST_SECONDS = 60.0

# kind: (weight, what it strikes, how long it lasts in seconds). `cut-…` and `end-…` strike the connections of one
# process only; an API process has none to Stripe most of the time.
KINDS: dict[str, tuple[int, tuple[str, ...], tuple[float, float]]] = {
    "kill": (8, (*PROCESSES, *SERVERS, "stripe"), (0.0, 0.6)),
    "restart": (4, (*PROCESSES, *SERVERS, "stripe"), (0.0, 0.3)),
    "pause": (4, (*PROCESSES, *SERVERS, "stripe"), (0.2, 4.0)),
    "cut": (5, DOORS, (0.0, 0.0)),
    "cut-postgres": (2, PROCESSES, (0.0, 0.0)),
    "cut-valkey": (2, PROCESSES, (0.0, 0.0)),
    "cut-stripe": (2, WORKERS, (0.0, 0.0)),
    "end-postgres": (2, PROCESSES, (0.0, 0.0)),
    "end-valkey": (2, PROCESSES, (0.0, 0.0)),
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
    "long-sleep": (1, WORKERS, LONG_SLEEP),
}
# The short run of the suite: every kind but the long sleep once, and a kill of each sort of part; none lasts long.
SHORT_KILLS = ("api-1", "worker-1", "valkey", "postgres", "stripe")
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

    @property
    def parts(self) -> set[str]:
        """What no other fault may strike meanwhile: its target, and for `cut-…` and `end-…` also the other side."""
        _, hyphen, other = self.kind.partition("-")
        return {self.target} | ({other} if hyphen and other in DOORS else set())


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
    """Begins faults and takes them back; two never strike one part at once.

    `injected` counts the faults that really met something, `met_nothing` the others.
    """

    machine: Machine
    book: Book
    injected: Counter[str] = field(default_factory=Counter)
    met_nothing: Counter[str] = field(default_factory=Counter)
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
            async with AsyncExitStack() as parts:
                for part in sorted(fault.parts):  # in one order, so that no two lanes wait for each other
                    await parts.enter_async_context(self._busy.setdefault(part, asyncio.Lock()))
                taken_back = await self.strike(fault)
            watch = asyncio.create_task(self._watch(taken_back))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
            await asyncio.sleep(fault.gap_seconds)

    async def strike(self, fault: Fault) -> float:
        """Begin, hold, take back; the monotonic time at which it was taken back: of a kill, before the new start."""
        self.diary.append(f"{monotonic() - self._began:7.1f} {fault.kind} {fault.target} {fault.hold_seconds:.2f} s")
        try:
            taken_back = await _ACTS.get(fault.kind, _misbehave)(self.machine, fault)
        except MetNothing:
            self.met_nothing[fault.kind] += 1
        except Exception as error:  # noqa: BLE001  a fault that fails is part of the report, and the run goes on
            self.errors.append(f"{fault.kind} {fault.target}: {type(error).__name__} {error}")
        else:
            self.injected[fault.kind] += 1
            return taken_back or monotonic()
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


class MetNothing(Exception):
    """A fault was brought and taken back, and nothing was there that it could have struck."""


async def hold(seconds: float, has_met: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait so long, and on until the fault has met something. Raises `MetNothing` if it never does."""
    await asyncio.sleep(seconds)
    deadline = monotonic() + MEET_SECONDS
    while True:
        met = has_met()
        if met if isinstance(met, bool) else await met:
            return
        if monotonic() > deadline:
            raise MetNothing
        await asyncio.sleep(0.02)


async def _kill(machine: Machine, fault: Fault) -> float:
    return await _bring_down(machine, fault, machine.kill)


async def _restart(machine: Machine, fault: Fault) -> float:
    return await _bring_down(machine, fault, machine.stop)


async def _bring_down(machine: Machine, fault: Fault, end: Callable[[str], Awaitable[None]]) -> float:
    ran = machine.pid(fault.target) is not None
    await end(fault.target)
    await asyncio.sleep(fault.hold_seconds)
    taken_back = monotonic()
    await machine.start(fault.target)
    if not ran:
        raise MetNothing
    return taken_back


async def _pause(machine: Machine, fault: Fault) -> None:
    paused = machine.send_signal(fault.target, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.hold_seconds)
    finally:
        machine.send_signal(fault.target, signal.SIGCONT)
    if not paused:
        raise MetNothing


async def _cut(machine: Machine, fault: Fault) -> None:
    await hold(fault.hold_seconds, lambda: machine.proxies[fault.target].cut() > 0)


async def _cut_one(machine: Machine, fault: Fault) -> None:
    """Only what this process has open to that part: the others go on."""
    await hold(fault.hold_seconds, lambda: machine.proxies[fault.kind.removeprefix("cut-")].cut(fault.target) > 0)


async def _stall(machine: Machine, fault: Fault) -> None:
    proxy = machine.proxies[fault.target]
    before = proxy.held
    proxy.stall()
    try:
        await hold(fault.hold_seconds, lambda: proxy.held > before)
    finally:
        proxy.flow()


async def _refuse(machine: Machine, fault: Fault) -> None:
    proxy = machine.proxies[fault.target]
    await hold(0, lambda: bool(proxy.passages()))
    proxy.refuse()
    try:
        await asyncio.sleep(fault.hold_seconds)
    finally:
        await proxy.accept()


async def _lose_answers(machine: Machine, fault: Fault) -> None:
    proxy = machine.proxies[fault.target]
    before = proxy.lost
    proxy.loses_answers = True
    try:
        await hold(fault.hold_seconds, lambda: proxy.lost > before)
    finally:
        proxy.loses_answers = False


async def _end_at_postgres(machine: Machine, fault: Fault) -> None:
    """PostgreSQL ends this process's sessions itself, and says so; by its port it knows whose a session is."""

    async def has_ended_some() -> bool:
        ports = [passage.far_port for passage in machine.proxies["postgres"].passages(fault.target)]
        statement = f"SELECT {END_SESSION} FROM pg_stat_activity WHERE client_port = ANY (ARRAY{ports}::int[])"  # noqa: S608  numbers
        return bool(await insist(lambda: machine.execute(statement)))

    await hold(fault.hold_seconds, has_ended_some)


async def _end_at_valkey(machine: Machine, fault: Fault) -> None:
    """The same at Valkey, with CLIENT KILL."""
    async with Redis.from_url(machine.valkey.url, socket_timeout=5) as redis:

        async def has_ended_some() -> bool:
            passages = machine.proxies["valkey"].passages(fault.target)
            ended = [await redis.client_kill_filter(addr=f"{HOST}:{passage.far_port}") for passage in passages]
            return any(ended)

        await hold(fault.hold_seconds, lambda: insist(has_ended_some))


async def _crash_backend(machine: Machine, fault: Fault) -> float:
    """PostgreSQL ends all its sessions and recovers when one of its children is killed."""

    def has_killed_one() -> bool:
        try:
            os.kill(children_of(machine.postgres.pid)[-1], signal.SIGKILL)
        except (IndexError, ProcessLookupError):
            return False
        return True

    await hold(fault.hold_seconds, has_killed_one)
    killed = monotonic()
    await insist(lambda: machine.execute("SELECT 1"))
    return killed


async def _read_only(machine: Machine, fault: Fault) -> None:
    await insist(
        lambda: machine.execute("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    )

    async def is_read_only() -> bool:
        return str(await insist(lambda: machine.execute("SHOW default_transaction_read_only"))) == "on"

    try:
        await hold(fault.hold_seconds, is_read_only)
    finally:
        await insist(
            lambda: machine.execute("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
        )


async def _fill(machine: Machine, fault: Fault) -> None:
    """With a limit below what it holds, Valkey refuses every write, as when its memory is full."""
    async with Redis.from_url(machine.valkey.url, socket_timeout=5) as redis:

        async def refused() -> int:
            errors = await insist(lambda: redis.info("errorstats"))
            return int(errors.get("errorstat_OOM", {}).get("count", 0))

        async def has_refused_some() -> bool:
            return await refused() > before

        before = await refused()
        await insist(lambda: redis.config_set("maxmemory", "1"))
        try:
            await hold(fault.hold_seconds, has_refused_some)
        finally:
            await insist(lambda: redis.config_set("maxmemory", "0"))


async def _misbehave(machine: Machine, fault: Fault) -> None:
    """Stripe answers most calls of the worker wrongly: all meter events, and what it reads."""
    kind = fault.kind.removeprefix("stripe-")
    rules = [{"kind": kind, "method": "POST", "path": "/v1/billing/meter_events"}, {"kind": kind, "method": "GET"}]
    async with httpx.AsyncClient(base_url=machine.stripe_url, timeout=10) as control:

        async def has_struck() -> bool:
            there = (await control.get("/_fake/faults")).json()["faults"]
            return sum(int(rule["struck"]) for rule in there) > 0

        for rule in rules:
            # Above the client's own limit of 2 s: a time-out; `slow` stays below it.
            seconds = "1" if kind == "slow" else "3"
            body = rule | {"probability": "0.7", "seconds": seconds, "path": rule.get("path", "/v1/*")}
            (await control.post("/_fake/faults", json=body)).raise_for_status()
        try:
            await hold(fault.hold_seconds, has_struck)
        finally:
            await insist(lambda: control.delete("/_fake/faults"))


async def insist(act: Callable[[], Awaitable[Answer]]) -> Answer:
    """Do something to a part that may just be away, or on its way up, for another reason."""
    deadline = monotonic() + INSIST_SECONDS
    while monotonic() < deadline:
        try:
            return await act()
        except (OSError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError, httpx.HTTPError, TimeoutError):
            await asyncio.sleep(0.1)
    raise TimeoutError("a fault could not be brought or taken back")


_ACTS: dict[str, Callable[[Machine, Fault], Awaitable[float | None]]] = {
    "kill": _kill,
    "restart": _restart,
    "pause": _pause,
    "long-sleep": _pause,
    "cut": _cut,
    "cut-postgres": _cut_one,
    "cut-valkey": _cut_one,
    "cut-stripe": _cut_one,
    "end-postgres": _end_at_postgres,
    "end-valkey": _end_at_valkey,
    "stall": _stall,
    "refuse": _refuse,
    "lose-answers": _lose_answers,
    "crash-backend": _crash_backend,
    "read-only": _read_only,
    "full": _fill,
}
