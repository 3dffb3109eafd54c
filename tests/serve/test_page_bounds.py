"""What the page bounds, deletes, stops and carries over; over HTTP only where Gradio takes part in it."""

import asyncio
import contextlib
import dataclasses
import os
import zipfile
from pathlib import Path

import gradio as gr
import httpx
import pytest
from fakes import fake_editor
from gradio_client import Client, handle_file
from page_server import serve_page
from PIL import Image
from running import until

from ip2p.base.errors import InputError, ResourceError
from ip2p.pictures.images import load_image, save_image
from ip2p.serve import actions as acts
from ip2p.serve import gate, mark
from ip2p.serve import session as sessions
from ip2p.serve.actions import Actions
from ip2p.serve.maker import LocalMaker
from ip2p.serve.queue import Full
from ip2p.serve.requests import Limits
from ip2p.serve.run import Controls
from ip2p.serve.service import Service
from ip2p.serve.session import Session, cache

NIGHT = Controls(instruction="make it night", count=1, steps=2, seed=7)


@contextlib.contextmanager
def page_of(*, seconds: float = 0.0, session: Session | None = None, **limits: int):
    """Actions over a service of the fake model that marks as `ip2p serve` does, and a browser's session."""
    with (
        Service(
            LocalMaker({"fake": fake_editor(seconds)}, finish=mark.tag), limits=Limits(**limits)
        ) as service,
        contextlib.closing(session or Session()) as own,
    ):
        yield Actions(service), own


async def all_of(news, at=lambda number, values: None) -> dict:
    """The last value of each field; `at` is called with each of the values."""
    told: dict = {}
    number = 0
    async with contextlib.aclosing(news) as values:
        async for some in values:
            number += 1
            at(number, some)
            told |= some
    return told


def edited(actions: Actions, session: Session, controls: Controls = NIGHT, **more) -> dict:
    return asyncio.run(all_of(actions.edit(session, controls, "client"), **more))


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photo(tmp_path: Path, page: Image.Image) -> str:
    return str(save_image(page.resize((96, 64)), tmp_path / "photo.png"))


# --- the mark ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tiff", ".bmp"])
def test_a_download_and_a_program_s_file_keep_the_mark(page, tmp_path, ending):
    photo = save_image(page.resize((96, 64)), tmp_path / f"photo{ending}")
    with page_of() as (actions, session):
        actions.open(session, str(photo))
        told = edited(actions, session)
        [file], _ = asyncio.run(actions.edit_once(str(photo), NIGHT, "client"))
        zipped = asyncio.run(actions.batch_once([str(photo)], NIGHT, "client"))[0][0]
    with zipfile.ZipFile(zipped) as archive:
        [name] = archive.namelist()
        archive.extract(name, tmp_path / "zip")
    for path in (told["download"], file, tmp_path / "zip" / name):
        with Image.open(path) as made:
            assert mark.SOURCE_TYPE.encode() in made.info["xmp"], path
        # BMP holds pixels alone.
        assert Path(path).suffix == (".png" if ending == ".bmp" else ending)


def test_the_matrix_s_sheet_is_marked(photo):
    with page_of() as (actions, session):
        actions.open(session, photo)
        told = asyncio.run(all_of(actions.matrix(session, NIGHT, "client", "3 6", "1.5")))
    with Image.open(told["sheet"]) as made:
        assert mark.SOURCE_TYPE.encode() in made.info["xmp"]


# --- whose results ------------------------------------------------------------------------------------


def test_a_picture_dropped_during_an_edit_gets_no_result_of_the_old_one(photo, page, tmp_path):
    other = str(save_image(page.resize((64, 96)), tmp_path / "other.png"))
    for drop in (lambda: actions.open(session, other), lambda: actions.open(session, None)):
        with page_of() as (actions, session):
            actions.open(session, photo)
            told = edited(actions, session, at=lambda number, values, drop=drop: number == 1 and drop())
            assert "changed meanwhile" in told["status"]
            assert session.candidates == []
            left = files_in(session.folder())
            assert left == {f for s in session.history.steps.values() for f in (s.file, s.shown)}


# --- masks ---------------------------------------------------------------------------------------------


def test_a_masked_step_is_run_again_with_its_own_mask(photo, tmp_path):
    mask = Image.new("L", (96, 64))
    mask.paste(255, (8, 8, 50, 40))
    save_image(mask, tmp_path / "mask.png")
    controls = dataclasses.replace(NIGHT, region="file", mask=str(tmp_path / "mask.png"))
    with page_of() as (actions, session):
        actions.open(session, photo)
        edited(actions, session, controls)
        first = load_image(session.candidate().file)
        actions.go_on(session)
        fields = actions.again(session)
        (tmp_path / "mask.png").unlink()
        assert fields["region"] == "file"
        with Image.open(fields["mask"]) as kept:
            assert kept.convert("L").tobytes() == mask.tobytes()
        taken = {name: fields[name] for name in Controls.__dataclass_fields__ if name in fields}
        told = edited(actions, session, Controls(**taken))
        assert load_image(session.candidate().file).tobytes() == first.tobytes()

        # The settings in the file of such an edit say that they lack it.
        taken = actions.take_from(told["download"])
        assert taken["region"] == "painted" and "mask is not in the file" in taken["status"]


# --- room -----------------------------------------------------------------------------------------------


def test_a_program_is_refused_where_there_is_no_room_before_anything_is_decoded(photo, monkeypatch):
    with page_of(seconds=0.1, per_client=2, queue=2) as (actions, _):
        slow = dataclasses.replace(NIGHT, steps=20)

        async def many():
            asked = [asyncio.create_task(actions.edit_once(photo, slow, "client")) for _ in range(2)]
            while actions.service.stats().waiting + actions.service.stats().running < 2:
                await asyncio.sleep(0.01)
            decoded = []
            monkeypatch.setattr(Session, "open", lambda *_, **__: decoded.append(1))
            for work in (actions.edit_once(photo, slow, "client"), actions.edit_once(photo, slow, "client")):
                with pytest.raises(Full, match="2 of your requests"):
                    await asyncio.wait_for(work, 5)
            assert decoded == []
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

        asyncio.run(many())


def test_a_batch_waits_where_there_is_no_room_and_holds_no_picture(photo, monkeypatch):
    monkeypatch.setattr(acts, "AT_ONCE", 3)
    with page_of(per_client=1) as (actions, session):
        told = asyncio.run(all_of(actions.batch(session, NIGHT, "client", [photo] * 3)))
        assert "3 of 3 edited" in told["status"]
        assert actions.service.stats().rejected["client"] > 0


def test_too_many_batches_at_once_are_refused(photo):
    with page_of() as (actions, session):
        with contextlib.ExitStack() as stack:
            for _ in range(acts.LONG_OF_CLIENT):
                stack.enter_context(actions._turn("client"))
            with pytest.raises(ResourceError, match="4 of your matrices and batches"):
                asyncio.run(all_of(actions.batch(session, NIGHT, "client", [photo])))
            asyncio.run(all_of(actions.batch(session, NIGHT, "another", [photo])))
        asyncio.run(all_of(actions.batch(session, NIGHT, "client", [photo])))
        assert not actions._long


# --- the disk ---------------------------------------------------------------------------------------------


def test_a_session_keeps_the_files_that_the_page_can_come_to_and_no_more(photo):
    four = dataclasses.replace(NIGHT, count=4)
    with page_of() as (actions, session):
        actions.open(session, photo)
        edited(actions, session, four)
        once = len(files_in(session.folder()))
        assert once == 2 + 4 * 2
        for _ in range(2):
            edited(actions, session, four)
        assert len(files_in(session.folder())) == once

        downloads = {str(actions.choose(session, k % 4)["download"]) for k in range(12)}
        assert len(downloads) == 4 and all(map(os.path.exists, downloads))

        for _ in range(3):  # a chain, and a branch of it
            actions.go_on(session)
            edited(actions, session, four)
        actions.undo(session)
        edited(actions, session, four)
        actions.go_on(session)
        assert not any(map(os.path.exists, downloads))
        steps = session.history.steps.values()
        assert len(steps) == 5
        assert files_in(session.folder()) == {file for step in steps for file in (step.file, step.shown)}
        for number in range(5):  # all of it can be gone to
            actions.go(session, number)
            assert session.picture().size == (96, 64)

        actions.open(session, photo)
        assert len(files_in(session.folder())) == 2


def test_what_is_shown_on_the_way_is_deleted_at_the_end(photo):
    with page_of(seconds=0.02) as (actions, session):
        actions.open(session, photo)
        before = files_in(sessions.store())
        seen = []

        def look(number, values):
            seen.extend(path for path, _ in values.get("candidates", []))
            assert all(map(os.path.exists, seen[-4:]))

        edited(actions, session, dataclasses.replace(NIGHT, steps=40), at=look)
        assert any("preview" in path for path in seen)
        session.forget()
        told = asyncio.run(all_of(actions.matrix(session, NIGHT, "client", "3 6", "1.5")))
        Path(told["sheet"]).unlink()
        told = asyncio.run(all_of(actions.batch(session, NIGHT, "client", [photo])))
        Path(told["zip"]).unlink()
        assert files_in(sessions.store()) == before


def test_a_full_session_says_what_to_do_and_loses_nothing(photo, monkeypatch):
    with page_of() as (actions, session):
        actions.open(session, photo)
        edited(actions, session)
        monkeypatch.setattr(sessions, "MOST_BYTES", 100)
        with pytest.raises(ResourceError, match="drop a picture to begin anew"):
            edited(actions, session)
        assert len(session.candidates) == 1 and session.candidate().file.exists()


# --- stopping, and uploads that go ---------------------------------------------------------------------


def test_stop_works_as_soon_as_the_edit_is_said_to_wait(photo):
    with page_of() as (actions, session):
        actions.open(session, photo)
        words = []
        told = edited(
            actions,
            session,
            at=lambda number, values: number == 1 and words.append(actions.stop(session)["status"]),
        )
        assert "Stopping" in words[0]
        assert "Stopped." in told["status"]
        assert session.candidates == [] and actions.service.stats().done == 0
        assert "Nothing is running" in actions.stop(session)["status"]


def test_stop_reaches_a_job_that_is_just_being_handed_in(photo, monkeypatch):
    with page_of(seconds=0.05) as (actions, session):
        actions.open(session, photo)
        submit = actions.service.submit

        def stopped_meanwhile(*args, **options):
            actions.stop(session)
            return submit(*args, **options)

        monkeypatch.setattr(actions.service, "submit", stopped_meanwhile)
        told = edited(actions, session, dataclasses.replace(NIGHT, steps=40))
        assert "Stopped." in told["status"]


def test_a_file_that_is_gone_fails_alone(photo, tmp_path, page):
    paths = [photo, str(tmp_path / "gone.png")]
    with page_of() as (actions, session):
        told = asyncio.run(all_of(actions.batch(session, NIGHT, "client", paths)))
        assert "1 of 2 edited" in told["status"]
        assert told["failed"] == [
            "gone.png: The file is gone: uploads are deleted after 1 hour. Send it again."
        ]
        with zipfile.ZipFile(told["zip"]) as archive:
            assert set(archive.namelist()) == {"photo.png", "errors.txt"}
        with pytest.raises(InputError, match="Send it again"):
            actions.open(session, paths[1])
        actions.open(session, photo)
        masked = dataclasses.replace(NIGHT, region="file", mask=paths[1])
        with pytest.raises(InputError, match="Send it again"):
            edited(actions, session, masked)


def test_uploads_that_age_out_during_a_batch_are_edited_all_the_same(page):
    """Gradio deletes them by age; a batch of many takes longer."""
    uploads = []
    for k in range(6):
        (cache() / f"upload{k}").mkdir()
        uploads.append(save_image(page.resize((64, 64)), cache() / f"upload{k}" / f"{k}.png"))

    def delete(number, values):
        for path in uploads:
            path.unlink(missing_ok=True)

    with page_of() as (actions, session):
        batch = actions.batch(session, NIGHT, "client", list(map(str, uploads)))
        told = asyncio.run(all_of(batch, at=delete))
    assert "6 of 6 edited" in told["status"]


# --- what Gradio lets in ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with serve_page(steps=30, count=4) as running:
        yield running


def config(server) -> dict:
    return httpx.get(f"{server.address}/config").json()


def test_what_gradio_takes_of_a_painting_while_it_is_painted_is_closed(server):
    """It makes room for as many layers as a byte's sender says; the page's editor uploads its layers."""
    there = config(server)
    [editor] = [part["id"] for part in there["components"] if part["type"] == "imageeditor"]
    assert not any(where == editor for event in there["dependencies"] for where, _ in event["targets"])
    sent = {"type": "layer", "index": "7", "id": "mine", "session_hash": "a", "fn_name": "accept_blobs"}
    told = httpx.post(
        f"{server.address}/gradio_api/component_server",
        data={**sent, "component_id": str(editor)},
        files={"file": ("blob", b"x")},
    )
    assert told.status_code == 404


@pytest.mark.parametrize("route", ["queue/join", "call/edit", "run/edit", "api/edit", "cancel"])
def test_a_long_body_of_json_is_not_read(server, route):
    told = httpx.post(f"{server.address}/gradio_api/{route}", content=b"[" + b"[]," * 700_000 + b"[]]")
    assert told.status_code == 413 and "1 MB" in told.text

    def without_length():
        for _ in range(40):
            yield b" " * 50_000

    told = httpx.post(f"{server.address}/gradio_api/{route}", content=without_length())
    assert told.status_code == 413


def test_a_browser_has_no_editor_of_its_own(server):
    """Gradio makes one where an event updates more than its value, and does not delete the files of that."""
    there = config(server)
    kinds = {part["id"]: part["type"] for part in there["components"]}
    [region] = [part["id"] for part in there["components"] if part["props"].get("elem_id") == "region"]
    [shows] = [event for event in there["dependencies"] if [region, "change"] in event["targets"]]
    assert {kinds[output] for output in shows["outputs"]} == {"column"}


def test_the_scales_of_a_model_are_taken_only_when_it_is_picked_by_hand(server):
    """A change by a program comes with scales of its own: those of the settings that are taken over."""
    there = config(server)
    names = {part["props"].get("elem_id"): part["id"] for part in there["components"]}
    events = {
        kind
        for event in there["dependencies"]
        for where, kind in event["targets"]
        if where == names["model"] and names["text_cfg"] in event["outputs"]
    }
    assert events == {"input"}


def test_a_program_is_told_that_there_is_no_room(photo):
    with serve_page(seconds_a_call=0.1, steps=50, per_client=1) as one:
        # On loopback each client is a browser of its own: both requests are of one.
        client = Client(one.address, verbose=False)
        how = {"instruction": "make it night", "steps": 50, "count": 1, "api_name": "/edit"}
        first = client.submit(handle_file(photo), **how)
        until(lambda: one.service.stats().running)
        with pytest.raises(Exception, match="1 of your requests"):
            client.predict(handle_file(photo), **how)
        first.cancel()
        assert one.service.stats().rejected["client"] == 1


@pytest.mark.parametrize(
    ("layers", "words"),
    [([(64, 64)] * 11, "11 parts"), ([(3000, 3000), (3000, 3000)], "limit is 15,000,000")],
)
def test_the_parts_of_a_painting_are_bounded_together(tmp_path, layers, words):
    """Gradio decodes all of them, and holds them at once."""
    paths = [save_image(Image.new("RGB", size), tmp_path / f"{k}.png") for k, size in enumerate(layers)]
    page = gate.Page()
    page.pixels = 5_000_000
    with pytest.raises(gr.Error, match=words):
        page._check_drawing({"layers": [{"path": str(path)} for path in paths]})
