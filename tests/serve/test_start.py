"""The model card, examples, picture inspection, and the page's files."""

import base64
import io
import re

import httpx
import pytest
from PIL import Image
from running import running

from benchmarks.data_quality.reading import edit_kind
from ip2p.models.bundle import packaged_examples
from ip2p.pictures.images import load_image, to_bytes
from ip2p.pictures.infotext import parse_infotext, read_infotext
from ip2p.serve.faces.start import PHOTOS, STORYBOOK
from ip2p.serve.options import ServeConfig
from ip2p_storybook.edits import GLOBAL_KINDS


@pytest.fixture(scope="module")
def http():
    with (
        running(ServeConfig(max_steps=15, max_count=3, max_pixels=50_000), page=True) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client,
    ):
        yield client


def photo(**options):
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def test_the_card_has_the_models_defaults_and_the_servers_limits(http):
    card = http.get("/v1/card").json()
    assert (card["model"], card["models"], card["native_size"]) == ("fake", ["fake"], 64)
    assert card["defaults"]["text_cfg"] == 7.5 and card["defaults"]["steps"] == 15  # the limit, below 20
    assert 7.5 in card["grid"]["text_cfg"] and 1.5 in card["grid"]["image_cfg"]
    assert card["suggestions"] and not any("…" in each for each in card["suggestions"])
    limits = {"pixels": 50_000, "body_bytes": 64_000_000, "count": 3, "steps": 15, "per_client": 16}
    assert card["limits"] == limits
    answer = http.get("/v1/card", params={"model": "other"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_suggestions_are_global_edits_that_suit_any_picture():
    assert {edit_kind(each) for each in STORYBOOK} == set(GLOBAL_KINDS)
    assert "none" not in {edit_kind(each) for example in packaged_examples() for each in example.instructions}
    for each in (*STORYBOOK, *PHOTOS):
        assert re.match(r"(make it|change the background to|put them|what if it were) ", each), each
    assert len(set(STORYBOOK)) == len(STORYBOOK) and len(set(PHOTOS)) == len(PHOTOS)


def test_examples_are_pictures_with_instructions(http):
    found = http.get("/v1/examples").json()
    assert len(found) == len(packaged_examples()) == 6
    for each in found:
        assert each["instructions"] and each["title"]
        assert load_image(http.get(each["url"]).content).size == (512, 512)
    assert http.get(f"/v1/examples/{len(found)}.png").status_code == 404


def test_inspection_returns_the_size_and_an_upright_preview(http):
    found = http.post("/v1/pictures", files={"image": photo()}, data={"side": "32"}).json()
    assert (found["width"], found["height"], found["format"]) == (64, 96, "jpeg")
    assert (found["infotext"], found["settings"], found["warnings"]) == (None, None, [])
    preview = Image.open(io.BytesIO(base64.b64decode(found["preview"])))
    assert (preview.format, preview.size) == ("WEBP", (21, 32))
    tiff = io.BytesIO()
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tiff, "TIFF")
    found = http.post("/v1/pictures", files={"image": tiff.getvalue()}).json()
    assert found["format"] == "png" and found["warnings"] == []
    preview = Image.open(io.BytesIO(base64.b64decode(found["preview"])))
    assert preview.mode == "RGBA" and preview.getchannel("A").getextrema() == (0, 0)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_edits_settings_and_metadata_survive_conversion_to_every_format(http, tmp_path, format):
    files = {"image": photo()}
    data = {"instruction": "make it snow", "steps": "2", "seed": "5", "text_cfg": "3", "format": "png"}
    edited = http.post("/v1/edits", files=files, data=data, headers={"Accept": "image/png"}).content
    found = http.post("/v1/pictures", files={"image": edited}).json()
    settings = found["settings"]
    assert (settings["instruction"], settings["steps"], settings["seed"]) == ("make it snow", 2, 5)
    assert settings["text_cfg"] == 3
    answer = http.post("/v1/pictures", files={"image": edited}, data={"convert": format})
    path = tmp_path / f"a.{format}"
    path.write_bytes(answer.content)
    assert answer.headers["content-type"] == f"image/{format}"
    assert parse_infotext(read_infotext(path)) == parse_infotext(found["infotext"])
    with Image.open(path) as image:
        assert image.getexif()[0x010F] == "A camera" and image.size == (64, 96)
        image.load()
        assert b"compositeWithTrainedAlgorithmicMedia" in path.read_bytes()


def test_a_picture_that_was_not_edited_gets_no_ai_mark(http):
    answer = http.post("/v1/pictures", files={"image": photo()}, data={"convert": "png"})
    assert b"TrainedAlgorithmicMedia" not in answer.content


def test_inspection_refuses_unusable_pictures_and_options(http):
    def error(**sent):
        answer = http.post("/v1/pictures", **sent)
        assert answer.status_code == 422
        return answer.json()["error"]

    large = to_bytes(Image.new("RGB", (300, 200)))
    found = error(files={"image": large})
    assert found["param"] == "image" and "0.1 megapixels (300x200); the limit is 0.05" in found["message"]
    assert "not a picture" in error(files={"image": b"hello"})["message"]
    assert error(files={"image": photo()}, data={"side": "5"})["param"] == "side"
    assert error(json={"image": "https://example.org/a.png"})["param"] == "image"


def test_the_page_is_static_and_its_security_policy_forbids_inline_code(http):
    page = http.get("/")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|https?://", page.text)
    for name in re.findall(r'(?:href|src)="([\w.]+\.\w+)"', page.text):
        answer = http.get(f"/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert "https://" not in answer.text and ("http://" not in answer.text or name == "icon.svg")
    missing = http.get("/nothing.js")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
