"""DATABASE_URL as managed PostgreSQL gives it: TLS and the other parameters behind its `?`."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from tallystick import db, schema
from tallystick.config import driver_url
from tests.conftest import Servers, make_settings
from tests.notifications.test_addresses import make_certificate

USUAL = "connect_timeout=10&application_name=web&channel_binding=require&target_session_attrs=read-write"


async def connect(url: str) -> None:
    """Migrate and ask, as the service does; both make connections of their own."""
    engine = db.create_engine(make_settings(database_url=url), application_name="tests")
    try:
        await schema.migrate(engine)
        async with db.transaction(engine) as connection:
            assert await connection.scalar(text("SELECT current_setting('application_name')")) == "tests"
    finally:
        await engine.dispose()


@asynccontextmanager
async def tls_before(port: int, certificate: ssl.SSLContext) -> AsyncIterator[int]:
    """A port where PostgreSQL answers with TLS, which the tests' own server has not."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # SSLRequest
        writer.write(b"S")
        try:
            await writer.start_tls(certificate)
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pass_on(reader, upstream), pass_on(upstream_reader, writer))
        except OSError:  # of who does not trust the certificate
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("mode", ["disable", "prefer"])
async def test_the_usual_parameters_are_understood(servers: Servers, mode: str) -> None:
    await connect(f"{servers.postgres.url}?sslmode={mode}&{USUAL}")


async def test_tls_is_insisted_on(servers: Servers) -> None:
    with pytest.raises(ConnectionError, match="rejected SSL") as refused:
        await connect(f"{servers.postgres.url}?sslmode=require")
    assert db.is_storage_failure(refused.value)


async def test_a_certificate_is_trusted_only_as_the_url_says(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    make_certificate(tmp_path / "other", "localhost")
    other, certificate = tmp_path / "other" / "certificate.pem", tmp_path / "certificate.pem"
    async with tls_before(servers.postgres.port, make_certificate(tmp_path, "localhost")) as port:
        url = servers.postgres.url.replace(f"127.0.0.1:{servers.postgres.port}", f"localhost:{port}")
        await connect(f"{url}?sslmode=require")
        await connect(f"{url}?sslmode=verify-full&sslrootcert={certificate}")
        with pytest.raises(ssl.SSLCertVerificationError) as refused:
            await connect(f"{url}?sslmode=verify-full&sslrootcert={other}")
        assert db.is_storage_failure(refused.value)
        elsewhere = url.replace("localhost", "127.0.0.1")
        await connect(f"{elsewhere}?sslmode=verify-ca&sslrootcert={certificate}")
        with pytest.raises(ssl.SSLCertVerificationError, match=r"127\.0\.0\.1"):
            await connect(f"{elsewhere}?sslmode=verify-full&sslrootcert={certificate}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://host/name?sslmode=require&pool=5", "the parameter 'pool' is not known; there are: sslmode, "),
        ("postgresql://host/name?sslmode=sometimes", "sslmode must be one of disable, "),
        ("postgresql://host/name?target_session_attrs=standby", "target_session_attrs must be one of any, "),
        ("postgresql://host/name?sslrootcert=/nowhere.pem", "sslrootcert: there is no file '/nowhere.pem'"),
        ("postgresql://user:s3cret@s3cret:s3cret@host/name", "write @ as %40"),
    ],
)
def test_what_is_not_known_is_named(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("?", r"\?")) as refused:
        driver_url(url)
    assert "s3cret" not in str(refused.value)
