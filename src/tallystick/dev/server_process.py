"""One embedded server as a child process: its data folder, its lock, its port, its start and its end."""

import contextlib
import errno
import fcntl
import json
import os
import pwd
import random
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple

from tallystick.dev import keeper
from tallystick.errors import TallystickError

HOST = "127.0.0.1"

FREE_PORTS = range(15_000, 32_000)
"""Below what Linux (32768 up) and macOS (49152 up) give to outgoing connections: none takes a port during a restart."""

START_SECONDS = 60
"""Long enough for recovery after a crash on a slow disk."""

STOP_SECONDS = 30
"""An orderly shutdown writes everything out; a server that takes longer is killed, which its log survives."""

LOCK_SECONDS = 40
"""How long a server that is already going down may still hold the lock: the keeper's own limit and a little more."""

POLL_SECONDS = 0.01


ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
"""What the servers and their tools see of the environment: nothing of the caller's, such as PGPORT."""


class EmbeddedServerError(TallystickError):
    """An embedded PostgreSQL or Valkey cannot start; the text says why, in words for the person at the terminal."""


class Account(NamedTuple):
    """The system user that a server runs as."""

    uid: int
    gid: int


class ServerProcess(ABC):
    """A server from a wheel, on 127.0.0.1, its data in a folder, its log and its lock beside that folder.

    The server is a grandchild of this process, in a session of its own: a Ctrl-C in the terminal does not reach it, so
    that it is stopped by `stop()`, after its users; should this process die, `tallystick.dev.keeper` stops it. Started
    by root, it runs as another user: the owner of the data folder, or `nobody` for a new one (PostgreSQL refuses to be
    root).

    All methods block: for milliseconds, but for the first start, and for a stop with much to write. Inside an event
    loop call them with `asyncio.to_thread`. One object is not to be used from two threads at once.
    """

    name: str
    stop_signal: signal.Signals

    def __init__(
        self, data_dir: Path, port: int = 0, *, durable: bool = True, settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Describe the server; nothing happens before `start()`.

        `port` 0 means a free one, chosen at the first start and kept from then on. Without `durable` a crash of the
        machine (not one of the server) may lose data: for tests that do not care. `settings` of the server's own come
        on top of those here.
        """
        self.data_dir = data_dir.absolute()
        self.port = port
        self.durable = durable
        self.settings = settings
        self.log_file = self._beside("log")
        self.pid: int | None = None
        self._port_is_ours_to_choose = port == 0
        self._keeper: subprocess.Popen[str] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the server is; valid once it has been started."""

    @property
    @abstractmethod
    def _binaries(self) -> tuple[Path, ...]:
        """The files and folders of the wheel that the server needs."""

    @abstractmethod
    def _initialize(self, account: Account | None) -> None:
        """Make the data folder; called with the lock held, when the folder is missing or empty."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The server's command line."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the server with our `pid` accepts connections on our `port`."""

    def start(self) -> None:
        """Start the server, and return once it accepts connections.

        Raises `EmbeddedServerError` if it cannot: the data folder is in use, the port is taken, or the server ends
        (the text then has its last words).
        """
        if self.is_running():
            raise EmbeddedServerError(f"{self.name} in {self.data_dir} is running already")
        self._forget()
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        account = self._account()
        with self._locked() as lock:
            if account is not None:
                self._let_in(account)
            if not self.data_dir.exists() or not any(self.data_dir.iterdir()):
                self._initialize(account)
            while not self._start_on_port(account, lock):
                self.port = 0

    def stop(self) -> None:
        """Shut the server down in order; nothing happens if it is not running. After `STOP_SECONDS` it is killed."""
        self._send(self.stop_signal)
        try:
            self._wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would; nothing happens if it is not running."""
        self._send(signal.SIGKILL)
        self._wait(STOP_SECONDS)

    def restart(self) -> None:
        """`stop()` and `start()`, on the same port."""
        self.stop()
        self.start()

    def is_running(self) -> bool:
        """Whether the server's process lives."""
        return self._keeper is not None and self._keeper.poll() is None

    def _start_on_port(self, account: Account | None, lock: IO[str]) -> bool:
        """Start on `port`, or on a free one if that is 0. False: somebody took the free port first, so try another."""
        if self.port == 0:
            self.port = find_free_port()
        log_size = self.log_file.stat().st_size if self.log_file.exists() else 0
        self._launch(account, lock)
        deadline = time.monotonic() + START_SECONDS
        while self.is_running():
            if self._is_ready():
                self._port_is_ours_to_choose = False
                return True
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(POLL_SECONDS)
        self._forget()
        if not is_free(self.port):
            if self._port_is_ours_to_choose:
                return False
            raise EmbeddedServerError(f"{self.name} cannot use port {self.port} of {HOST}: another program uses it")
        with self.log_file.open("rb") as log:
            log.seek(log_size)
            last_lines = log.read().decode(errors="replace").splitlines()[-12:]
        raise EmbeddedServerError(
            "\n  ".join([f"{self.name} did not start; the end of its log, {self.log_file}:", *last_lines])
        )

    def _launch(self, account: Account | None, lock: IO[str]) -> None:
        order = {
            "command": self._command(),
            "environment": ENVIRONMENT,
            "uid": account.uid if account else None,
            "gid": account.gid if account else None,
            "stop_signal": self.stop_signal,
            "lock_fd": lock.fileno(),
        }
        with self.log_file.open("ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        assert self._keeper.stdout is not None
        with self._keeper.stdout as answer:
            pid = answer.readline()
        self.pid = int(pid) if pid else None
        lock.truncate(0)
        lock.write(f"{os.getpid()} {self.pid}")
        lock.flush()

    def _send(self, number: signal.Signals) -> None:
        if self._keeper is not None and self.is_running():
            assert self._keeper.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself in this moment
                self._keeper.stdin.write(f"{number.value}\n")
                self._keeper.stdin.flush()

    def _wait(self, seconds: float) -> None:
        if self._keeper is not None:
            self._keeper.wait(seconds)
            self._forget()

    def _forget(self) -> None:
        """Let go of a keeper that has ended."""
        if self._keeper is not None and self._keeper.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._keeper.stdin.close()
        self._keeper = None
        self.pid = None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        """Hold the data folder's lock.

        The server inherits it, with all its children, so it is free when the last of them has ended. A server that was
        killed needs a moment for that, and so does one whose tallystick has just died: these are waited for.
        """
        deadline = time.monotonic() + LOCK_SECONDS
        with self._beside("lock").open("a+") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    lock.seek(0)
                    owner, _, server = lock.read().strip().partition(" ")
                    going_down = owner and (int(owner) == os.getpid() or not is_alive(int(owner)))
                    if not going_down or time.monotonic() > deadline:
                        raise EmbeddedServerError(
                            f"{self.name} is already running in {self.data_dir}"
                            + (f" as process {server}, started by process {owner}" if server else "")
                        ) from None
                    time.sleep(POLL_SECONDS)
            yield lock

    def _account(self) -> Account | None:
        """The user to run as; None: the present one."""
        made = self.data_dir.stat() if self.data_dir.exists() else None
        if os.geteuid() != 0:
            if made is not None and made.st_uid != os.geteuid():
                raise EmbeddedServerError(f"{self.data_dir} belongs to another user (was it made by root?)")
            return None
        if made is not None and made.st_uid != 0:
            return Account(made.st_uid, made.st_gid)
        nobody = pwd.getpwnam("nobody")
        return Account(nobody.pw_uid, nobody.pw_gid)

    def _let_in(self, account: Account) -> None:
        """Let the account reach its data and its binaries, with the least that does it.

        The data folder becomes its own. The folders above get the permission to be passed through (not to be listed)
        where others lack it; the wheel's files get the permission to be read where they were installed without.
        """
        self.data_dir.mkdir(mode=0o700, exist_ok=True)
        os.chown(self.data_dir, *account)
        for path in (self.data_dir, *self._binaries):
            for parent in path.resolve().parents:
                allow(parent, 0o001)
        for root in self._binaries:
            if not root.stat().st_mode & 0o004:
                for path in (root, *root.rglob("*")):
                    allow(path, 0o005 if path.is_dir() or path.stat().st_mode & 0o100 else 0o004)

    def _beside(self, suffix: str) -> Path:
        return self.data_dir.with_name(f"{self.data_dir.name}.{suffix}")


def allow(path: Path, bits: int) -> None:
    """Add permissions to a file or folder if it lacks them."""
    mode = path.stat().st_mode
    if mode & bits != bits:
        path.chmod(mode | bits)


def find_package(name: str) -> Path:
    """The folder of an installed package, found without importing it: these packages warn when they are imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(f"the package {name} is missing: install tallystick[embedded]")
    return Path(spec.submodule_search_locations[0])


def find_free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    for port in random.SystemRandom().sample(FREE_PORTS, 200):
        if is_free(port):
            return port
    raise EmbeddedServerError(f"no free port on {HOST} between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def is_free(port: int) -> bool:
    """Whether a server could listen on that port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # Connections of an earlier server that linger in TIME_WAIT are no obstacle; a listener still is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def is_alive(pid: int) -> bool:
    """Whether a process with that id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
