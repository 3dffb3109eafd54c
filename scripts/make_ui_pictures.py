"""Draw docs/pictures/ui-*.png: the page with the model in the package, in Chromium, at two widths.

    python scripts/make_ui_pictures.py [--chromium PATH]

Needs the extra [serve], `pip install playwright`, and Chromium. Look at the pictures before they go in.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fastapi
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ip2p.editing.editor import Editor
from ip2p.pictures.images import load_image
from ip2p.serve import ui
from ip2p.serve.maker import LocalMaker
from ip2p.serve.service import Service

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
MOST = 300_000  # bytes of a picture
PATIENCE = 300_000  # milliseconds


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of the page over the storybook model."""
    service = Service(LocalMaker({"storybook": Editor.load("storybook", dtype="fp32")}))
    app = fastapi.FastAPI()
    ui.mount(app, ui.build_page(service))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = server.force_exit = True
    service.close()


def visit(browser: Browser, address: str, width: int, *, dark: bool = False) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.locator("#examples button").first.wait_for()
    return page


def edited(page: Page) -> None:
    """Two steps of a chain, and candidates for a third."""
    page.locator("#examples button.thumbnail-item").nth(0).click()
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(1)
    page.locator("#seed input").fill("1")
    for words, chosen in (("make it night", 1), ("make it snow", 0)):
        page.locator("#instruction textarea").fill(words)
        page.locator("#run").click()
        page.locator("#status .said", has_text="Done.").wait_for()
        page.locator("#candidates button.thumbnail-item").nth(chosen).click()
        if words == "make it night":
            page.locator("#go_on").click()
            expect(page.locator("#strip button.thumbnail-item")).to_have_count(2)


def unfold(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def keep(page: Page, name: str, folder: Path) -> None:
    """Save the whole page, in 256 colours where that keeps it small enough."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement?.blur()")
    page.wait_for_timeout(1500)
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    path = folder / name
    shot.save(path, optimize=True)
    if path.stat().st_size > MOST:
        shot.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    assert path.stat().st_size <= MOST, f"{path} has {path.stat().st_size} bytes"
    print(path, load_image(path).size, path.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--folder", type=Path, default=PICTURES)
    given = parser.parse_args()
    expect.set_options(timeout=PATIENCE)
    with served() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        page = visit(browser, address, 1280)
        unfold(page, "More settings")
        edited(page)
        unfold(page, "More settings")
        keep(page, "ui-desktop.png", given.folder)
        page.get_by_role("tab", name="CFG matrix").click()
        page.locator("#draw").click()
        page.locator("#status .said", has_text="Done. Click").wait_for()
        keep(page, "ui-matrix.png", given.folder)
        page.context.close()
        page = visit(browser, address, 390, dark=True)
        unfold(page, "More settings")
        edited(page)
        unfold(page, "More settings")
        keep(page, "ui-phone.png", given.folder)
        browser.close()


if __name__ == "__main__":
    main()
