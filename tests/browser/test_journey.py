"""The page in a real browser: Chromium, as the system has it, driven by Playwright."""

import contextlib
import io
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

# The server's stand-ins lie with the tests of the server.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "serve"))

from page_server import Server, serve_page

from ip2p.pictures.images import load_image, save_image
from ip2p.pictures.infotext import parse_infotext, read_infotext

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STEPS = 4
PATIENCE = 60_000  # milliseconds; a machine of two cores may be busy
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server():
    with serve_page() as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "Chromium is missing; on Debian or Ubuntu: apt-get install chromium"
    with sync_playwright() as playwright:
        # Its own sandbox needs rights that a container seldom gives.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 160x96 that a camera made lying on its side."""
    ramp = Image.linear_gradient("L").resize((96, 160))
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photos") / "holiday.jpg"
    Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp)).save(path, exif=exif)
    return path


def visit(browser: Browser, server: Server, *, width: int = 1280, dark: bool = False) -> Page:
    """The page in a browser of its own, which has no network but this server."""
    context = browser.new_context(
        viewport={"width": width, "height": 1000},
        color_scheme="dark" if dark else "light",
        accept_downloads=True,
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.outside = []

    def only_here(route):
        if route.request.url.startswith(server.address):
            route.continue_()
        else:
            page.outside.append(route.request.url)
            route.abort()

    context.route("**/*", only_here)
    page.goto(server.address)
    expect(page.get_by_label("Instruction", exact=False).first).to_be_visible(timeout=60_000)
    page.wait_for_function("document.querySelector('#announced') !== null")
    return page


@pytest.fixture
def page(browser: Browser, server: Server):
    opened = visit(browser, server)
    yield opened
    assert opened.outside == []
    opened.context.close()


def said(page: Page, words: str | re.Pattern) -> None:
    expect(page.locator("#status .said")).to_contain_text(words)


def unfold(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def quick(page: Page) -> None:
    """Fewer steps, so that the fake model takes no time."""
    unfold(page, "More settings")
    page.get_by_label("number input for Steps").fill(str(STEPS))
    page.get_by_label("Seed", exact=True).fill("11")


def edit(page: Page, words: str) -> None:
    page.locator("#instruction textarea").fill(words)
    page.locator("#instruction textarea").press("Enter")
    said(page, "Done.")


def test_the_whole_journey(page: Page, photo: Path, tmp_path: Path):
    page.locator("#picture input[type=file]").set_input_files(photo)
    said(page, "Say what to change.")
    quick(page)

    # Four candidates, and the first of them beside the picture.
    edit(page, "make it night")
    thumbs = page.locator("#candidates button.thumbnail-item")
    expect(thumbs).to_have_count(4)
    expect(thumbs.nth(0)).to_have_attribute("aria-label", "✓ seed 11")
    expect(page.locator("#compare img")).to_have_count(2)

    # The slider moves, and another candidate takes the right side.
    handle = page.locator("#compare [data-testid=slider]")
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] + 80, before["y"] + before["height"] / 2, steps=4)
    page.mouse.up()
    assert handle.bounding_box()["x"] > before["x"] + 40
    shown = page.locator("#compare img").nth(1).get_attribute("src")
    thumbs.nth(2).click()
    expect(thumbs.nth(2)).to_have_attribute("aria-label", "✓ seed 13")
    expect(page.locator("#compare img").nth(1)).not_to_have_attribute("src", shown)
    expect(page.locator("#facts")).to_contain_text("Seed: 13")

    # The download has the original's format, stands upright, and carries its settings.
    with page.expect_download() as waiting:
        page.locator("#download").click()
    assert waiting.value.suggested_filename == "holiday-edited.jpg"
    night = tmp_path / "night.jpg"
    waiting.value.save_as(night)
    with Image.open(night) as result:
        assert (result.format, result.size) == ("JPEG", (160, 96))
        assert result.getexif()[0x010F] == "A camera"
    assert parse_infotext(read_infotext(night)).instruction == "make it night"

    # Continue from it, then back and forth.
    page.locator("#go_on").click()
    strip = page.locator("#strip button.thumbnail-item")
    expect(strip).to_have_count(2)
    expect(strip.nth(1)).to_have_attribute("aria-label", "▶ 1 · make it night")
    edit(page, "make it snow")
    page.locator("#go_on").click()
    expect(strip).to_have_count(3)
    page.locator("#undo").click()
    expect(strip.nth(1)).to_have_attribute("aria-label", "▶ 1 · make it night")
    page.locator("#redo").click()
    expect(strip.nth(2)).to_have_attribute("aria-label", "▶ 2 · make it snow")

    # A branch from the start, and a step run again.
    strip.nth(0).click()
    said(page, "At step ▶ 0 · start")
    edit(page, "make it rain")
    page.locator("#go_on").click()
    expect(strip.nth(3)).to_have_attribute("aria-label", "▶ 3 · make it rain (from 0)")
    page.locator("#again").click()
    said(page, "Done.")
    expect(page.locator("#instruction textarea")).to_have_value("make it rain")
    expect(strip.nth(0)).to_have_attribute("aria-label", "▶ 0 · start")

    # The settings of a file come back.
    page.get_by_label("Remove Image").click()
    said(page, "Drop a picture")
    page.locator("#picture input[type=file]").set_input_files(night)
    said(page, "carries its settings")
    page.locator("#take").click()
    said(page, "Settings loaded.")
    expect(page.locator("#instruction textarea")).to_have_value("make it night")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("13")


def test_a_pasted_picture_a_template_and_a_surprise(page: Page, server: Server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.address)
    page.evaluate(
        """async () => {
            const canvas = document.createElement("canvas");
            canvas.width = 48; canvas.height = 32;
            const blob = await new Promise((done) => canvas.toBlob(done));
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }"""
    )
    # A click on Gradio's button is lost now and then, on a busy machine: a person clicks again.
    for _ in range(5):
        page.locator("#picture button[aria-label*=lipboard], #picture button[title*=lipboard]").first.click()
        with contextlib.suppress(AssertionError):
            expect(page.locator("#status .said")).to_contain_text("Say what to change.", timeout=12_000)
            break
    said(page, "Say what to change.")
    quick(page)

    # A template comes with its gap selected, so that one types over it.
    page.locator("#templates button", has_text="turn the … into a …").click()
    box = page.locator("#instruction textarea")
    expect(box).to_have_value("turn the … into a …")
    expect(box).to_be_focused()
    page.keyboard.type("cat")
    expect(box).to_have_value("turn the cat into a …")

    # The surprise draws scales and seeds of its own, and edits.
    box.fill("make it glow")
    page.locator("#surprise").click()
    said(page, "Done.")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("-1")
    expect(page.locator("#facts")).to_contain_text("CFG scale")
    expect(page.locator("#candidates button.thumbnail-item")).to_have_count(4)


def test_a_mask_is_painted_or_found(page: Page, photo: Path):
    page.locator("#picture input[type=file]").set_input_files(photo)
    said(page, "Say what to change.")
    quick(page)
    unfold(page, "Where")
    page.get_by_label("where I paint").click()
    canvas = page.locator("#editor canvas").first
    expect(canvas).to_be_visible()
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)  # the canvas has no sign that it took the picture in
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.45 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.55 * box["height"], steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    edit(page, "make it red")
    expect(page.locator("#region_found img")).to_be_visible()
    facts = page.locator("#facts").inner_text()

    # Such a step is run again with the mask that was painted.
    page.locator("#go_on").click()
    expect(page.locator("#region_found")).to_be_hidden()
    page.locator("#again").click()
    expect(page.get_by_label("where a mask file is white")).to_be_checked()
    said(page, "Done.")
    expect(page.locator("#mask img")).to_be_visible()
    expect(page.locator("#region_found img")).to_be_visible()
    expect(page.locator("#facts")).to_have_text(facts)

    page.get_by_label("where the model finds it").click()
    expect(page.locator("#auto_mask")).to_be_visible()
    edit(page, "make it blue")
    expect(page.locator("#region_found img")).to_be_visible()
    expect(page.locator("#facts")).to_contain_text("Auto mask: 0.5")


def test_settings_of_another_model_come_with_their_scales(page: Page, photo: Path, tmp_path: Path):
    made = load_image(photo)
    made.info["parameters"] = (
        "make it night\nSteps: 2, Sampler: Euler a, CFG scale: 3, Image CFG scale: 1.1, Seed: 5, "
        "Size: 96x64, Model: other"
    )
    page.locator("#picture input[type=file]").set_input_files(save_image(made, tmp_path / "made.png"))
    said(page, "carries its settings")
    unfold(page, "More settings")
    page.locator("#take").click()
    said(page, "Settings loaded.")
    expect(page.locator("#model input")).to_have_value("other")
    page.wait_for_timeout(1500)  # for what the change of the model might bring about
    expect(page.get_by_label("Text CFG", exact=True)).to_have_value("3")

    # Picked by hand, a model brings its own.
    page.locator("#model input").click()
    page.get_by_role("option", name="fake").click()
    expect(page.get_by_label("Text CFG", exact=True)).to_have_value("7.5")


def test_a_cell_of_the_matrix_gives_its_settings(page: Page, photo: Path):
    page.locator("#picture input[type=file]").set_input_files(photo)
    said(page, "Say what to change.")
    quick(page)
    page.locator("#instruction textarea").fill("make it night")
    page.get_by_role("tab", name="CFG matrix").click()
    page.locator("#columns textarea, #columns input").fill("3 6")
    page.locator("#rows textarea, #rows input").fill("1.2, 1.8")
    page.locator("#draw").click()
    said(page, "Done. Click a cell")
    cells = page.locator("#cells button.thumbnail-item")
    expect(cells).to_have_count(4)
    expect(cells.nth(3)).to_have_attribute("aria-label", "text 6 · image 1.8")
    cells.nth(3).click()
    said(page, "text CFG 6, image CFG 1.8, seed 11")
    expect(page.get_by_label("Text CFG", exact=True)).to_have_value("6")
    expect(page.get_by_label("Image CFG", exact=True)).to_have_value("1.8")
    with page.expect_download() as waiting:
        page.locator("#sheet").click()
    assert waiting.value.suggested_filename == "holiday-grid.png"


def test_a_batch_becomes_a_zip(page: Page, photo: Path, tmp_path: Path):
    (tmp_path / "words.png").write_text("This is no picture.")
    save_image(Image.new("RGB", (64, 64), "red"), tmp_path / "red.png")
    quick(page)
    page.locator("#instruction textarea").fill("make it night")
    page.get_by_role("tab", name="Batch").click()
    sent = [photo, tmp_path / "red.png", tmp_path / "words.png"]
    page.locator("#files input[type=file]").set_input_files(sent)
    expect(page.locator("#files")).to_contain_text("words")
    page.locator("#edit_all").click()
    said(page, "2 of 3 edited, 1 could not be.")
    expect(page.locator("#errors li")).to_contain_text("words.png")
    with page.expect_download() as waiting:
        page.locator("#zip").click()
    with zipfile.ZipFile(io.BytesIO(Path(waiting.value.path()).read_bytes())) as archive:
        assert sorted(archive.namelist()) == ["errors.txt", "holiday.jpg", "red.png"]


def test_the_keyboard_is_enough(page: Page):
    """Choose an example, edit, stop, compare and continue without a mouse."""

    def reach(selector: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"the Tab key does not reach {selector}")

    reach("#examples button.thumbnail-item")
    page.keyboard.press("Enter")
    said(page, "Say what to change.")
    reach("#count input[type=number]")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#count input[type=number]")).to_have_value("3")

    # Enter in the instruction runs; Escape stops within a step.
    page.locator("#instruction textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("make it night")
    page.keyboard.press("Enter")
    said(page, "Step")
    page.keyboard.press("Escape")
    said(page, re.compile("Stopped|Done"))
    page.keyboard.press("Enter")
    said(page, "Done.")

    reach("#candidates button.thumbnail-item")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#candidates button.thumbnail-item").nth(1)).to_have_attribute(
        "aria-label", re.compile("✓")
    )
    reach("#compare [role=slider]")
    handle = page.locator("#compare [role=slider]")
    before = handle.bounding_box()["x"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert handle.bounding_box()["x"] > before
    reach("#go_on")
    page.keyboard.press("Enter")
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(2)
    reach("#undo")
    page.keyboard.press("Space")
    said(page, "At step ▶ 0")


def test_everything_has_a_name_for_a_screen_reader(page: Page):
    for fold in ("Where", "More settings"):
        unfold(page, fold)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, [role=slider]")]
        .filter((node) => node.getBoundingClientRect().width > 0)
        .filter((node) => ![node.getAttribute("aria-label"), node.title, node.innerText,
          node.labels && node.labels[0] && node.labels[0].innerText].some((name) => name && name.trim()))
        .map((node) => node.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    images = page.locator("img:visible")
    for k in range(images.count()):
        assert images.nth(k).get_attribute("alt") is not None


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_all_without_scrolling_sideways(browser, server, photo, dark):
    page = visit(browser, server, width=390, dark=dark)
    page.locator("#picture input[type=file]").set_input_files(photo)
    said(page, "Say what to change.")
    for fold in ("Where", "More settings"):
        unfold(page, fold)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    ratio = page.evaluate(CONTRAST)
    assert ratio >= 4.5, f"the contrast of the text is {ratio:.1f}"
    page.context.close()


def test_one_browser_sees_nothing_of_another(browser, server, page: Page, photo: Path):
    page.locator("#picture input[type=file]").set_input_files(photo)
    said(page, "Say what to change.")
    other = visit(browser, server)
    expect(other.locator("#picture img")).to_have_count(0)
    expect(other.locator("#strip button.thumbnail-item")).to_have_count(0)
    other.locator("#instruction textarea").fill("make it night")
    other.locator("#run").click()
    said(other, "There is no picture yet")
    other.context.close()


def test_a_browser_that_goes_away_cancels_its_edit(browser, photo):
    with serve_page(seconds_a_call=0.2) as slow:
        page = visit(browser, slow)
        page.locator("#picture input[type=file]").set_input_files(photo)
        said(page, "Say what to change.")
        page.locator("#instruction textarea").fill("make it night")
        page.locator("#run").click()
        said(page, "Step")
        page.context.close()
        for _ in range(200):
            stats = slow.service.stats()
            if stats.cancelled == 1 and stats.running == 0:
                break
            time.sleep(0.1)
        assert (stats.cancelled, stats.running) == (1, 0)


# The least contrast (WCAG 2) of the words that stand beside and above the fields.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
  };
  const words = "#status .said, .info-text, [data-testid=block-info], #title p, button.lg:not(:disabled)";
  const shown = [...document.querySelectorAll(words)]
    .filter((node) => node.getBoundingClientRect().width > 0);
  return Math.min(...shown.map((node) => {
      const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }));
}"""
