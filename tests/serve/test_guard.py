"""The guard: hosts, origins, keys, body limits, and the access log."""

import asyncio
import base64
import json
import socket

import httpx
import pytest

from ip2p.base.errors import InputError
from ip2p.serve import guard
from ip2p.serve.guard import Guard, host_name, same_place
from ip2p.serve.options import ServeConfig

KEYS = ("k" * 20, "j" * 20)


async def echo(scope, receive, send):
    """An application that answers with the caller and the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        size, more = size + len(message["body"]), message.get("more_body", False)
    body = json.dumps({"client": scope["state"]["client"], "size": size}).encode()
    headers = [(b"access-control-allow-origin", b"*"), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def ask(app, method="POST", path="/v1/edits", *, host="localhost:7860", peer="127.0.0.1", **more):
    async def send_request():
        transport = httpx.ASGITransport(app, client=(peer, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7860") as client:
            headers = {"Host": host, **more.pop("headers", {})}
            return await client.request(method, path, headers=headers, **more)

    return asyncio.run(send_request())


@pytest.fixture
def local():
    return Guard(echo, ServeConfig())


@pytest.fixture
def keyed(tmp_path):
    (file := tmp_path / "keys").write_text("# the team's\n" + "\n".join(KEYS) + "\n")
    return Guard(echo, ServeConfig(host="0.0.0.0", api_key_file=file))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:7860", "127.0.0.1:9", "[::1]:7860", "localhost."])
def test_host_names_of_this_machine_are_accepted(local, host):
    assert ask(local, host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "", "localhost,evil"]
)
def test_other_host_names_are_refused(local, host):
    answer = ask(local, "GET", host=host)
    assert answer.status_code == 421 and answer.json()["error"]["param"] == "Host"


def test_additional_host_names_come_from_the_settings():
    app = Guard(echo, ServeConfig(allow_host=("pictures.example.org",)))
    assert ask(app, host="pictures.example.org:443").status_code == 200
    assert ask(app, host="other.example.org").status_code == 421


def test_a_public_server_accepts_ip_addresses_and_its_machines_name():
    app = Guard(echo, ServeConfig(host="0.0.0.0", public=True))
    assert ask(app, host="192.0.2.7:7860").status_code == 200
    assert ask(app, host=socket.gethostname()).status_code == 200
    assert ask(app, host="evil.example").status_code == 421


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost:9999",
        "http://localhost",
        "file://",
        "http://localhost:7860.evil",
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_write_from_a_foreign_origin_is_refused(local, origin, method):
    answer = ask(local, method, headers={"Origin": origin})
    assert answer.status_code == 403 and answer.json()["error"]["param"] == "Origin"
    assert "access-control-allow-origin" not in answer.headers


def test_the_same_origin_and_clients_without_an_origin_may_post(local):
    assert ask(local, headers={"Origin": "http://localhost:7860"}).status_code == 200
    assert ask(local).status_code == 200
    assert ask(local, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_cross_site_sec_fetch_site_header_is_refused_without_an_origin(local):
    assert ask(local, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


@pytest.fixture
def shared(tmp_path):
    (file := tmp_path / "keys").write_text(KEYS[0] + "\n")
    return Guard(echo, ServeConfig(allow_origin=("https://example.org",), api_key_file=file))


def test_an_allowed_origin_may_post_and_read(shared):
    origin = {"Origin": "https://example.org"}
    answer = ask(shared, headers={**origin, "X-API-Key": KEYS[0]})
    assert answer.status_code == 200 and answer.headers["vary"] == "Origin"
    assert answer.headers.get_list("access-control-allow-origin") == ["https://example.org"]
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    refused = ask(shared, headers=origin)  # the page can read why
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://example.org"


def test_a_preflight_from_an_allowed_origin_needs_no_key(shared):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    answer = ask(shared, "OPTIONS", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert {"Authorization", "Content-Type"} <= set(
        answer.headers["access-control-allow-headers"].split(", ")
    )
    assert "access-control-allow-credentials" not in answer.headers
    assert ask(shared, "OPTIONS", host="evil.example", headers=headers).status_code == 421


@pytest.mark.parametrize("origin", ["https://evil.example", "https://example.org.evil", "null", ""])
def test_other_origins_get_no_cors_headers(shared, local, origin):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "X-API-Key": KEYS[0]}
    for method in ("OPTIONS", "GET", "POST"):
        answer = ask(shared, method, headers=headers)
        assert not any(name.startswith("access-control-") for name in answer.headers)
        assert answer.headers["vary"] == "Origin" and (method != "POST" or answer.status_code == 403)
        answer = ask(local, method, headers=headers)
        assert not any(name.startswith("access-control-") for name in answer.headers)
        assert answer.status_code != 204


def test_errors_have_the_form_of_the_interface_that_was_called(local):
    wrong = {"Origin": "null"}
    assert set(ask(local, path="/v1/images/edits", headers=wrong).json()["error"]) == {
        *("message", "type", "param", "code")
    }
    assert "detail" in ask(local, path="/sdapi/v1/img2img", headers=wrong).json()


def test_every_answer_has_nosniff_and_a_content_security_policy(local):
    for path in ("/", "/v1/edits", "/docs"):
        headers = ask(local, "GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "script-src" not in ask(local, "GET", "/v1/edits").headers["content-security-policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEYS[0]}"},
        {"Authorization": f"bearer {KEYS[1]}"},
        {"X-API-Key": KEYS[1]},
        {"Authorization": "Basic " + base64.b64encode(f"any:{KEYS[0]}".encode()).decode()},
    ],
)
def test_a_valid_key_is_accepted(keyed, headers):
    assert ask(keyed, host="192.0.2.1", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": "Basic !!"},
        {"Authorization": "Basic " + base64.b64encode(KEYS[0].encode()).decode()},
        {"X-API-Key": ""},
        {"X-API-Key": "# the team's"},
    ],
)
def test_a_missing_or_wrong_key_is_refused_except_for_the_health_check(keyed, headers):
    answer = ask(keyed, host="192.0.2.1", headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
    assert ask(keyed, "GET", "/healthz", host="192.0.2.1", headers=headers).status_code == 200


def test_callers_are_distinguished_by_key_or_else_by_address(keyed, local):
    def client(app, **more):
        return ask(app, **more).json()["client"]

    one, other = ({"host": "192.0.2.1", "headers": {"X-API-Key": key}} for key in KEYS)
    assert client(keyed, **one) == client(keyed, **one, peer="192.0.2.9") != client(keyed, **other)
    assert client(local, peer="192.0.2.1") != client(local, peer="192.0.2.2")
    assert client(local, peer="2001:db8::1") == client(local, peer="2001:db8::ffff:1")
    assert "192.0.2.1" not in client(local, peer="192.0.2.1")


def test_a_body_over_the_limit_is_refused_with_or_without_a_content_length():
    app = Guard(echo, ServeConfig(max_mb=1))
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 65_536
            yield b"x" * 65_536

    for body in (b"x" * 1_000_001, endless()):
        answer = ask(app, content=body)
        assert answer.status_code == 413 and "1 MB" in answer.json()["error"]["message"]
    assert sent < 1_200_000
    assert ask(app, content=b"x" * 1_000_000).json()["size"] == 1_000_000
    assert app.held == 0


def test_a_stalled_body_times_out(monkeypatch):
    monkeypatch.setattr(guard, "SILENT_SECONDS", 0.05)
    messages = []

    async def silent():
        if not messages:
            messages.append("x")
            return {"type": "http.request", "body": b"x", "more_body": True}
        await asyncio.sleep(60)

    async def send(message):
        messages.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/edits", "client": ("127.0.0.1", 1)},
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(Guard(echo, ServeConfig())(scope, silent, send))
    assert messages[1]["status"] == 408 and b"0.05" in messages[2]["body"]


def test_a_released_body_no_longer_counts():
    held = []

    async def holding(scope, receive, send):
        await receive()
        held.append(app.held)
        scope["state"]["let_go"]()
        held.append(app.held)
        await echo(scope, receive, send)

    app = Guard(holding, ServeConfig(max_mb=1))
    ask(app, content=b"x" * 1000)
    assert held == [1000, 0] and app.held == 0


def test_a_json_body_has_a_token_limit_and_a_form_has_none():
    app = Guard(echo, ServeConfig(max_words=100))
    at_most = b"[" * (guard.STRUCTURE + 200)
    for kind in ("application/json", "", "text/plain"):
        headers = {"Content-Type": kind}
        assert ask(app, content=at_most, headers=headers).status_code == 200
        for path, status in (("/v1/edits", 422), ("/v1/images/edits", 400), ("/sdapi/v1/img2img", 422)):
            answer = ask(app, path=path, content=at_most + b",", headers=headers)
            assert answer.status_code == status and "20,200" in answer.text and app.held == 0
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    assert ask(app, content=at_most + b",", headers=headers).status_code == 200


def test_the_total_size_of_concurrent_uploads_is_limited():
    app = Guard(echo, ServeConfig(max_mb=1))
    app.held = guard.BODIES_AT_ONCE * app.most
    answer = ask(app, content=b"x")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"


def test_web_sockets_are_closed(local):
    messages = []

    async def send(message):
        messages.append(message)

    asyncio.run(local({"type": "websocket", "path": "/"}, None, send))
    assert messages == [{"type": "websocket.close", "code": 1008}]


def test_an_internal_error_is_logged_but_not_shown_to_the_client(caplog):
    async def broken(scope, receive, send):
        raise RuntimeError("/etc/secret")

    answer = ask(Guard(broken, ServeConfig()))
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "/etc/secret" in caplog.text


def test_the_access_log_omits_queries_and_has_no_raw_control_characters(local, caplog):
    caplog.set_level("INFO", logger="ip2p.serve.access")
    ask(local, "GET", "/v1/a%0Ab%1b?secret=1")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ip2p.serve.access"]
    assert "\n" not in line and "\x1b" not in line and "secret" not in line
    assert set(json.loads(line)) == {"time", "method", "path", "status", "ms", "client", "request"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "0.0.0.0"}, "IP2P_API_KEY"),
        ({"host": "192.0.2.1"}, "--public"),
        ({"host": "example.org"}, "--public"),
        ({"port": 70_000}, "65535"),
        ({"model": ("a", "b=a", "b=c")}, "two models are called b"),
        ({"model": ("",)}, "names no model"),
        ({"allow_origin": ("example.org",)}, "https://example.org"),
        ({"allow_origin": ("https://example.org/",)}, "https://example.org"),
        ({"allow_host": ("https://example.org",)}, "pictures.example.org"),
        ({"max_steps": 0}, "max_steps is 0; it must be 1 to 1000"),
        ({"keep_seconds": float("nan")}, "keep_seconds is nan; it must be a number from 1"),
    ],
)
def test_unusable_settings_are_refused(here, change, words):
    with pytest.raises(InputError, match=words):
        ServeConfig(**change).check()


@pytest.mark.parametrize("text", ["short\n", "", "a key with blanks in it\n", "ключ" * 8])
def test_weak_or_malformed_keys_are_refused(tmp_path, text):
    (file := tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match="key"):
        ServeConfig(host="0.0.0.0", api_key_file=file).check()


def test_a_key_from_the_environment_allows_a_public_host_and_is_not_in_the_repr(here, monkeypatch):
    monkeypatch.setenv("IP2P_API_KEY", KEYS[0])
    config = ServeConfig(host="0.0.0.0")
    config.check()
    assert KEYS[0] not in repr(config) and config.api_keys() == (KEYS[0],)


def test_model_names_do_not_reveal_paths():
    names = ServeConfig(
        model=("storybook", "./runs/mine", "/a/b.safetensors", "someone/editor", "x=./y")
    ).models()
    assert names == {
        **{"storybook": "storybook", "mine": "./runs/mine", "b": "/a/b.safetensors"},
        **{"someone/editor": "someone/editor", "x": "./y"},
    }


@pytest.mark.parametrize(
    ("host", "name"),
    [("A.b:80", "a.b"), ("[::1]:80", "::1"), ("::1", "::1"), ("a.", "a"), ("a:b", "a:b"), ("", "")],
)
def test_host_name_parses_a_host_header(host, name):
    assert host_name(host) == name


def test_an_https_origin_matches_the_host_of_a_server_behind_tls():
    assert same_place("https://pictures.example.org", "pictures.example.org")
    assert same_place("https://a:443", "a") and not same_place("https://a:80", "a")
    assert not same_place("https://", "") and not same_place("ftp://a", "a")
