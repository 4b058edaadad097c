"""Everything on one machine, as real processes: PostgreSQL, Valkey, the fake Stripe, the API and a worker.

`tallystick run` keeps a stack until Ctrl-C; `tallystick demo` plays a month on one. The API and the worker are the same
commands that production runs, told where the parts are by the same environment variables.
"""

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import httpx
from rich.console import Console

from tallystick import db, schema
from tallystick.auth import SCOPES, create_key, list_keys
from tallystick.config import Settings, load_settings
from tallystick.dev.catalogue import create_catalogue
from tallystick.dev.embedded import EmbeddedPostgres, EmbeddedValkey
from tallystick.dev.introduction import introduce
from tallystick.dev.settings_file import write_shell
from tallystick.errors import TallystickError
from tallystick.resources import open_resources
from tallystick.stripe_gateway import API_VERSION
from tallystick.terminal import claim_port
from tallystick.usage.partitions import keep_partitions
from tallystick.webhooks.translate import HANDLED_TYPES

HOST = "127.0.0.1"
API_PORT = 8080
FAKE_STRIPE_PORT = 12111
START_TIMEOUT_SECONDS = 30
# Above the API's own grace period, so that a slow request decides and not we.
STOP_TIMEOUT_SECONDS = 20


class StackError(TallystickError):
    """A part did not start; the text says which, and where its log is."""


@dataclass
class Stack:
    """A running stack: the environment of its processes, and what can be stopped one by one."""

    data: Path
    environment: dict[str, str]
    postgres: EmbeddedPostgres | None
    valkey: EmbeddedValkey | None
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def api_url(self) -> str:
        return f"http://{HOST}:{self.environment['TALLYSTICK_PORT']}"

    @property
    def stripe_url(self) -> str:
        return self.environment["STRIPE_API_BASE"]

    @property
    def fake(self) -> bool:
        """Whether Stripe is the fake one."""
        return "fake-stripe" in self.processes

    @property
    def settings_file(self) -> Path:
        return self.data / "settings.sh"

    @contextlib.contextmanager
    def written_settings(self) -> Iterator[None]:
        """Write what the stack's processes were told, so that `scripts/run doctor` finds them; take it away at the end.

        Not before all parts have started: until then the file may be another stack's in the same folder.
        """
        self.settings_file.unlink(missing_ok=True)
        _keep_secret(self.settings_file, lambda: write_shell(self.environment, os.environ))
        try:
            yield
        finally:
            self.settings_file.unlink(missing_ok=True)

    def log_file(self, name: str) -> Path:
        return self.data / "logs" / f"{name}.log"

    def settings(self) -> Settings:
        """The settings that the stack's processes have."""
        with _environment(self.environment):
            return load_settings(to_serve=True)

    async def start_process(self, name: str, *arguments: str, **other: str) -> None:
        """Start `tallystick ARGUMENTS`, in the stack's environment but for `other`."""
        await self.start_command(name, sys.executable, "-m", "tallystick", *arguments, **other)

    async def start_command(self, name: str, *command: str, **other: str) -> None:
        """Start a command, logging to a file, in its own session: Ctrl-C reaches us, and we stop it."""
        with self.log_file(name).open("ab") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                *command,
                env=os.environ | self.environment | other,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def stop_process(self, name: str) -> None:
        """SIGTERM, and SIGKILL when the process does not end by itself in time."""
        process = self.processes[name]
        if process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def stop_processes(self) -> None:
        """Stop every process, the last started first: the fake Stripe outlives those that call it."""
        for name in reversed(self.processes):
            await self.stop_process(name)

    async def wait_for(self, name: str, url: str) -> None:
        """Wait until a process answers 200 at `url`. Raises `StackError` with the end of its log if it does not."""
        process = self.processes[name]
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_SECONDS
        async with httpx.AsyncClient(timeout=2) as client:
            while asyncio.get_running_loop().time() < deadline:
                if process.returncode is not None:
                    break
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(url)).status_code == 200:
                        return
                await asyncio.sleep(0.05)
        tail = self.log_file(name).read_text(errors="replace").splitlines()[-3:]
        raise StackError(f"{name} did not start; the end of {self.log_file(name)}:\n" + "\n".join(tail))


@asynccontextmanager
async def open_stack(
    data: Path,
    *,
    ports: Mapping[str, int],
    console: Console,
    embedded_only: bool = False,
    postgres_settings: Mapping[str, str] = MappingProxyType({}),
    valkey_settings: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Stack]:
    """Start every part, in order; stop them all, in the opposite order, whatever happens in between.

    `ports`: `api` and `fake-stripe`; 0 chooses a free one. What the environment already names (DATABASE_URL, REDIS_URL,
    STRIPE_API_KEY) is used instead of an embedded part, unless `embedded_only`. `postgres_settings` and
    `valkey_settings` are those servers' own, for the embedded ones.
    """
    given = {} if embedded_only else dict(os.environ)
    try:
        (data / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackError(f"{data} cannot be the data folder: {error.strerror}") from None
    environment = {
        "TALLYSTICK_HOST": HOST,
        "TALLYSTICK_PORT": str(claim_port(ports["api"], "TALLYSTICK_PORT", HOST)),
        "TALLYSTICK_PORTAL_RETURN_ORIGINS": given.get("TALLYSTICK_PORTAL_RETURN_ORIGINS", "http://localhost:3000"),
    }
    async with AsyncExitStack() as parts:
        stack = Stack(data, environment, None, None)
        with console.status("starting PostgreSQL and Valkey"):
            await _start_stores(stack, parts, given, postgres_settings, valkey_settings)
        parts.push_async_callback(stack.stop_processes)
        if given.get("STRIPE_API_KEY"):
            environment |= {name: given[name] for name in given if name.startswith("STRIPE_")}
        else:
            with console.status("starting the fake Stripe"):
                await _start_fake_stripe(stack, parts, ports["fake-stripe"])
        settings = stack.settings()
        with console.status("migrating the database"):
            async with open_resources(settings, application_name="tallystick run") as resources:
                await schema.migrate(resources.engine)
                await keep_partitions(resources, datetime.now(UTC))
        with console.status("starting the API and the worker"):
            for name, command in (("api", "serve"), ("worker", "worker")):
                await stack.start_process(name, command)
            await stack.wait_for("api", f"{stack.api_url}/readyz")
        yield stack


async def run_until_stopped(data: Path, stop: asyncio.Event, console: Console) -> None:
    """`tallystick run`: a stack, three commands to try on it, and its end when `stop` is set or a part dies."""
    ports = {
        "api": _read_port("TALLYSTICK_PORT", API_PORT),
        "fake-stripe": _read_port("TALLYSTICK_FAKE_STRIPE_PORT", FAKE_STRIPE_PORT),
    }
    async with open_stack(data, ports=ports, console=console) as stack:
        key = await make_development_key(stack)
        with stack.written_settings():
            if stack.fake:
                with console.status("filling the fake Stripe with a demo catalogue"):
                    await create_catalogue(stack.settings())
                    await settle(stack)
            console.print(introduce(stack, key), markup=False)
            ends = [asyncio.create_task(process.wait(), name=name) for name, process in stack.processes.items()]
            stopped = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait([*ends, stopped], return_when=asyncio.FIRST_COMPLETED)
            for end in [*ends, stopped]:
                end.cancel()
            if stopped not in done:
                name = next(iter(done)).get_name()
                raise StackError(f"{name} ended by itself; its log: {stack.log_file(name)}")
            console.print("stopping")
    console.print("stopped; the data is kept")


async def make_development_key(stack: Stack) -> str:
    """The API key of this data folder, with every scope; made again when the database no longer knows it."""
    file = stack.data / "api_key"
    async with open_resources(stack.settings(), application_name="tallystick run") as resources:
        async with db.transaction(resources.engine) as connection:
            known = {key["id"] for key in await list_keys(connection) if key["state"] == "valid"}
        if file.exists() and file.read_text().split("_")[1] in known:
            return file.read_text()
        async with db.transaction(resources.engine) as connection:
            key = await create_key(connection, name="development", source="development", scopes=list(SCOPES))
    file.unlink(missing_ok=True)
    return _keep_secret(file, lambda: key)


async def settle(stack: Stack) -> None:
    """Wait until the fake Stripe has delivered every webhook."""
    async with httpx.AsyncClient(base_url=stack.stripe_url, timeout=40) as control:
        (await control.post("/_fake/settle", json={"timeout_seconds": 30})).raise_for_status()


async def _start_stores(
    stack: Stack,
    parts: AsyncExitStack,
    given: Mapping[str, str],
    postgres_settings: Mapping[str, str],
    valkey_settings: Mapping[str, str],
) -> None:
    starts = []
    if database_url := given.get("DATABASE_URL"):
        stack.environment["DATABASE_URL"] = database_url
    else:
        stack.postgres = EmbeddedPostgres(stack.data / "postgres", settings=postgres_settings)
        parts.push_async_callback(asyncio.to_thread, stack.postgres.stop)
        starts.append(asyncio.to_thread(stack.postgres.start))
    if redis_url := given.get("REDIS_URL"):
        stack.environment["REDIS_URL"] = redis_url
    else:
        stack.valkey = EmbeddedValkey(stack.data / "valkey", settings=valkey_settings)
        parts.push_async_callback(asyncio.to_thread, stack.valkey.stop)
        starts.append(asyncio.to_thread(stack.valkey.start))
    await asyncio.gather(*starts)
    if stack.postgres is not None:
        stack.environment["DATABASE_URL"] = stack.postgres.url
    if stack.valkey is not None:
        stack.environment["REDIS_URL"] = stack.valkey.url


async def _start_fake_stripe(stack: Stack, parts: AsyncExitStack, port: int) -> None:
    port = claim_port(port, "TALLYSTICK_FAKE_STRIPE_PORT", HOST)
    secret = _keep_secret(stack.data / "webhook_secret", lambda: f"whsec_{secrets.token_hex(24)}")
    stack.environment |= {
        "STRIPE_API_KEY": "sk_test_fake",
        "STRIPE_WEBHOOK_SECRET": secret,
        "STRIPE_API_BASE": f"http://{HOST}:{port}",
    }
    state = stack.data / "fake-stripe.db"
    state.touch()
    state.chmod(0o600)  # like the rest of the folder: it has the secrets of webhook endpoints
    await stack.start_process("fake-stripe", "fake-stripe", "--port", str(port), "--state", str(state))
    await stack.wait_for("fake-stripe", f"{stack.stripe_url}/_fake/clock")
    async with httpx.AsyncClient(base_url=stack.stripe_url, timeout=10) as control:
        answer = await control.post(
            "/_fake/webhook_endpoints",
            json={
                "url": f"{stack.api_url}/webhooks/stripe",
                "secret": secret,
                "enabled_events": list(HANDLED_TYPES),
                "api_version": API_VERSION,
            },
        )
        answer.raise_for_status()


def _keep_secret(file: Path, make: Callable[[], str]) -> str:
    """A secret that stays the same from start to start, readable by its owner only."""
    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(make())
    return file.read_text().strip()


def _read_port(name: str, default: int) -> int:
    """The port that a variable of the environment names."""
    value = os.environ.get(name) or str(default)
    if not (value.isascii() and value.isdigit() and int(value) <= 65535):
        raise StackError(f"{name} is no port from 0 to 65535: {value}")
    return int(value)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
