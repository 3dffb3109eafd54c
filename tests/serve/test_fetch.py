"""Addresses lead to public places alone."""

import asyncio
import contextlib
import ipaddress
import socket
import threading

import pytest

from ip2p.serve import fetch as fetching
from ip2p.serve.errors import Refusal
from ip2p.serve.fetch import fetch, is_public

INSIDE = [
    *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
    *(
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "fd00:ec2::254",
    ),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("168.63.129.16", "192.0.0.192", "192.0.0.9", "::ffff:168.63.129.16", "64:ff9b::a83f:8110"),
    *("fec0::1", "feff::1", "64:ff9b:1:7f00:0:100:808:808", "64:ff9b:1::808:808"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:db8::1", "2001:0:7f00:1::", "64:ff9b:1::7f00:1"),
]
SPELLINGS = [
    *("http://127.0.0.1/", "http://localhost/", "http://127.1/", "http://2130706433/", "http://0x7f000001/"),
    *("http://0x7f.1/", "http://0177.0.0.1/", "http://017700000001/", "http://[::1]/", "http://0/"),
    *("http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://169.254.169.254/latest/meta-data/"),
    *("http://2852039166/", "http://0xa9fea9fe/", "http://[::ffff:a9fe:a9fe]/", "http://[64:ff9b::7f00:1]/"),
    *("http://localhost./", "http://127.0.0.1:80/", "https://127.0.0.1/"),
]
ODD = [
    *("file:///etc/passwd", "ftp://example.org/", "gopher://127.0.0.1/", "http:///a", "http://", "https:a"),
    *("http://user:word@example.org/", "http://user@example.org/", "http://example.org:22/", "http://[::1"),
    *("http://a b/", "http://example.org/\r\nX: 1", "http://example.org\\@127.0.0.1/", "http://exämple.org/"),
    "http://example.org/" + "a" * 9000,
]


def got(url, most=1_000_000):
    return asyncio.run(fetch(url, name="image", most=most))


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_is_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8", "168.63.129.17"],
)
def test_an_address_outside_is(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("url", SPELLINGS)
def test_no_spelling_of_an_inner_address_is_asked(url, monkeypatch):
    asked = []
    monkeypatch.setattr(asyncio, "open_connection", lambda *more, **named: asked.append(more))
    with pytest.raises(Refusal, match="image cannot be fetched") as told:
        got(url)
    assert told.value.field == "image" and not asked


@pytest.mark.parametrize("url", ODD)
def test_what_is_no_plain_web_address_is_refused(url):
    with pytest.raises(Refusal, match="image cannot be fetched"):
        got(url)


@contextlib.contextmanager
def answering(*answers):
    """A server on loopback that gives these bytes, one to each connection; and what it was asked."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            for data in answers:
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        asked.append(connection.recv(65_536).decode())
                        for part in data if isinstance(data, list) else [data]:
                            connection.sendall(part)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1], asked


@pytest.fixture
def outside(monkeypatch):
    """Lets names resolve to public addresses, connections to which arrive at a server on loopback."""
    real = asyncio.open_connection
    table, port = {"pictures.example.org": ["93.184.215.14"]}, []

    async def getaddrinfo(self, host, port, **more):
        if host not in table:
            return [(0, 0, 0, "", (host, port))]
        return [(0, 0, 0, "", (address, port)) for address in table[host]]

    async def connect(host, number, **more):
        reader, writer = await real("127.0.0.1", port[0])
        if not ipaddress.ip_address(host).is_loopback:
            seen = writer.get_extra_info
            writer.get_extra_info = lambda name: (host, number) if name == "peername" else seen(name)
        return reader, writer

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    return table, port


URL = "http://pictures.example.org/a.png?b=1"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcd"


def redirect(place):
    return f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_public_picture_is_fetched_without_credentials(outside, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with answering(OK) as (port, asked):
        outside[1].append(port)
        assert got(URL) == b"abcd"
    assert asked[0].startswith("GET /a.png?b=1 HTTP/1.1\r\nHost: pictures.example.org\r\n")
    assert "cookie" not in asked[0].lower() and "authorization" not in asked[0].lower()


def test_a_name_with_one_inner_address_is_not_asked(outside):
    outside[0]["pictures.example.org"].append("127.0.0.1")
    with pytest.raises(Refusal, match="not a public one"):
        got(URL)


def test_what_it_is_connected_to_is_looked_at_again(outside, monkeypatch):
    connect = asyncio.open_connection

    async def elsewhere(host, number, **more):
        return await connect("127.0.0.1", number)

    monkeypatch.setattr(asyncio, "open_connection", elsewhere)
    with answering(OK) as (port, asked):
        outside[1].append(port)
        with pytest.raises(Refusal, match="not a public one"):
            got(URL)
    assert asked in ([], [""])  # nothing was said to it


@pytest.mark.parametrize(
    "place", [*SPELLINGS[:6], "file:///etc/passwd", "//169.254.169.254/", "http://[::1]:22/"]
)
def test_a_redirect_inside_is_not_followed(outside, place):
    resolve = {"localhost": ["127.0.0.1"], "127.1": ["127.0.0.1"], "2130706433": ["127.0.0.1"]}
    outside[0].update(resolve | {"0x7f000001": ["127.0.0.1"], "0x7f.1": ["127.0.0.1"]})
    with answering(redirect(place)) as (port, asked):
        outside[1].append(port)
        with pytest.raises(Refusal, match="not a public one|not http|has the port"):
            got(URL)
    assert len(asked) == 1


def test_redirects_are_followed_three_times(outside):
    with answering(*[redirect("/b")] * 3, OK) as (port, asked):
        outside[1].append(port)
        assert got(URL) == b"abcd" and len(asked) == 4
    outside[1].clear()
    with answering(*[redirect("/b")] * 5) as (port, asked):
        outside[1].append(port)
        with pytest.raises(Refusal, match="more than 3 times"):
            got(URL)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nab", "larger than 1 MB"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 65_536] * 20], "larger than 1 MB"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", "did not answer|broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nab", "did not answer"),
        (b"SSH-2.0-x\r\n", "did not answer|broke off"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: " + b"x" * 100_000, "did not answer"),
    ],
)
def test_an_answer_that_will_not_do_is_told(outside, answer, words):
    with answering(answer) as (port, _):
        outside[1].append(port)
        with pytest.raises(Refusal, match=words):
            got(URL)


def test_a_slow_answer_is_given_up(outside, monkeypatch):
    monkeypatch.setattr(fetching, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        outside[1].append(server.getsockname()[1])
        with pytest.raises(Refusal, match="within 0.2 seconds"):
            got(URL)
