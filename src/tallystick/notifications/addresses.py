"""Which addresses a notification may be sent to.

Whoever can set an endpoint's URL, or a name's DNS record, must not be able to make this service talk to what only it
can reach: itself, its neighbours, a cloud's metadata service (server-side request forgery). So a host is resolved once,
every address found must be a public one, and the connection goes to an address that was checked.
"""

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

# Special-purpose IPv4 addresses (https://www.iana.org/assignments/iana-ipv4-special-registry), multicast, reserved.
NOT_PUBLIC_V4 = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by a provider's customers (CGNAT)
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and with it the metadata services of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)

# All public IPv6 addresses are in here (https://www.iana.org/assignments/ipv6-address-space); loopback, IPv4-mapped,
# unique local, link-local and multicast addresses are not. What is special inside it:
GLOBAL_UNICAST = IPv6Network("2000::/3")
NOT_PUBLIC_V6 = tuple(
    ip_network(network)
    for network in (
        "2001::/23",  # protocol assignments, and Teredo, which wraps an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which wraps an IPv4 address
        "3fff::/20",  # documentation
    )
)
# What a network without IPv4 makes of the IPv4 addresses of others (RFC 6052): the last 32 bits count.
NAT64 = IPv6Network("64:ff9b::/96")


class AddressRefused(Exception):
    """A host has an address that is not public."""


async def resolve(host: str, port: int, *, allow_private_network: bool) -> list[str]:
    """The addresses of a host, the system's preferred first. Raises `AddressRefused` and `OSError`.

    Other ways to write an address (`127.1`, `0x7f000001`) are understood here as the connection would understand them.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    if not allow_private_network:
        for address in addresses:
            # One bad address among good ones is refused as well: it has no business there.
            if not is_public(address):
                raise AddressRefused(address)
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet could reach."""
    match ip_address(address):
        case IPv4Address() as v4:
            return not any(v4 in network for network in NOT_PUBLIC_V4)
        case IPv6Address() as v6 if v6 in NAT64:
            return is_public(str(IPv4Address(int(v6) & 0xFFFFFFFF)))
        case v6:
            return v6 in GLOBAL_UNICAST and not any(v6 in network for network in NOT_PUBLIC_V6)
