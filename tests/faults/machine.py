"""The machine that misbehaves: every part a real process, and a proxy in front of each server.

Two API processes, two workers, PostgreSQL, Valkey that syncs every write, and the fake Stripe. The product reaches its
servers through the proxies only; the harness itself goes past them.
"""

import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM, Signals
from typing import Any

import asyncpg
import httpx
from pydantic import SecretStr

from tallystick import db, schema
from tallystick.auth import SCOPES, create_key
from tallystick.config import Settings
from tallystick.dev.embedded import EmbeddedPostgres, EmbeddedValkey
from tallystick.dev.server_process import ServerProcess, find_free_port
from tallystick.resources import Resources, open_resources
from tallystick.stripe_gateway import API_VERSION
from tallystick.usage.partitions import keep_partitions
from tallystick.webhooks.translate import HANDLED_TYPES
from tests.faults.proxy import HOST, Proxy, open_proxy

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
# Above the longest that the API may take to end (cli.py) and that a worker's call to Stripe may last.
STOP_SECONDS = 30
WEBHOOK_SECRET = "whsec_of_the_fault_harness"
NOTIFICATION_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

# A seal every some requests, so that there is always something on its way to Stripe; and a time-out that lets a
# delivery's lease end within a run.
SETTINGS = {"TALLYSTICK_SEAL_THRESHOLD": "2000", "TALLYSTICK_STRIPE_TIMEOUT_SECONDS": "2"}


class MachineError(Exception):
    """A part did not start or did not end; the text says which and has the end of its log."""


@dataclass
class Machine:
    """The running parts by name: `api-1`, `api-2`, `worker-1`, `worker-2`, `stripe`, `postgres`, `valkey`."""

    folder: Path
    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey
    ports: dict[str, int]
    proxies: dict[str, Proxy]
    broken: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    webhook_options: dict[str, str] = field(default_factory=dict)
    """How the fake Stripe's webhooks misbehave, which it forgets when it ends."""
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    ended_by_themselves: list[str] = field(default_factory=list)
    _expected_to_end: set[int] = field(default_factory=set)

    @property
    def api_url(self) -> str:
        """The door of both API processes."""
        return f"http://{HOST}:{self.proxies['api'].ports['clients']}"

    @property
    def stripe_url(self) -> str:
        """The fake Stripe itself, past its proxy."""
        return f"http://{HOST}:{self.ports['stripe']}"

    def server(self, part: str) -> ServerProcess | None:
        """The embedded server of that name, if it is one."""
        return {"postgres": self.postgres, "valkey": self.valkey}.get(part)

    def pid(self, part: str) -> int | None:
        """The process of a part; None when it is not running."""
        server = self.server(part)
        if server is not None:
            return server.pid if server.is_running() else None
        process = self.processes[part]
        return process.pid if process.returncode is None else None

    def direct_settings(self) -> Settings:
        """Settings for the harness itself: past the proxies, patient with Stripe."""
        return Settings.model_validate(
            {
                "database_url": self.postgres.url,
                "redis_url": self.valkey.url,
                "stripe_api_key": SecretStr("sk_test_fake"),
                "stripe_webhook_secret": (SecretStr(WEBHOOK_SECRET),),
                "stripe_api_base": self.stripe_url,
                "portal_return_origins": ("http://localhost:3000",),
                "stripe_timeout_seconds": 2,
                **{
                    name.removeprefix("TALLYSTICK_").lower(): value
                    for name, value in (SETTINGS | dict(self.settings)).items()
                },
            }
        )

    async def start(self, part: str) -> None:
        """Start a part that does not run; APIs and the fake Stripe answer when this returns."""
        server = self.server(part)
        if server is not None:
            await asyncio.to_thread(server.start)
            return
        with (self.folder / f"{part}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.faults.part",
                *self._command(part),
                cwd=ROOT,
                env=self._environment(part),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[part] = process
        if part == "stripe":
            await self._wait_for(part, f"{self.stripe_url}/_fake/clock")
            await self.set_webhook_options(**self.webhook_options)
        elif part.startswith("api"):
            await self._wait_for(part, f"http://{HOST}:{self.ports[part]}/healthz")

    async def set_webhook_options(self, **options: str) -> None:
        """Have the fake Stripe's webhooks misbehave from now on."""
        self.webhook_options |= options
        async with httpx.AsyncClient(base_url=self.stripe_url, timeout=10) as control:
            (await control.post("/_fake/webhooks", json=self.webhook_options)).raise_for_status()

    async def kill(self, part: str) -> None:
        """SIGKILL, as a crash would end it."""
        server = self.server(part)
        if server is not None:
            await asyncio.to_thread(server.kill)
            return
        await self._end(part, SIGKILL)

    async def stop(self, part: str) -> None:
        """Ask it to end in order, as a deployment does. Raises `MachineError` when it does not in time."""
        server = self.server(part)
        if server is not None:
            await asyncio.to_thread(server.stop)
            return
        await self._end(part, SIGTERM)

    def send_signal(self, part: str, number: Signals) -> int:
        """Send a signal to a part and to its children, if it runs; how many processes got it."""
        pid, got = self.pid(part), 0
        for one in [*children_of(pid), pid] if pid is not None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, number)
                got += 1
        return got

    async def execute(self, *statements: str) -> Any:
        """Run statements at PostgreSQL, each by itself, past the proxy; the value that the last one gives."""
        connection = await asyncpg.connect(self.postgres.url, timeout=5)
        try:
            return [await connection.fetchval(statement, timeout=10) for statement in statements][-1]
        finally:
            await connection.close(timeout=5)

    async def is_well(self) -> bool:
        """Whether every API process says that all of its parts are."""
        async with httpx.AsyncClient(timeout=4) as client:
            answers = await asyncio.gather(
                *(client.get(f"http://{HOST}:{self.ports[part]}/readyz") for part in self.processes if "api" in part),
                return_exceptions=True,
            )
        return all(
            isinstance(answer, httpx.Response) and answer.status_code == 200 and answer.json()["status"] == "ready"
            for answer in answers
        )

    def log_tail(self, part: str, lines: int = 5) -> str:
        """The last lines of a part's log."""
        return "\n".join((self.folder / f"{part}.log").read_text(errors="replace").splitlines()[-lines:])

    def note_ended(self) -> None:
        """Remember the processes that have ended without being told to: that is a bug."""
        for part, process in self.processes.items():
            if process.returncode is not None and process.pid not in self._expected_to_end:
                self._expected_to_end.add(process.pid)
                self.ended_by_themselves.append(f"{part} ({process.returncode}): {self.log_tail(part)}")

    async def stop_all(self) -> None:
        """End every process; the embedded servers are ended by those who opened them."""
        for part in reversed(self.processes):
            process = self.processes[part]
            self._expected_to_end.add(process.pid)
            if process.returncode is None:
                self.send_signal(part, SIGCONT)
                process.kill()
        await asyncio.gather(*(process.wait() for process in self.processes.values()))

    async def _end(self, part: str, number: Signals) -> None:
        self.note_ended()
        process = self.processes[part]
        self._expected_to_end.add(process.pid)
        if process.returncode is not None:
            return
        process.send_signal(number)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise MachineError(f"{part} did not end within {STOP_SECONDS} s: {self.log_tail(part)}") from None

    def _command(self, part: str) -> Sequence[str]:
        if part == "stripe":
            return ["fake-stripe", str(self.ports["stripe"]), str(self.folder / "stripe.db")]
        broken = ["--broken", self.broken] if self.broken else []
        return [*broken, "serve" if part.startswith("api") else "worker"]

    def _environment(self, part: str) -> dict[str, str]:
        doors = {name: proxy.ports.get(part) for name, proxy in self.proxies.items()}
        own = {name: value for name, value in os.environ.items() if not name.startswith(("TALLYSTICK_", "STRIPE_"))}
        own |= {
            "DATABASE_URL": self.postgres.url.replace(f":{self.postgres.port}/", f":{doors['postgres']}/"),
            "REDIS_URL": self.valkey.url.replace(f":{self.valkey.port}/", f":{doors['valkey']}/"),
            "STRIPE_API_KEY": "sk_test_fake",
            "STRIPE_API_BASE": f"http://{HOST}:{doors['stripe']}",
            "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "TALLYSTICK_HOST": HOST,
            "TALLYSTICK_PORTAL_RETURN_ORIGINS": "http://localhost:3000",
            **SETTINGS,
            **self.settings,
        }
        if part.startswith("api"):
            own["TALLYSTICK_PORT"] = str(self.ports[part])
        return own

    async def _wait_for(self, part: str, url: str) -> None:
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        async with httpx.AsyncClient(timeout=2) as client:
            while asyncio.get_running_loop().time() < deadline and self.processes[part].returncode is None:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(url)).status_code == 200:
                        return
                await asyncio.sleep(0.03)
        raise MachineError(f"{part} did not start: {self.log_tail(part)}")


def children_of(pid: int | None) -> list[int]:
    """The processes that one has started; none where there is no /proc (PostgreSQL is then paused in part)."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@asynccontextmanager
async def open_machine(
    folder: Path,
    *,
    apis: int = 2,
    workers: int = 2,
    broken: str | None = None,
    postgres: EmbeddedPostgres | None = None,
    valkey: EmbeddedValkey | None = None,
    settings: Mapping[str, str] | None = None,
    notify: str | None = None,
) -> AsyncIterator[Machine]:
    """Start everything; end everything, whatever happens in between.

    `broken`: a bug of `breaking.BREAKS` for the API and worker processes. `postgres`, `valkey`: servers that are
    configured otherwise. `notify`: an address that is told of every change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    postgres = postgres or EmbeddedPostgres(folder / "postgres")
    valkey = valkey or EmbeddedValkey(folder / "valkey")
    names = [*(f"api-{n + 1}" for n in range(apis)), *(f"worker-{n + 1}" for n in range(workers))]
    own_settings = dict(settings or {})
    if notify is not None:
        endpoint = {"name": "product", "url": notify, "secrets": [NOTIFICATION_SECRET], "allow_private_network": True}
        lines = (f"{name} = {json.dumps(value)}" for name, value in endpoint.items())
        (folder / "rules.toml").write_text("[[notifications]]\n" + "\n".join(lines))
        own_settings["TALLYSTICK_RULES_FILE"] = str(folder / "rules.toml")
    async with AsyncExitStack() as parts:
        parts.push_async_callback(asyncio.to_thread, postgres.stop)
        parts.push_async_callback(asyncio.to_thread, valkey.stop)
        await asyncio.gather(asyncio.to_thread(postgres.start), asyncio.to_thread(valkey.start))
        ports = {name: find_free_port() for name in names if "api" in name} | {"stripe": find_free_port()}
        proxies = {
            name: await parts.enter_async_context(open_proxy(port, clients=names))
            for name, port in (("postgres", postgres.port), ("valkey", valkey.port), ("stripe", ports["stripe"]))
        }
        apis_of_all = [ports[name] for name in names if "api" in name]
        proxies["api"] = await parts.enter_async_context(open_proxy(*apis_of_all, clients=["clients"]))
        machine = Machine(folder, postgres, valkey, ports, proxies, broken, own_settings)
        parts.push_async_callback(machine.stop_all)

        async def prepare() -> None:
            async with open_resources(machine.direct_settings(), application_name="faults") as resources:
                await schema.migrate(resources.engine)
                await keep_partitions(resources, datetime.now(UTC))

        await asyncio.gather(prepare(), machine.start("stripe"))
        await _listen_to_stripe(machine)
        await asyncio.gather(*(machine.start(name) for name in names))
        yield machine


async def _listen_to_stripe(machine: Machine) -> None:
    async with httpx.AsyncClient(base_url=machine.stripe_url, timeout=10) as control:
        answer = await control.post(
            "/_fake/webhook_endpoints",
            json={
                "url": f"{machine.api_url}/webhooks/stripe",
                "secret": WEBHOOK_SECRET,
                "enabled_events": list(HANDLED_TYPES),
                "api_version": API_VERSION,
            },
        )
        answer.raise_for_status()


async def make_key(resources: Resources, source: str) -> str:
    """An API key with every scope, whose usage ids are those of `source`."""
    async with db.transaction(resources.engine) as connection:
        return await create_key(connection, name=f"{source}-{secrets.token_hex(2)}", source=source, scopes=list(SCOPES))
