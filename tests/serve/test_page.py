"""The page without a browser: its history, its fields, and its named endpoints over HTTP."""

import io
import json
import zipfile
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from page_server import Server, serve_page
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.editing import advice
from ip2p.pictures.images import load_image, save_image
from ip2p.pictures.infotext import parse_infotext, read_infotext
from ip2p.serve.actions import kept_names, read_numbers
from ip2p.serve.history import History
from ip2p.serve.run import Controls, from_settings, painted_mask, read_size, surprise

QUICK = {"steps": 2, "count": 1, "seed": 7}


# --- the history -----------------------------------------------------------------------------------


def grown(*titles: str) -> History:
    history = History()
    history.start(Path("start.png"), Path("start.webp"), "start")
    for title in titles:
        history.add(Path(f"{title}.png"), Path(f"{title}.webp"), title)
    return history


def test_undo_and_redo_walk_the_chain():
    history = grown("night", "snow")
    assert not history.can_redo
    assert history.undo().title == "night"
    assert history.undo().title == "start"
    assert not history.can_undo
    assert history.undo().title == "start"
    assert history.redo().title == "night"
    assert history.redo().title == "snow"
    assert history.redo().title == "snow"


def test_an_edit_of_an_earlier_step_is_a_branch_and_loses_nothing():
    history = grown("night", "snow")
    history.go(1)
    rain = history.add(Path("rain.png"), Path("rain.webp"), "rain")
    assert rain.parent == 1
    assert {step.title for step in history.steps.values()} == {"start", "night", "snow", "rain"}
    assert "(from 1)" in history.label(rain)
    history.undo()
    assert history.redo().title == "rain"  # where it was last, not where it was first
    history.go(2)
    assert history.undo().title == "night"
    assert history.redo().title == "snow"


def test_a_long_history_drops_its_oldest_steps_and_stays_one_tree():
    history = grown(*(f"step {k}" for k in range(1, 10)))
    gone = history.prune(kept=5)
    assert [step.title for step in gone] == [f"step {k}" for k in range(1, 6)]
    assert len(history.steps) == 5
    titles = [history.current.title]
    while history.can_undo:
        titles.append(history.undo().title)
    assert titles == ["step 9", "step 8", "step 7", "step 6", "start"]
    assert history.redo().title == "step 6"
    with pytest.raises(InputError, match="not kept"):
        history.go(2)


def test_a_history_without_a_picture_says_what_to_do():
    with pytest.raises(InputError, match="Drop one"):
        _ = History().current


# --- the fields -------------------------------------------------------------------------------------


def test_a_random_seed_gives_candidates_that_count_up(page):
    seeds = Controls(instruction="make it night", seed=-1, count=4).request(page).seeds
    assert list(seeds) == list(range(seeds[0], seeds[0] + 4))
    assert Controls(instruction="make it night", seed=5, count=2).request(page).seeds == (5, 6)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"instruction": "  "}, "instruction"),
        ({"count": 10**9}, "Candidates"),
        ({"count": 1.5}, "Candidates"),
        ({"size": "wide"}, "Size"),
        ({"region": "painted"}, "painted"),
        ({"region": "file"}, "mask file"),
        ({"seed": 2**63}, "Seed"),
    ],
)
def test_a_field_that_cannot_be_read_is_named(page, fields, named):
    with pytest.raises(InputError, match=named):
        Controls(**{"instruction": "make it night"} | fields).request(page)


def test_what_was_painted_becomes_a_mask_of_the_picture_s_size():
    layer = Image.new("RGBA", (32, 16))
    layer.paste((255, 0, 0, 200), (8, 4, 16, 8))
    mask = painted_mask({"layers": [layer]}, (64, 32))
    assert mask is not None and mask.size == (64, 32) and mask.mode == "L"
    assert mask.getpixel((24, 12)) == 255 and mask.getpixel((2, 2)) == 0
    assert mask.getextrema() == (0, 255) and sum(mask.histogram()[1:255]) == 0
    assert painted_mask({"layers": [Image.new("RGBA", (32, 16))]}, (64, 32)) is None
    assert painted_mask(None, (64, 32)) is None


def test_sizes_are_read_as_the_command_line_reads_them():
    assert (read_size(""), read_size("256"), read_size("576x384")) == (None, 256, (576, 384))


def test_surprises_lie_in_the_released_app_s_ranges():
    drawn = [surprise((7.5, 1.5)) for _ in range(200)]
    assert all(6 <= text <= 9 and 1.2 <= image <= 1.8 for text, image in drawn)
    assert len(set(drawn)) > 50


def test_numbers_of_the_matrix_are_checked():
    assert read_numbers("Text CFG", "5, 7.5 10") == [5, 7.5, 10]
    for bad in ("", "five", "-1", "nan", "1e9"):
        with pytest.raises(InputError, match="Text CFG"):
            read_numbers("Text CFG", bad)


def test_names_are_kept_and_never_taken_twice():
    names = ["a.jpg", "A.JPG", "b.gif", "a.jpg", "c"]
    assert kept_names(names) == ["a.jpg", "A-2.JPG", "b.png", "a-3.jpg", "c.png"]


def test_every_template_of_the_advice_is_offered_with_its_example():
    templates = dict(advice.templates())
    assert templates["make it …"] == "make it night"
    assert len(templates) == 9


# --- over HTTP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with serve_page(steps=30, count=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server):
    return Client(server.address, verbose=False)


@pytest.fixture
def photo(tmp_path: Path, page: Image.Image) -> Path:
    """A JPEG with EXIF of its own, lying on its side."""
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    exif[0x0112] = 6
    page.resize((96, 64)).save(tmp_path / "a photo.jpg", exif=exif, quality=95)
    return tmp_path / "a photo.jpg"


def test_a_program_edits_and_gets_files_with_their_settings(client, photo):
    files, settings = client.predict(
        handle_file(photo), instruction="make it night", api_name="/edit", **QUICK | {"count": 2}
    )
    assert [made["seed"] for made in settings] == [7, 8]
    for file, made in zip(files, settings, strict=True):
        assert Path(file).name == "a photo-edited.jpg"
        with Image.open(file) as result:
            assert result.format == "JPEG"
            assert result.size == (64, 96)  # upright
            assert result.getexif()[0x010F] == "A camera"
        text = parse_infotext(read_infotext(file))
        assert (text.instruction, text.seed, text.steps) == ("make it night", made["seed"], 2)


def test_settings_make_the_round_trip_through_a_file(client, photo):
    [file], [made] = client.predict(
        handle_file(photo),
        instruction="make it snow, now",
        negative="blur",
        text_cfg=4.5,
        image_cfg=1.25,
        sampler="dpmpp_2m",
        spacing="karras",
        api_name="/edit",
        **QUICK,
    )
    read = client.predict(handle_file(file), api_name="/settings")
    assert read == made
    fields = from_settings(parse_infotext(read_infotext(file)), ["fake"])
    assert fields["instruction"] == "make it snow, now" and fields["model"] == "fake"
    assert (fields["text_cfg"], fields["image_cfg"], fields["seed"]) == (4.5, 1.25, 7)
    again = Controls(**fields).request(load_image(photo)).settings
    assert (again.sampler, again.schedule, again.negative, again.steps) == ("dpmpp_2m", "karras", "blur", 2)


def test_a_batch_keeps_the_names_and_lists_what_is_broken(client, page, photo, tmp_path):
    save_image(page, tmp_path / "page.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    (tmp_path / "words.jpg").write_text("This is no picture.")
    sent = [handle_file(tmp_path / name) for name in ("page.png", "broken.png", "a photo.jpg", "words.jpg")]
    [zipped], failed = client.predict(sent, instruction="make it night", api_name="/batch", **QUICK)
    assert len(failed) == 2
    assert failed[0].startswith("broken.png:") and failed[1].startswith("words.jpg:")
    assert not any("/" in line.replace("PNG, JPEG", "") for line in failed)  # no path of the server
    with zipfile.ZipFile(zipped) as archive:
        assert sorted(archive.namelist()) == ["a photo.jpg", "errors.txt", "page.png"]
        for name, kind in (("a photo.jpg", "JPEG"), ("page.png", "PNG")):
            with Image.open(io.BytesIO(archive.read(name))) as result:
                assert result.format == kind


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"instruction": ""}, "instruction"),
        ({"steps": 10**9}, "1000000000"),
        ({"text_cfg": -1}, "-1"),
        ({"size": "7x7"}, "Size"),
        ({"sampler": "../../etc/passwd"}, "passwd"),
        ({"model": "/etc"}, "/etc"),
    ],
)
def test_an_error_names_the_field_to_a_program(client, photo, sent, named):
    fields = QUICK | {"instruction": "make it night"} | sent
    with pytest.raises(Exception, match=named):
        client.predict(handle_file(photo), api_name="/edit", **fields)


def test_the_models_have_names(client):
    assert client.predict(api_name="/models") == ["fake", "other"]


def test_only_the_named_endpoints_are_shown(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {
        *("/edit", "/batch", "/settings", "/models"),
    }


# --- nothing else comes in or out ---------------------------------------------------------------------


def endpoint(server: Server, name: str) -> dict:
    config = httpx.get(f"{server.address}/config").json()
    return next(entry for entry in config["dependencies"] if entry["api_name"] == name)


def asked(server: Server, file: dict) -> str:
    """What the page's server answers when told to read the settings of `file`."""
    joined = httpx.post(
        f"{server.address}/gradio_api/queue/join",
        json={"data": [file], "fn_index": endpoint(server, "settings")["id"], "session_hash": "attack"},
    )
    if joined.status_code != 200:
        return joined.text
    answers = []
    address = f"{server.address}/gradio_api/queue/data?session_hash=attack"
    with httpx.stream("GET", address, timeout=30) as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                answers.append(line)
                break
    return answers[0]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "http://127.0.0.1:1/picture.png",
        "https://example.org/picture.png",
        "file:///etc/passwd",
        "\0",
        "a" * 9000,
    ],
)
def test_a_file_that_was_not_uploaded_is_refused(server, path):
    answer = asked(server, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert '"success":true' not in answer.replace(" ", "")
    assert "root:" not in answer


def test_a_secret_beside_the_cache_is_refused(server, tmp_path, page):
    secret = save_image(page, tmp_path / "secret.png")
    answer = asked(server, {"path": str(secret), "meta": {"_type": "gradio.FileData"}})
    assert json.loads(answer.removeprefix("data: "))["success"] is False
    assert httpx.get(f"{server.address}/gradio_api/file={secret}").status_code in (403, 404)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "gradio_api/file=/etc/passwd",
            "gradio_api/file=../../etc/passwd",
            "gradio_api/file=..%2f..%2fetc/passwd",
        ),
        *("gradio_api/file=http://127.0.0.1:1/", "gradio_api/proxy=http://127.0.0.1:1/", "gradio_api/runs"),
        *("gradio_api/deep_link", "gradio_api/vibe-code/", "monitoring", "gradio_api/run-history/buckets"),
        *("static/..%2f..%2f..%2fetc/passwd", "assets/../../../etc/passwd", "gradio_api/dev/reload", "login"),
    ],
)
def test_what_the_page_does_not_need_is_closed(server, path):
    answer = httpx.get(f"{server.address}/{path}", follow_redirects=False)
    assert answer.status_code in (400, 403, 404), answer.status_code
    assert "root:" not in answer.text


def test_the_page_names_no_other_host(server):
    text = httpx.get(server.address).text
    for address in ("fonts.googleapis", "cdnjs", "cdn.jsdelivr", "unpkg"):
        assert address not in text
    config = httpx.get(f"{server.address}/config").json()
    assert config["analytics_enabled"] is False
