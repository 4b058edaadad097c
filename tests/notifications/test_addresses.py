"""An endpoint's URL must not make this service talk to what only it can reach."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tallystick.errors import SettingsError
from tallystick.notifications import sending
from tallystick.notifications.addresses import AddressRefused, is_public, resolve
from tallystick.notifications.delivery import deliver_notifications
from tallystick.resources import Resources
from tallystick.rules import load_rules
from tests.notifications.receiving import endpoint, make_due, states, tell, with_endpoints


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "172.15.255.255",
        "172.32.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "223.255.255.255",
        "2606:4700:4700::1111",
        "2a00:1450:4001:82a::200e",
        "64:ff9b::808:808",
    ],
)
def test_public_addresses_are_taken(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.8",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "100::1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::1",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_all_others_are_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "0", "::1", "::ffff:127.0.0.1"],
)
async def test_a_name_or_another_spelling_of_an_inner_address_is_refused(host: str) -> None:
    with pytest.raises(AddressRefused):
        await resolve(host, 443, allow_private_network=False)


async def test_one_inner_address_among_public_ones_refuses_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two_answers(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")]

    # The system's resolver is outside of this process; no public name answers like this for a test.
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two_answers)
    with pytest.raises(AddressRefused, match=r"10\.0\.0\.1"):
        await resolve("mixed.example.com", 443, allow_private_network=False)
    assert await resolve("mixed.example.com", 443, allow_private_network=True) == ["8.8.8.8", "10.0.0.1"]


@asynccontextmanager
async def listening(tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A port of 127.0.0.1 that answers 204, and the heads of the requests that came. A connection is a head, too."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(b"")
        heads[-1] = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1], heads


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "[::ffff:127.0.0.1]"])
async def test_an_endpoint_inside_is_not_even_connected_to(resources: Resources, tmp_path: Path, host: str) -> None:
    async with listening() as (port, heads):
        url = f"https://{host}:{port}/"
        inside = with_endpoints(resources, tmp_path, endpoint("inside", url, allow_private_network=False))
        await tell(inside, "cus_1")
        await deliver_notifications(inside, datetime.now(UTC))
    [(state, tries, outcome)] = await states(resources)
    assert (state, tries) == ("pending", 1)
    assert outcome.startswith("address refused: ")
    assert heads == []


def make_certificate(folder: Path, name: str) -> ssl.SSLContext:
    """A certificate for one name, its own authority; what a server needs to use it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


async def test_the_checked_address_is_connected_to_under_the_hosts_name(
    resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_certificate(tmp_path, "localhost")
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    monkeypatch.setattr(sending, "trust_receivers", sending.trust_receivers.__wrapped__)  # which reads it anew
    async with listening(server) as (port, heads):
        named = with_endpoints(resources, tmp_path, endpoint("named", f"https://localhost:{port}/hooks?a=b"))
        await tell(named, "cus_1")
        await deliver_notifications(named, datetime.now(UTC))
        assert await states(named) == [("delivered", 1, "status 204")]
        assert asked == ["localhost"]
        assert heads[0].startswith(b"POST /hooks?a=b HTTP/1.1\r\n")
        assert f"host: localhost:{port}".encode() in heads[0].lower()

        # The certificate is for the name, and so the same server under its address is not believed.
        other = with_endpoints(resources, tmp_path, endpoint("named", f"https://127.0.0.1:{port}/"))
        await tell(other, "cus_2")
        await deliver_notifications(other, datetime.now(UTC))
        assert (await states(other))[1] == ("pending", 1, "ConnectError")


async def test_a_name_is_looked_up_once_so_that_a_second_answer_cannot_lead_elsewhere(
    resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    async def answer(host: object, port: int, **_: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async with listening() as (port, heads):
        rebound = with_endpoints(resources, tmp_path, endpoint("rebound", f"http://hooks.example.com:{port}/"))
        await tell(rebound, "cus_1")
        # The system's resolver is outside of this process.
        with monkeypatch.context() as patched:
            patched.setattr(asyncio.get_running_loop(), "getaddrinfo", answer)
            await deliver_notifications(rebound, datetime.now(UTC))
    assert f"host: hooks.example.com:{port}".encode() in heads[0].lower()
    assert asked == ["hooks.example.com"]


async def test_no_proxy_of_the_environment_is_asked(
    resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening() as (port, heads), listening() as (proxy_port, asked):
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy_port}")
        direct = with_endpoints(resources, tmp_path, endpoint("direct", f"http://127.0.0.1:{port}/"))
        await tell(direct, "cus_1")
        await deliver_notifications(direct, datetime.now(UTC))
    assert (len(heads), len(asked)) == (1, 0)


async def test_a_host_that_is_not_known_is_tried_again(resources: Resources, tmp_path: Path) -> None:
    nowhere = with_endpoints(resources, tmp_path, endpoint("nowhere", "https://no-such-host.invalid/"))
    for _ in range(2):
        await tell(nowhere, "cus_1")
        await deliver_notifications(nowhere, datetime.now(UTC))
        await make_due(nowhere)
    [(state, _, outcome), _] = await states(nowhere)
    assert (state, outcome) == ("pending", "cannot resolve the host: gaierror")


def test_no_public_address_is_private_to_python_either() -> None:
    """The tables of this project and of Python's `ipaddress` were made apart."""
    for address in ("8.8.8.8", "2606:4700:4700::1111"):
        assert ip_address(address).is_global


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"url": "http://product.example.com/"}, "needs allow_private_network"),
        ({"url": "https://user:secret@product.example.com/"}, "url"),
        ({"url": "https:///hooks"}, "names no host"),
        ({"url": "https://product.example.com:99999/"}, "url"),
        ({"secrets": ["whsec_short"]}, "24 to 64"),
        ({"secrets": ["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]}, "whsec_"),
        ({"secrets": []}, "secrets"),
        ({"events": ["access.change"]}, "events"),
        ({"name": "Product"}, "name"),
    ],
)
def test_an_endpoint_that_cannot_be_right_stops_the_start(
    resources: Resources, tmp_path: Path, changed: dict[str, object], complaint: str
) -> None:
    sound = endpoint("product", "https://product.example.com/", allow_private_network=False)
    with_endpoints(resources, tmp_path, sound)
    with pytest.raises(SettingsError, match=complaint):
        with_endpoints(resources, tmp_path, sound | changed)


def test_two_endpoints_of_one_name_stop_the_start(resources: Resources, tmp_path: Path) -> None:
    one = endpoint("product", "https://product.example.com/")
    with pytest.raises(SettingsError, match="same name"):
        with_endpoints(resources, tmp_path, one, one)


def test_the_example_in_the_documentation_is_right(project_root: Path, tmp_path: Path) -> None:
    page = (project_root / "docs" / "notifications.md").read_text()
    example = page.partition("```toml\n")[2].partition("```")[0]
    path = tmp_path / "rules.toml"
    path.write_text(example)
    assert load_rules(path).notifications[0].events == ("access.changed", "usage.parked")
