"""Malicious requests; after each one the server answers as before."""

import base64
import contextlib
import gc
import http.client
import io
import json
import os
import pickle
import re
import resource
import socket
import struct
import tracemalloc
import zlib
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from running import running, until

from ip2p.cli.main import main
from ip2p.pictures.images import to_bytes
from ip2p.serve import app as apps
from ip2p.serve import wire
from ip2p.serve.options import ServeConfig

MB = 2
FACES = {
    "/v1/edits": {"instruction": "x"},
    "/v1/images/edits": {"prompt": "x"},
    "/sdapi/v1/img2img": {"prompt": "x"},
}
NAMES = [
    *("../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "%00"),
    *("a%00.png", "..\\..\\etc\\passwd", "%2fetc%2fpasswd", "/etc/passwd", "....//....//etc/passwd"),
    *(
        "%c0%ae%c0%ae/etc/passwd",
        "a" * 9000,
        "%0d%0aX-Header:%201",
        "~root/.profile",
        "C:%5cWindows%5cwin.ini",
    ),
]
PLACES = [
    *("/v1/files/", "/v1/edits/", "/v1/models/", "/v1/", "/sdapi/v1/", "/", "/v1/examples/", "/page/"),
    "/docs/",
]


@pytest.fixture(scope="module")
def server():
    with running(ServeConfig(max_mb=MB, max_steps=50, max_count=4), page=True) as started:
        yield started
        answer = ask(
            started, "/v1/edits", files={"image": picture()}, data={"instruction": "x", "steps": "1"}
        )
        assert answer.status_code == 200 and answer.json()["state"] == "done"


@pytest.fixture(autouse=True)
def still_answers(server):
    before = server.service.stats()
    yield
    assert httpx.get(f"{server.url}/healthz", trust_env=False, timeout=5).json() == {"status": "ok"}
    stats = server.service.stats()
    assert (stats.waiting, stats.running, stats.failed) == (0, 0, before.failed)


def ask(server, path, method="POST", **more):
    return httpx.request(method, server.url + path, trust_env=False, timeout=60, **more)


def picture(size=(64, 64)):
    return to_bytes(Image.new("RGB", size, "red"))


def message_of(answer):
    body = answer.json()
    return body["error"]["message"] if isinstance(body["error"], dict) else body["errors"]


def edit_request(path, data, **more):
    """The interface's edit request for a picture's bytes."""
    if path.startswith("/sdapi"):
        return {"json": {**FACES[path], "init_images": [base64.b64encode(data).decode()], **more}}
    return {"files": {"image": ("a.png", data)}, "data": {**FACES[path], **more}}


@pytest.mark.parametrize("place", PLACES)
def test_no_url_path_escapes_its_folder(server, place):
    for name in NAMES:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest("GET", (place + name).replace(" ", "%20"), skip_host=True)
            connection.putheader("Host", "localhost")
            connection.endheaders()
            answer = connection.getresponse()
            body = answer.read()
        assert 400 <= answer.status < 500, (place, name[:40], answer.status)
        assert b"root:" not in body and answer.getheader("X-Header") is None


@pytest.mark.parametrize("name", ["../../evil.png", "..\\evil.png", "/tmp/evil.png", "a\0.png", "a" * 9000])
def test_an_upload_filename_is_never_used_as_a_path(server, name, tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b" / "c"  # so that a path upward ends in tmp_path too
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    before = set(os.listdir("/tmp"))
    body = b"".join(
        [
            b'--B\r\nContent-Disposition: form-data; name="image"; filename="' + name.encode() + b'"\r\n\r\n',
            picture() + b'\r\n--B\r\nContent-Disposition: form-data; name="instruction"\r\n\r\nx\r\n',
            b'--B\r\nContent-Disposition: form-data; name="steps"\r\n\r\n1\r\n--B--\r\n',
        ]
    )
    answer = ask(
        server, "/v1/edits", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"}
    )
    assert answer.status_code in (200, 422)
    assert not any("evil" in name for name in set(os.listdir("/tmp")) - before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *(
            ("/v1/edits", name)
            for name in ("model", "sampler", "schedule", "fit", "format", "response", "size")
        ),
        *(("/v1/images/edits", name) for name in ("model", "response_format", "output_format", "size")),
        *(("/sdapi/v1/img2img", name) for name in ("sampler_name", "scheduler", "script_name")),
    ],
)
def test_no_field_is_used_as_a_path(server, path, field):
    for name in NAMES:
        answer = ask(server, path, **edit_request(path, picture(), **{field: name}))
        assert answer.status_code in (400, 404, 422) and field in message_of(answer)
        assert len(answer.text) < 1000 and "root:" not in answer.text


@pytest.mark.parametrize("path", FACES)
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>', "SVG"),
        (b"<!DOCTYPE html><script>alert(1)</script>", "HTML"),
        (b"\x89PNG\r\n\x1a\n" + b"<script>" * 100, "not a picture|damaged"),
        (b"", "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run", "text|not a picture"),
        (b"push graphic-context\nfill 'url(https://127.0.0.1/a)'\npop", "text|not a picture"),
    ],
    ids=["svg", "html", "png", "empty", "eps", "mvg"],
)
def test_an_upload_that_is_not_a_picture_is_refused(server, path, data, words):
    answer = ask(server, path, **edit_request(path, data))
    assert answer.status_code in (400, 422) and re.search(words, message_of(answer))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"].startswith("application/json")


def huge_png(side=13_300):
    """A 177-megapixel PNG, half a gigabyte of RGB, in about half a megabyte."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, row = zlib.compressobj(9), bytes(1 + 3 * side)
    data = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bomb():
    return huge_png()


@pytest.mark.parametrize("path", FACES)
def test_a_decompression_bomb_is_refused_without_decoding(server, path, bomb):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = ask(server, path, **edit_request(path, bomb))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert answer.status_code in (400, 422) and "13300x13300" in message_of(answer)
    assert "the limit is 16" in message_of(answer) and len(bomb) < 600_000
    assert grown < 60_000_000


@pytest.mark.parametrize("path", FACES)
@pytest.mark.parametrize("size", [(1, 1), (15, 64), (2000, 16)])
def test_a_tiny_or_extremely_narrow_picture_is_refused(server, path, size):
    answer = ask(server, path, **edit_request(path, picture(size)))
    assert answer.status_code in (400, 422)
    assert "at least 16" in message_of(answer) or "at most 8 times" in message_of(answer)


def long_gif(frames=5000):
    data = io.BytesIO()
    Image.new("P", (64, 64)).save(data, "GIF")
    single = data.getvalue()
    start = 13 + 3 * 2 ** ((single[10] & 7) + 1)
    frame = b"\x21\xf9\x04\x00\x01\x00\x00\x00" + single[start:-1]
    return single[:start] + frame * frames + b";"


@pytest.mark.parametrize("path", FACES)
def test_an_animated_gif_is_refused(server, path):
    gif = long_gif()
    with Image.open(io.BytesIO(gif)) as opened:
        assert opened.n_frames == 5000
    answer = ask(server, path, **edit_request(path, gif))
    assert answer.status_code in (400, 422) and "several frames" in message_of(answer)


@pytest.mark.parametrize("path", [*FACES, "/v1/pictures", "/healthz", "/nothing"])
def test_an_endless_body_is_cut_off(server, path):
    kind = "application/json" if "sdapi" in path else "multipart/form-data; boundary=B"
    begin = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    part, sent = b"x" * 65_536, 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
            + f"{len(begin):x}\r\n".encode()
            + begin
            + b"\r\n"
        )
        with contextlib.suppress(OSError):
            while sent < 80_000_000:
                connection.sendall(b"10000\r\n" + part + b"\r\n")
                sent += len(part)
    # Data accepted after the answer or held by the sockets comes on top of the limit.
    assert sent < MB * 1_000_000 + apps.OVER_BYTES + 15_000_000


@pytest.mark.parametrize("path", FACES)
def test_a_body_over_the_limit_is_refused(server, path):
    kind = "application/json" if "sdapi" in path else "multipart/form-data; boundary=B"
    begin = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    answer = ask(
        server,
        path,
        content=iter([begin, *[b"x" * 65_536] * 50]),
        headers={"Content-Type": kind},
    )
    assert answer.status_code == 413 and f"{MB} MB" in message_of(answer)


@pytest.mark.parametrize("path", FACES)
@pytest.mark.parametrize("steps", [10**9, "1e9", -1, 0, "0x10", 10**30, "Infinity", "NaN", None])
def test_an_invalid_number_of_steps_is_refused(server, path, steps):
    body = edit_request(path, picture())
    name = "num_inference_steps" if "images" in path else "steps"
    if steps is None:
        steps = "null,"
    (body.get("json") or body["data"])[name] = steps
    answer = ask(server, path, **body)
    assert answer.status_code in (400, 422) and name in message_of(answer)


@pytest.mark.parametrize("path", [*FACES, "/sdapi/v1/options", "/sdapi/v1/interrupt", "/v1/pictures"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:7860"}, 421),
    ],
)
def test_requests_with_a_foreign_origin_or_host_are_refused(server, path, headers, status):
    body = edit_request(path, picture()) if path in FACES else {"json": {}}
    answer = ask(server, path, headers=headers, **body)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_a_request_with_two_host_headers_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(100).startswith((b"HTTP/1.1 4",))


def test_a_form_with_too_many_parts_or_headers_is_refused(server):
    for content in (
        b"".join(b'--B\r\nContent-Disposition: form-data; name="a%d"\r\n\r\n1\r\n' % k for k in range(5000)),
        b"".join(
            b'--B\r\nContent-Disposition: form-data; name="a"; filename="%d"\r\n\r\n1\r\n' % k
            for k in range(99)
        ),
        b"--B\r\n" + b"A: b\r\n" * 100_000,
    ):
        headers = {"Content-Type": "multipart/form-data; boundary=B"}
        answer = ask(server, "/v1/edits", content=content + b"--B--\r\n", headers=headers)
        assert answer.status_code == 422 and "body" in message_of(answer)


@pytest.mark.parametrize("path", FACES)
@pytest.mark.parametrize("part", [b"[],", b"{},", b"0,", b"["])
def test_json_with_too_many_tokens_is_refused_before_parsing(server, path, part, monkeypatch):
    parsed = []
    monkeypatch.setattr(wire, "json", SimpleNamespace(loads=parsed.append))
    content = b'{"image":[' + part * 200_000
    answer = ask(server, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == (400 if "images" in path else 422) and not parsed
    assert "24,000 brackets, braces and commas" in message_of(answer)


@pytest.mark.parametrize("path", FACES)
def test_an_instruction_of_commas_only_is_accepted(server, path):
    body = edit_request(path, picture())
    name = "instruction" if path == "/v1/edits" else "prompt"
    negative = "negative" if path == "/v1/edits" else "negative_prompt"
    body = {**FACES[path], **(body.get("json") or {"image": base64.b64encode(picture()).decode()})}
    steps = {"num_inference_steps" if "images" in path else "steps": 1}
    assert (
        ask(server, path, json={**body, **steps, name: "," * 2000, negative: "[" * 2000}).status_code == 200
    )


@pytest.mark.parametrize("path", FACES)
@pytest.mark.parametrize(
    "value", ['"\\ud800"', '["a\\udfff"]', '{"\\ud800": 1}', "NaN", "[-Infinity]", "1e999"]
)
def test_values_that_a_json_answer_cannot_contain_are_refused_before_any_work(server, path, value):
    before = server.service.stats().done
    body = edit_request(path, picture()).get("json") or {"image": base64.b64encode(picture()).decode()}
    for field in ("override_settings", "model", "prompt" if "prompt" in FACES[path] else "instruction"):
        content = json.dumps({**FACES[path], **body, field: "HERE"}).replace('"HERE"', value)
        answer = ask(server, path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422) and field in message_of(answer), value
    odd = ask(server, path, content=b'{"\\ud800": 1}', headers={"Content-Type": "application/json"})
    assert odd.status_code in (400, 422) and r"\ud800" in message_of(odd)
    assert server.service.stats().done == before


def test_deeply_nested_override_settings_are_refused(server):
    value = json.loads("[" * 600 + "]" * 600)
    answer = ask(
        server,
        "/sdapi/v1/img2img",
        **edit_request("/sdapi/v1/img2img", picture(), override_settings={"x": value}),
    )
    assert answer.status_code == 422 and "override_settings is nested deeper than 20" in message_of(answer)


def test_deeply_nested_or_invalid_json_is_refused(server):
    for content in (
        b'{"image":' * 100_000,
        b"[" * 500_000,
        b'{"image": "\xff"}',
        b'{"a": 1e999}',
        b"\0",
        b"null",
    ):
        headers = {"Content-Type": "application/json"}
        answer = ask(server, "/v1/edits", content=content, headers=headers)
        assert answer.status_code == 422 and message_of(answer)


INNER = [
    *("http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://127.1/", "http://2130706433/"),
    *(
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://0.0.0.0/",
    ),
    *("http://169.254.169.254/latest/meta-data/", "http://[::ffff:a9fe:a9fe]/", "http://2852039166/"),
    *("http://168.63.129.16/metadata", "http://192.0.0.192/opc/v2/", "http://[fec0::1]/"),
    *("http://[64:ff9b:1:7f00:0:100:808:808]/", "http://[::ffff:192.0.0.192]/"),
    *("http://[64:ff9b::a9fe:a9fe]/", "http://[fd00:ec2::254]/", "file:///etc/passwd", "HTTP://LOCALHOST/"),
]


@pytest.mark.parametrize("url", INNER)
def test_no_url_is_fetched(server, url):
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.05)
        address = url.format(port=canary.getsockname()[1])
        for path, body in (
            ("/v1/edits", {"instruction": "x", "image": address}),
            ("/v1/images/edits", {"prompt": "x", "image": address}),
            ("/sdapi/v1/img2img", {"prompt": "x", "init_images": [address]}),
        ):
            answer = ask(server, path, json=body)
            assert answer.status_code in (400, 422), path
            assert re.search("does not download|base64", message_of(answer))
        with pytest.raises(TimeoutError):
            canary.accept()


class Exploit:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("served", ["{folder}/evil.ckpt", "x={folder}/evil.ckpt"])
def test_a_checkpoint_that_would_run_code_is_not_served(here, capsys, served):
    created = here / "made"
    (here / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Exploit(created)}))
    assert main(["serve", "--port", "0", "--model", served.format(folder=here)]) == 3
    assert "nothing in it was run" in capsys.readouterr().err and not created.exists()


def test_a_checkpoint_that_would_run_code_fails_only_its_own_request(tmp_path):
    from ip2p.editing.editor import Editor

    created = tmp_path / "made"
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Exploit(created)}))
    with running(models={"evil": lambda: Editor.load(tmp_path / "evil.ckpt")}) as server:
        body = {"instruction": "x", "steps": "1"}
        answer = ask(server, "/v1/edits", files={"image": picture()}, data={**body, "model": "evil"})
        assert answer.status_code == 500 and "nothing in it was run" in message_of(answer)
        assert not created.exists()
        assert ask(server, "/v1/edits", files={"image": picture()}, data=body).status_code == 200


def raw_request(server, path, data):
    """The bytes of an edit request with many steps, as a client sends them."""
    body = edit_request(path, data, **{"num_inference_steps" if "images" in path else "steps": "50"})
    with httpx.Client(base_url=server.url, headers={"Host": "localhost"}) as client:
        request = client.build_request("POST", path, **body)
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + request.read()


def test_waiting_requests_hold_no_bodies_and_do_not_block_others():
    """Twelve requests of 0.8 MB or more; the limit for all bodies at once is 8 MB."""
    with running(ServeConfig(max_mb=1, max_steps=50), seconds=0.2, join=1) as slow:
        requests = [raw_request(slow, path, picture() + b"0" * 600_000) for path in FACES]
        with contextlib.ExitStack() as stack:
            stack.callback(tracemalloc.stop)
            for number in range(12):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", slow.port)))
                connection.sendall(requests[number % 3])
                until(lambda n=number: slow.service.stats().waiting + slow.service.stats().running > n)
                if number == 2:  # one-time allocations are done
                    tracemalloc.start()
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 3_000_000
            answer = ask(
                *(slow, "/v1/edits"),
                **edit_request("/v1/edits", picture() + b"0" * 900_000, wait="false"),
            )
            assert answer.status_code == 202


def test_many_unfinished_requests_do_not_block_others(server):
    """Fifty clients send half a request and stay connected."""
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(
                b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc"
            )
        answer = ask(server, "/v1/edits", files={"image": picture()}, data={"instruction": "x", "steps": "1"})
        assert answer.status_code == 200
        assert json.loads(ask(server, "/healthz", "GET").text) == {"status": "ok"}
