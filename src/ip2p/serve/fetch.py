"""Pictures from addresses that a request names, only with `--urls`, and never from inside the network.

What an address means is decided once: the name is looked up, every address that it has must be public, the
connection goes to one of those, and what it is connected to is looked at again. So neither a spelling
(`http://0x7f.1/`), nor a name that answers differently the second time, nor a redirect leads inside.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from ip2p.serve.errors import Refusal

SECONDS = 20.0  # for all of it, redirects included
REDIRECTS = 3
PORTS = (80, 443)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Inner networks that Python calls global: of Azure's own services, of Oracle's (in the block of protocol
# assignments), NAT64 that a network has for itself (it alone knows where the IPv4 address stands), of sites.
INNER = [
    ipaddress.ip_network(network)
    for network in ("168.63.129.16/32", "192.0.0.0/24", "64:ff9b:1::/48", "fec0::/10")
]
SIX_TO_FOUR = ipaddress.ip_network("2002::/16")
HEADERS = [
    ("User-Agent", "ip2p"),
    ("Accept", "image/*"),
    ("Accept-Encoding", "identity"),
    ("Connection", "close"),
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


async def fetch(url: str, *, name: str, most: int) -> bytes:
    """What lies at a public http(s) address, at most `most` bytes. Raises Refusal, which names the field.

    No proxy of the environment is used, and nothing that could be a credential is sent.
    """
    try:
        return await asyncio.wait_for(_follow(url, name, most), SECONDS)
    except asyncio.TimeoutError:
        raise _no(name, f"its address did not answer within {SECONDS:g} seconds") from None


async def _follow(url: str, name: str, most: int) -> bytes:
    for _ in range(REDIRECTS + 1):
        answer = await _get(_target(url, name), name, most)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer.place)
    raise _no(name, f"its address leads on more than {REDIRECTS} times")


@dataclass(frozen=True)
class _Elsewhere:
    place: str


def _target(url: str, name: str) -> SplitResult:
    """The parts of an address that may be asked for. Raises Refusal."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url or len(url) > 2000:
        raise _no(name, "its address is longer than 2000 characters or holds more than plain ASCII")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _no(name, "its address cannot be read") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _no(name, "its address is not http or https")
    if parts.username is not None or parts.password is not None:
        raise _no(name, "its address holds a name or a password")
    if port is not None and port not in PORTS:
        raise _no(name, f"its address has the port {port}; only 80 and 443 are asked")
    return parts


async def _get(target: SplitResult, name: str, most: int) -> bytes | _Elsewhere:
    assert target.hostname is not None
    port = target.port or (443 if target.scheme == "https" else 80)
    peer = await _public_peer(target.hostname, port, name)
    context = ssl.create_default_context() if target.scheme == "https" else None
    try:
        reader, writer = await asyncio.open_connection(
            peer, port, ssl=context, server_hostname=target.hostname if context else None
        )
    except (OSError, ssl.SSLError) as error:
        raise _no(name, f"its address cannot be reached ({type(error).__name__})") from None
    try:
        connected = ipaddress.ip_address(writer.get_extra_info("peername")[0].partition("%")[0])
        if not is_public(connected):
            raise _no(name, "its address is not a public one")
        return await _ask(reader, writer, target, name, most)
    except (OSError, ssl.SSLError, h11.RemoteProtocolError) as error:
        raise _no(name, f"its address did not answer as HTTP does ({type(error).__name__})") from None
    finally:
        writer.close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: SplitResult, name: str, most: int
) -> bytes | _Elsewhere:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=65_536)
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    request = h11.Request(method="GET", target=path, headers=[("Host", target.netloc), *HEADERS])
    writer.write(connection.send(request) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65_536))
        elif isinstance(event, h11.Response):
            headers = {key.decode().lower(): value.decode("latin-1") for key, value in event.headers}
            if event.status_code in (301, 302, 303, 307, 308) and "location" in headers:
                return _Elsewhere(headers["location"])
            if event.status_code != 200:
                raise _no(name, f"its address answered {event.status_code}")
            if int(headers.get("content-length", "0")) > most:
                raise _no(name, f"what lies at its address is larger than {most / 1e6:g} MB", status=413)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > most:
                raise _no(name, f"what lies at its address is larger than {most / 1e6:g} MB", status=413)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise _no(name, "its address broke off")


async def _public_peer(host: str, port: int, name: str) -> str:
    """An address of the name, if all that it has are public: the resolver reads every spelling of one."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _no(name, "the name in its address is not known") from None
    addresses = [str(info[4][0]) for info in found]
    if not addresses or not all(is_public(ipaddress.ip_address(a.partition("%")[0])) for a in addresses):
        raise _no(name, "its address is not a public one")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether it lies in the open network; what stands for an IPv4 address is judged as that."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.teredo
        if isinstance(inner, tuple):  # Teredo goes to a server and a client
            return all(is_public(part) for part in inner)
        if inner is None and address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None and address in SIX_TO_FOUR:
            inner = ipaddress.IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        # ::7f00:1 and its like, from when addresses were to be carried so.
        if int(address) >> 32 == 0:
            return False
    if any(address in network for network in INNER):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _no(name: str, why: str, *, status: int = 422) -> Refusal:
    return Refusal(f"{name} cannot be fetched: {why}. Send the picture itself.", status=status, field=name)
