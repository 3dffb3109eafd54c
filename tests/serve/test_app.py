"""The server's start, health, and shutdown; and the examples in its documentation."""

import contextlib
import io
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest
from fakes import fake_editor
from PIL import Image
from running import running, until

from ip2p.base.errors import InputError
from ip2p.cli.main import main
from ip2p.pictures.images import to_bytes
from ip2p.pictures.infotext import parse_infotext
from ip2p.serve import app as apps
from ip2p.serve import mark
from ip2p.serve.maker import LocalMaker
from ip2p.serve.options import ServeConfig, UiConfig
from ip2p.serve.service import Service
from ip2p.synth import safety

DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
PICTURE = Path(__file__).parents[2] / "examples" / "page-1.png"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EDIT = {"instruction": "x", "steps": "2"}


@pytest.fixture(scope="module")
def png():
    return to_bytes(Image.new("RGB", (64, 64), "red"))


@contextlib.contextmanager
def stoppable_server(tmp_path, seconds, drain=20.0):
    """A server in a thread that handles signals; yields its URL, its service, the server, and its thread."""
    service = Service(LocalMaker({"fake": fake_editor(seconds)}, join=1), store=tmp_path / "results")
    config = ServeConfig(drain_seconds=drain)
    ready = threading.Event()
    with apps._listening("127.0.0.1", 0, tries=1) as listening:
        server = apps._Server(
            apps.server_config(apps.make_app(service, config, page=False)),
            lambda: service.drain(config.drain_seconds),
            ready.set,
        )
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        try:
            assert ready.wait(60)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", service, server, thread
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()


def test_sigterm_lets_running_edits_finish_and_refuses_new_ones(tmp_path, png):
    with stoppable_server(tmp_path, 0.1) as (url, service, server, thread):
        answers = []
        caller = threading.Thread(
            target=lambda: answers.append(
                httpx.post(
                    f"{url}/v1/edits",
                    files={"image": png},
                    data={**EDIT, "steps": "15"},
                    timeout=60,
                    trust_env=False,
                )
            )
        )
        caller.start()
        until(lambda: service.stats().running == 1)
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: service.stats().draining)
        refused = httpx.post(f"{url}/v1/edits", files={"image": png}, data=EDIT, trust_env=False)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 503
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        caller.join(30)
        assert answers[0].status_code == 200 and answers[0].json()["state"] == "done"
        thread.join(20)
        assert not thread.is_alive() and not server._captured_signals


def test_a_second_signal_stops_without_waiting(tmp_path, png):
    with stoppable_server(tmp_path, 0.2, drain=60.0) as (url, service, server, thread):
        body = {**EDIT, "steps": "150", "wait": "false"}
        httpx.post(f"{url}/v1/edits", files={"image": png}, data=body, trust_env=False)
        until(lambda: service.stats().running == 1)
        server.handle_exit(signal.SIGINT, None)
        server.handle_exit(signal.SIGINT, None)
        thread.join(10)
        assert not thread.is_alive()


def test_incomplete_headers_time_out_and_a_used_connection_stays_open(monkeypatch):
    monkeypatch.setattr(apps, "HEADER_SECONDS", 0.3)
    with running() as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
        connection.settimeout(10)
        assert connection.recv(100) == b""
        # A connection that sends requests and then waits stays open.
        with httpx.Client(base_url=server.url, trust_env=False) as other:
            for _ in range(3):
                assert other.get("/healthz").status_code == 200
                time.sleep(0.2)


def test_a_port_in_use_is_refused_unless_further_ports_may_be_tried(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {port}.*Try --port"),
            apps._listening("127.0.0.1", port, tries=1),
        ):
            pass
        with apps._listening("127.0.0.1", port, tries=20) as other:
            assert port < other.getsockname()[1] <= port + 20


def test_the_ui_listens_on_loopback_and_keeps_its_models_and_limits():
    config = UiConfig(model=("storybook", "x=y"), max_pixels=1000).serving()
    assert config.host == "127.0.0.1" and config.max_pixels == 1000
    assert config.models() == {"storybook": "storybook", "x": "y"}


def test_a_public_host_without_a_key_and_a_missing_model_are_refused(here, capsys):
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "IP2P_API_KEY" in capsys.readouterr().err
    assert main(["serve", "--model", "no/such/folder", "--port", "0"]) == 3
    assert "no/such/folder" in capsys.readouterr().err


def test_the_ai_mark_is_xmp_metadata_and_optionally_visible(png):
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert mark.marker(ServeConfig(mark="none")) is None
    tagged = mark.marker(ServeConfig())(picture.copy())
    assert tagged.tobytes() == picture.tobytes() and mark.SOURCE_TYPE.encode() in tagged.info["xmp"]
    original = picture.copy()
    original.info["xmp"] = mark.XMP.replace(mark.SOURCE_TYPE.encode(), b"digitalCapture").replace(
        b"</rdf:RDF>",
        b'<rdf:Description xmlns:dc="urn:dc" dc:title="t"/></rdf:RDF>',
    )
    xmp = mark.tag(original).info["xmp"]
    root = ElementTree.fromstring(xmp)
    sources = [value for part in root.iter() for key, value in part.items() if "DigitalSourceType" in key]
    assert sources == [mark.SOURCE_TYPE] and b'dc:title="t"' in xmp
    visible = mark.marker(ServeConfig(mark="visible"))(picture.copy())
    top = (0, 0, 64, 40)
    assert (
        visible.tobytes() != picture.tobytes() and visible.crop(top).tobytes() == picture.crop(top).tobytes()
    )
    assert mark.SOURCE_TYPE.encode() in visible.info["xmp"]


def test_a_result_that_the_classifier_calls_unsafe_is_not_returned(monkeypatch, png):
    calls = []

    def classifier(model, *, device, batch):
        return lambda pictures: calls.append((model, pictures[0].size)) or [False]

    monkeypatch.setattr(safety, "Classifier", classifier)
    with running(ServeConfig(safety="a/classifier")) as server:
        answer = httpx.post(
            f"{server.url}/v1/edits",
            files={"image": png},
            data={**EDIT, "wait": "true"},
            timeout=60,
            trust_env=False,
        )
        with httpx.stream(
            *("POST", f"{server.url}/v1/edits"),
            files={"image": png},
            data={**EDIT, "stream": "true", "previews": "1"},
            timeout=60,
            trust_env=False,
        ) as streamed:
            assert "event: preview" not in streamed.read().decode()
    assert calls == [("a/classifier", (64, 64))] * 2
    assert answer.status_code == 422 and "safety checker" in answer.json()["error"]["message"]


# --- the documentation ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented():
    with running(ServeConfig()) as server:
        yield server


@pytest.mark.parametrize(("language", "text"), BLOCK.findall(DOCS.read_text()), ids=lambda text: text[:30])
def test_code_blocks_of_the_documentation_run(documented, tmp_path, monkeypatch, language, text):
    shutil.copy(PICTURE, tmp_path / "page.png")
    mask = Image.new("L", Image.open(PICTURE).size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    mask.save(tmp_path / "mask.png")
    clear = Image.new("RGBA", mask.size, (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, mask.width // 2, mask.height))
    clear.save(tmp_path / "clear.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    text = text.replace("http://localhost:7860", documented.url)
    if language == "bash":
        process = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, timeout=120
        )
        assert process.returncode == 0, process.stderr
        assert '"error"' not in process.stdout
    else:
        exec(compile(text, str(DOCS), "exec"), {})
    for path in tmp_path.glob("night*"):
        with Image.open(path) as image:
            assert parse_infotext(image.info["parameters"]).instruction == "make it night"


def test_the_documentation_covers_every_interface():
    text = DOCS.read_text()
    assert [language for language, _ in BLOCK.findall(text)].count("bash") >= 4
    for words in ("/v1/edits", "/v1/images/edits", "/sdapi/v1/img2img", "/metrics", "IP2P_API_KEY"):
        assert words in text
