"""One try to tell one endpoint, as Standard Webhooks has it (https://www.standardwebhooks.com)."""

import json
import ssl
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Literal

import httpx
from standardwebhooks import Webhook

from tallystick import __version__
from tallystick.notifications.addresses import AddressRefused, resolve
from tallystick.rules import NotificationEndpoint

# An address that does not let us connect within this may be a route that leads nowhere; the next one may be better.
CONNECT_SECONDS = 3
SEND_SECONDS = 10
ADDRESSES_TRIED = 3

# Of what the receiver answers only the status counts. Reading a short answer to its end keeps the connection open.
ANSWER_BYTES_READ = 4096

LONGEST_RETRY_AFTER = timedelta(hours=10)


@dataclass(frozen=True)
class Outcome:
    """What became of a try: a status code, or what failed. `retry_after`: how long the receiver asks us to wait."""

    state: Literal["delivered", "failed", "gone"]
    reason: str
    retry_after: timedelta = timedelta(0)


@cache
def trust_receivers() -> ssl.SSLContext:
    """The authorities that httpx trusts. Reading them takes 20 ms, so it is done once, not at each delivery."""
    return httpx.create_ssl_context()


@dataclass
class Connections:
    """The open connections to the endpoints, made when they are first needed. Each endpoint has its own pool.

    They are keyed by the checked address, and so by host only as long as no two endpoints share a pool.
    """

    _stack: AsyncExitStack
    _clients: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    async def client(self, endpoint: NotificationEndpoint) -> httpx.AsyncClient:
        """The client for this endpoint. It asks no proxy, which would resolve the name anew, unchecked."""
        if endpoint.name not in self._clients:
            self._clients[endpoint.name] = await self._stack.enter_async_context(
                httpx.AsyncClient(
                    verify=trust_receivers(),
                    trust_env=False,
                    follow_redirects=False,
                    timeout=httpx.Timeout(SEND_SECONDS, connect=CONNECT_SECONDS),
                )
            )
        return self._clients[endpoint.name]


def render(type_: str, created_at: datetime, data: Mapping[str, Any]) -> str:
    """The body. It is the same at every try."""
    timestamp = created_at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"type": type_, "timestamp": timestamp, "data": data}, separators=(",", ":"))


def sign(endpoint: NotificationEndpoint, notification_id: str, at: datetime, body: str) -> dict[str, str]:
    """The three headers of Standard Webhooks. `at` is the time of this try; a signature for each secret."""
    signatures = [Webhook(secret.get_secret_value()).sign(notification_id, at, body) for secret in endpoint.secrets]
    return {
        "webhook-id": notification_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


async def send(
    client: httpx.AsyncClient, endpoint: NotificationEndpoint, headers: dict[str, str], body: str
) -> Outcome:
    """POST once. Any 2xx is delivered; redirects are not followed; the caller limits the time."""
    url = httpx.URL(endpoint.url)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        addresses = await resolve(
            url.raw_host.decode("ascii"), port, allow_private_network=endpoint.allow_private_network
        )
        return await _post(client, url, addresses[:ADDRESSES_TRIED], headers, body)
    except AddressRefused as refused:
        return Outcome("failed", f"address refused: {refused}")
    except httpx.HTTPError as error:
        return Outcome("failed", type(error).__name__)
    except OSError as error:
        return Outcome("failed", f"cannot resolve the host: {type(error).__name__}")


async def _post(
    client: httpx.AsyncClient, url: httpx.URL, addresses: list[str], headers: dict[str, str], body: str
) -> Outcome:
    for address in addresses[:-1]:
        try:
            return await _post_to(client, url, address, headers, body)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
    return await _post_to(client, url, addresses[-1], headers, body)


async def _post_to(
    client: httpx.AsyncClient, url: httpx.URL, address: str, headers: dict[str, str], body: str
) -> Outcome:
    # The address that was checked is the one connected to; the name still is what TLS and the receiver are told.
    async with client.stream(
        "POST",
        url.copy_with(host=address),
        headers={
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": f"tallystick/{__version__}",
            **headers,
        },
        content=body.encode(),
        extensions={"sni_hostname": url.raw_host.decode("ascii")},
    ) as response:
        read = 0
        async for chunk in response.aiter_raw():
            read += len(chunk)
            if read > ANSWER_BYTES_READ:
                break
        return _read_outcome(response)


def _read_outcome(response: httpx.Response) -> Outcome:
    reason = f"status {response.status_code}"
    if response.is_success:
        return Outcome("delivered", reason)
    if response.status_code == 410:
        return Outcome("gone", reason)
    asked = response.headers.get("retry-after", "")
    seconds = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 7 else 0
    return Outcome("failed", reason, min(timedelta(seconds=seconds), LONGEST_RETRY_AFTER))
