"""Draw docs/pictures/ui-*.webp: the page with the model in the package, in Chromium, at three widths.

    python scripts/make_ui_pictures.py [WIDTH ...]

Needs Chromium on the PATH and the `dev` extra.
"""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ip2p.models.bundle import packaged_examples

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
SIZES = {1280: 800, 1920: 1080, 390: 844}
PATIENCE = 600_000  # milliseconds; a busy machine is slow


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "Chromium is missing; on Debian or Ubuntu: apt-get install chromium"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from ip2p.cli.main import main; main(['ui', '--no-browser', '--port', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for width in [int(word) for word in sys.argv[1:]] or SIZES:
                height = SIZES[width]
                context = browser.new_context(
                    viewport={"width": width, "height": height},
                    has_touch=width < 600,
                    color_scheme="dark" if width == 1920 else "light",
                )
                page = context.new_page()
                page.set_default_timeout(PATIENCE)
                page.goto(f"http://127.0.0.1:{port}")
                page.wait_for_selector("body[data-ready]")
                draw(page, lambda name, page=page, width=width: keep(page, f"ui-{name}-{width}.webp"))
                context.close()
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def draw(page: Page, keep: Callable[[str], None]) -> None:
    """Every state of the page, one after the other."""
    until(page, "[...document.querySelectorAll('#examples img')].every((one) => one.complete)")
    keep("start")
    page.click("#examples li:nth-child(1) button")
    page.wait_for_selector("#stage:not([hidden])")
    set_value(page, "seed", 3)
    page.fill("#instruction", "make it night")
    page.press("#instruction", "Enter")
    until(page, "Number(document.querySelector('#progress').value) > 0.5")
    keep("working")
    done(page)
    keep("done")
    # Two steps further, and a branch.
    page.click("#use")
    set_value(page, "count", 1)
    page.fill("#instruction", "make it snow")
    page.press("#instruction", "Enter")
    done(page)
    page.click("#use")
    page.evaluate("document.querySelector('#undo').click()")
    page.evaluate("document.querySelector('#undo').click()")
    set_value(page, "count", 4)
    page.wait_for_selector("#steps li:first-child [aria-current]", state="attached")
    page.click("#mask")
    stroke(page)
    keep("mask")
    page.click("#mask-clear")
    page.click("#mask-done")
    page.click("#tab-explore")
    page.fill("#instruction", "make it sunset")
    page.fill("#columns", "1.5 3 5")
    page.fill("#rows", "1 1.25 1.5")
    page.click("#run")
    until(page, "document.querySelectorAll('#grid img').length === 9")
    page.wait_for_selector("body:not([data-running])")
    keep("explore")
    page.click("#tab-batch")
    page.set_input_files("#batch-files", batch_files())
    page.fill("#instruction", "make it snow")
    page.click("#run")
    until(page, "document.querySelectorAll('#files .done').length >= 2")
    until(page, "document.querySelectorAll('#files .failed').length === 1")
    keep("batch")


def set_value(page: Page, name: str, value: int) -> None:
    page.evaluate(
        """([name, value]) => {
            const field = document.querySelector(`#set-${name}`);
            field.value = value;
            field.dispatchEvent(new Event('input'));
        }""",
        [name, value],
    )


def until(page: Page, expression: str) -> None:
    """Wait until an expression is true; Playwright's own wait needs eval, which the page forbids."""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"it did not come true: {expression}"
        page.wait_for_timeout(100)


def done(page: Page) -> None:
    page.wait_for_selector("#use:not([disabled])")
    page.wait_for_selector("body:not([data-running])")


def stroke(page: Page) -> None:
    """Paint over the middle of the picture."""
    box = page.locator("#sheet").bounding_box()
    assert box is not None
    points = [(0.36, 0.45), (0.62, 0.45), (0.62, 0.6), (0.36, 0.6), (0.36, 0.75), (0.62, 0.75), (0.62, 0.88)]
    for k, (x, y) in enumerate([*points, (0.36, 0.88)]):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if not k:
            page.mouse.down()
    page.mouse.up()


def batch_files() -> list[dict[str, object]]:
    """Pages in the formats of cameras and scanners, and a file that is no picture."""
    files: list[dict[str, object]] = []
    for number, (name, kind) in enumerate(
        {"robot.png": "PNG", "wizard.jpg": "JPEG", "meadow.webp": "WEBP", "city.jpg": "JPEG"}.items()
    ):
        file = io.BytesIO()
        Image.open(packaged_examples()[number].file).convert("RGB").save(file, kind)
        files.append({"name": name, "mimeType": f"image/{kind.lower()}", "buffer": file.getvalue()})
    files.insert(2, {"name": "notes.png", "mimeType": "image/png", "buffer": b"not a picture"})
    return files


def keep(page: Page, name: str) -> None:
    page.wait_for_timeout(400)
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        shot.convert("RGB").save(PICTURES / name, "WEBP", quality=72, method=6)
    print(name, (PICTURES / name).stat().st_size)


def wait_for(address: str) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{address} did not answer")


if __name__ == "__main__":
    main()
