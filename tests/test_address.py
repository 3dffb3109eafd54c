"""AVIF and HEIC, pictures at a URL, and folders of mixed files."""

import http.server
import io
import subprocess
import sys
import threading
import time

import numpy as np
import pillow_heif
import pytest
from PIL import Image

import ip2p.pictures.address as address
from ip2p.base.errors import InputError, ModelError
from ip2p.editing import batch
from ip2p.pictures.images import load_image


def gradient():
    return Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def encoded(kind, **options):
    buffer = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(gradient()).save(buffer, quality=95)
    else:
        gradient().save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heif_pictures_open(kind):
    loaded = load_image(encoded(kind))
    assert (loaded.mode, loaded.size) == ("RGB", (64, 48))
    assert np.abs(np.asarray(loaded, int) - np.asarray(gradient(), int)).mean() < 4


def test_heic_without_its_decoder_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"pip install 'ip2p\[heic\]'"):
        load_image(encoded("HEIF"))


# --- URLs -----------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/page.jpg")
            self.end_headers()
        elif path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        elif path in ("/page.jpg", "/cut.png", "/large"):
            data = b"x" * 3000 if path == "/large" else encoded("PNG")  # a PNG regardless of its name
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            if path != "/large":
                self.send_header("Content-Length", str(len(data) + 10 * (path == "/cut.png")))
            self.end_headers()
            self.wfile.write(data)
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("path", ["/page.jpg?size=1", "/moved"])
def test_a_url_opens_and_its_format_is_detected_from_the_content(site, path):
    assert load_image(site + path).tobytes() == gradient().tobytes()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/nothing.png", InputError, "responded with 404"),
        ("/away", InputError, "responded with 302"),
        ("/cut.png", ModelError, "cannot be downloaded"),
    ],
)
def test_a_url_that_yields_no_picture_is_refused(site, path, error, message):
    with pytest.raises(error, match=message) as refused:
        load_image(site + path)
    assert "127.0.0.1" in str(refused.value)


def test_downloads_are_limited_in_size_and_time(site):
    with pytest.raises(InputError, match="larger than 0.001 MB"):
        address.fetch_picture(f"{site}/large", max_bytes=1000)
    started = time.monotonic()
    with pytest.raises(ModelError, match="more than 0.3 s"):
        address.fetch_picture(f"{site}/slow", max_seconds=0.3)
    assert time.monotonic() - started < 2


def test_a_closed_port_and_a_malformed_url_are_reported():
    with pytest.raises(ModelError, match="cannot be downloaded"):
        load_image("http://127.0.0.1:9/page.png")
    for malformed in ("http://127.0.0.1:port/page.png", "http://[::1/page.png", "https:///page.png"):
        with pytest.raises(InputError, match="not a valid address"):
            load_image(malformed)


def test_editing_a_url_writes_the_result_to_the_current_folder(site, tmp_path):
    words = [f"{site}/page.jpg?a=1", "make it night", "--steps", "1", "--seed", "1"]
    process = subprocess.run(
        [sys.executable, "-m", "ip2p", "edit", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    (output,) = tmp_path.iterdir()
    assert output.stem.startswith("page-") and output.suffix == ".jpg"
    with Image.open(output) as image:
        assert image.size == (64, 48)


def test_a_url_among_several_inputs_is_refused(site, tmp_path):
    with pytest.raises(InputError, match="one at a time"):
        batch.find_pictures([f"{site}/page.jpg", "b.png"], tmp_path)


# --- folders --------------------------------------------------------------------------------------


def test_every_file_in_a_folder_that_looks_like_a_picture_is_found(tmp_path):
    """Unreadable files then fail by name; nothing is skipped silently."""
    (tmp_path / "a.avif").write_bytes(encoded("AVIF"))
    (tmp_path / "b.heic").write_bytes(encoded("HEIF"))
    (tmp_path / "c").write_bytes(encoded("PNG"))
    (tmp_path / "d.jfif").write_bytes(encoded("JPEG"))
    (tmp_path / "e.photo").write_bytes(encoded("WEBP"))
    for name in ("f.psd", "g.svg", "h.cr2", "i.jxl"):
        (tmp_path / name).write_bytes(b"unreadable")
    for name in ("notes.txt", "page.json", "script.py", "table.parquet", "plain"):
        (tmp_path / name).write_text("no picture")
    found = [path.name for path, _ in batch.find_pictures([str(tmp_path)], tmp_path / "out")]
    assert found == ["a.avif", "b.heic", "c", "d.jfif", "e.photo", "f.psd", "g.svg", "h.cr2", "i.jxl"]
