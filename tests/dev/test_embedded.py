"""Each test starts its own servers: what is tested is their starting, stopping and dying."""

import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

import tallystick
from tallystick.dev import server_process
from tallystick.dev.embedded import EmbeddedPostgres, EmbeddedServerError, EmbeddedValkey

Server = EmbeddedPostgres | EmbeddedValkey
MakeServer = Callable[[Path], Server]

both = pytest.mark.parametrize("make", [EmbeddedPostgres, EmbeddedValkey])


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


async def write(server: Server, value: str) -> None:
    """Put a value where `read` finds it, as a user of the server does."""
    if isinstance(server, EmbeddedPostgres):
        connection = await asyncpg.connect(server.url)
        try:
            await connection.execute("CREATE TABLE IF NOT EXISTS notches (value text)")
            await connection.execute("INSERT INTO notches VALUES ($1)", value)
        finally:
            await connection.close()
    else:
        async with Redis.from_url(server.url) as redis:
            await redis.rpush("notches", value)


async def read(server: Server) -> list[str]:
    if isinstance(server, EmbeddedPostgres):
        connection = await asyncpg.connect(server.url)
        try:
            return [row["value"] for row in await connection.fetch("SELECT value FROM notches ORDER BY value")]
        finally:
            await connection.close()
    else:
        async with Redis.from_url(server.url, decode_responses=True) as redis:
            return sorted(str(value) for value in await redis.lrange("notches", 0, -1))


@both
async def test_data_survives_a_stop_a_crash_and_a_restart(make: MakeServer, tmp_path: Path) -> None:
    server = make(tmp_path / "with space" / "data")
    with running(server):
        url = server.url
        await write(server, "1 before the stop")
        server.stop()
        assert (server.is_running(), server.pid) == (False, None)

        server.start()
        await write(server, "2 before the crash")
        server.kill()
        assert not server.is_running()

        server.start()
        await write(server, "3 before the restart")
        first_pid = server.pid
        server.restart()
        assert server.pid != first_pid
        assert server.is_running()

        assert await read(server) == ["1 before the stop", "2 before the crash", "3 before the restart"]
        assert server.url == url, "clients reconnect to the address that they know"


@both
async def test_a_server_killed_by_somebody_else_starts_again(make: MakeServer, tmp_path: Path) -> None:
    with running(make(tmp_path / "data")) as server:
        await write(server, "kept")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.kill()
        server.start()
        assert await read(server) == ["kept"]


@both
async def test_two_at_once_do_not_meet(make: MakeServer, tmp_path: Path) -> None:
    with running(make(tmp_path / "one")) as one, running(make(tmp_path / "two")) as two:
        assert one.port != two.port
        await write(one, "one")
        await write(two, "two")
        assert await read(one) == ["one"]
        assert await read(two) == ["two"]


async def test_what_is_answered_is_on_disk(tmp_path: Path) -> None:
    postgres, valkey = EmbeddedPostgres(tmp_path / "postgres"), EmbeddedValkey(tmp_path / "valkey")
    with running(postgres), running(valkey):
        connection = await asyncpg.connect(postgres.url)
        try:
            for name in ("fsync", "full_page_writes", "synchronous_commit"):
                assert await connection.fetchval(f"SHOW {name}") == "on"
            assert await connection.fetchval("SHOW server_encoding") == "UTF8"
            assert await connection.fetchval("SHOW timezone") == "UTC"
            assert await connection.fetchval("SHOW server_version_num") >= "180000"
        finally:
            await connection.close()
        async with Redis.from_url(valkey.url, decode_responses=True) as redis:
            wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}
            assert await redis.config_get(*wanted) == wanted


@both
def test_a_second_start_on_the_same_folder_is_refused_in_one_line(make: MakeServer, tmp_path: Path) -> None:
    with running(make(tmp_path / "data")) as first:
        second = make(tmp_path / "data")
        # Asked by another process: this one would take its own server for one that is going down, and wait.
        script = f"""
            import sys
            from pathlib import Path
            from tallystick.dev.embedded import *
            try:
                {type(second).__name__}(Path({str(second.data_dir)!r})).start()
            except EmbeddedServerError as error:
                sys.exit(str(error))
        """
        ended = run_python(script)
        assert ended.returncode == 1
        assert ended.stderr == (
            f"{first.name} is already running in {first.data_dir}"
            f" as process {first.pid}, started by process {os.getpid()}\n"
        )
        assert first.is_running()
        with pytest.raises(EmbeddedServerError, match="is running already"):
            first.start()


@both
def test_a_taken_port_is_named(make: Callable[..., Server], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = make(tmp_path / "data", port)
        with pytest.raises(EmbeddedServerError, match=f"cannot use port {port} of 127.0.0.1"):
            server.start()
        assert not server.is_running()
    with running(server):
        assert server.port == port


@both
def test_a_free_port_that_is_taken_in_the_last_moment_is_given_up(
    make: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = server_process.find_free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = iter([other.getsockname()[1], free])
        monkeypatch.setattr(server_process, "find_free_port", lambda: next(ports))
        with running(make(tmp_path / "data")) as server:
            assert server.port == free


@both
async def test_servers_end_with_a_tallystick_that_was_killed(make: MakeServer, tmp_path: Path) -> None:
    server = make(tmp_path / "data")
    with running(server):
        await write(server, "kept")
    killed = run_python(f"""
        import os, signal
        from pathlib import Path
        from tallystick.dev.embedded import *
        {type(server).__name__}(Path({str(server.data_dir)!r})).start()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert killed.returncode == -signal.SIGKILL
    # Starting waits for the folder's lock, which the orphan holds until it has ended.
    with running(server):
        assert await read(server) == ["kept"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
async def test_a_server_ends_with_its_keeper(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "data")
    with running(server):
        await write(server, "kept")
        assert server.pid is not None
        stat_fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        os.kill(int(stat_fields[1]), signal.SIGKILL)
        server.kill()
        server.start()
        assert await read(server) == ["kept"]


@both
def test_ctrl_c_in_the_terminal_does_not_reach_the_server(make: MakeServer, tmp_path: Path) -> None:
    with running(make(tmp_path / "data")) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) != os.getsid(0)


@both
def test_a_server_that_cannot_start_leaves_its_last_words(make: MakeServer, tmp_path: Path) -> None:
    server = make(tmp_path / "data")
    with running(server):
        pass
    if isinstance(server, EmbeddedPostgres):
        (server.data_dir / "PG_VERSION").write_text("12\n")
        reason = "was initialized by PostgreSQL version 12"
    else:
        (server.data_dir / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
        reason = "Invalid AOF manifest file format"
    with pytest.raises(EmbeddedServerError, match=reason):
        server.start()
    assert not server.is_running()


async def test_a_crashed_server_whose_process_id_came_back_starts_again(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "data")
    with running(server):
        await write(server, "kept")
        owner = (server.data_dir / "postmaster.pid").stat().st_uid
        server.kill()
        with subprocess.Popen(["sleep", "60"], user=owner if os.geteuid() == 0 else None) as other:
            pid_file = server.data_dir / "postmaster.pid"
            lines = pid_file.read_text().splitlines()
            pid_file.write_text("\n".join([str(other.pid), *lines[1:]]) + "\n")
            try:
                server.start()
            finally:
                other.kill()
        assert await read(server) == ["kept"]


@both
def test_an_interrupted_first_start_is_done_again(make: MakeServer, tmp_path: Path) -> None:
    (tmp_path / "data.new").mkdir()
    (tmp_path / "data.new" / "PG_VERSION").write_text("18\n")
    with running(make(tmp_path / "data")) as server:
        assert server.is_running()


@both
async def test_works_as_the_present_user(make: MakeServer, tmp_path: Path) -> None:
    """Started by root, the servers run as somebody else, who may pass through the folders above, and no more."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with running(make(closed / "data")) as server:
        await write(server, "as the present user")
        made_by_server = server.data_dir / ("postmaster.pid" if server.name == "PostgreSQL" else "appendonlydir")
        server_user = made_by_server.stat().st_uid
        assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700
        if os.geteuid() == 0:
            assert server_user == pwd.getpwnam("nobody").pw_uid
            assert stat.S_IMODE(closed.stat().st_mode) == 0o701
        else:
            assert server_user == os.geteuid()
            assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@both
async def test_works_as_an_ordinary_user(make: MakeServer, tmp_path: Path) -> None:
    """Root tries an ordinary user's way; an ordinary user tries the same once more, from another process."""
    home = tmp_path / "home"
    home.mkdir()
    user = None
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user = nobody.pw_uid
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        for folder in (tmp_path, *tmp_path.parents):
            server_process.allow(folder, 0o001)
    server = make(home / "data")
    started = run_python(
        f"""
        import os
        from pathlib import Path
        from tallystick.dev.embedded import *
        server = {type(server).__name__}(Path({str(server.data_dir)!r}))
        server.start()
        server.restart()
        server.kill()
        server.start()
        server.stop()
        print(os.geteuid())
        """,
        user=user,
    )
    assert started.stderr == ""
    assert started.stdout == f"{os.geteuid() if user is None else user}\n"
    # What that user made, root can use too, and it stays that user's.
    with running(server):
        await write(server, "as root")
        assert {path.stat().st_uid for path in server.data_dir.rglob("*")} == {server.data_dir.stat().st_uid}


def run_python(script: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program that uses the package as it is here."""
    python = sys.executable if user is None else find_python_for(user)
    return _run(python, textwrap.dedent(script), user)


def find_python_for(user: int) -> str:
    """A Python that this user may run: root's own is often in root's home. What is run needs no packages."""
    for name in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        with suppress(OSError):
            if _run(name, "import tallystick.dev.embedded", user).returncode == 0:
                return name
    pytest.skip("root's Python and its packages are closed to ordinary users here, and there is no other")


def _run(python: str, script: str, user: int | None) -> subprocess.CompletedProcess[str]:
    packages = [Path(module.__file__ or "").parents[1] for module in (tallystick, asyncpg)]
    return subprocess.run(
        [python, "-c", script],
        env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(map(str, packages)), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=50,
        user=user,
        group=None if user is None else pwd.getpwuid(user).pw_gid,
        extra_groups=None if user is None else [],
        check=False,
    )
