import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import random
import threading
import time
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import events_of, fake_editor
from PIL import Image

from ip2p.base.errors import InputError, Ip2pError, ModelError, ResourceError
from ip2p.editing.editor import Editor
from ip2p.models.bundle import Card
from ip2p.pictures.infotext import EditRecord, format_infotext, parse_infotext
from ip2p.serve import maker as makers
from ip2p.serve.engine import JoinedEditor
from ip2p.serve.jobs import Stopped
from ip2p.serve.maker import LocalMaker
from ip2p.serve.queue import Draining, Full
from ip2p.serve.requests import EditRequest, Limits, limited_settings
from ip2p.serve.service import Service
from ip2p.settings import EditSettings, ModelSettings, SettingError


def settings_of(result):
    return parse_infotext(result.parameters)


PICTURE = Image.effect_noise((64, 64), 60).convert("RGB")


def request(kind=EditSettings, **changes):
    fields = {name: changes.pop(name) for name in ("image", "seeds", "model", "previews") if name in changes}
    settings = kind.read({"instruction": "make it night", "steps": 3} | changes)
    return EditRequest(**{"image": PICTURE, "settings": settings} | fields)


def service_of(editors, *, join=4, **how):
    maker_names = ("loaded", "check", "finish", "tiny_vae")
    maker_options = {name: how.pop(name) for name in maker_names if name in how}
    return Service(LocalMaker(editors, join=join, **maker_options), **how)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def editor():
    return fake_editor(0.0)


@pytest.fixture
def serve(editor):
    """Creates services with the fake editor and closes them at the end."""
    unet = editor.bundle.unet
    unet.before, unet.seconds = lambda sample: None, 0.0
    unet.rows.clear()
    with contextlib.ExitStack() as stack:
        yield lambda editors=None, **how: stack.enter_context(
            service_of({"fake": editor} if editors is None else editors, **how)
        )


# --- results ---------------------------------------------------------------------------------------


def test_a_job_matches_the_editor(serve, editor):
    service = serve()
    edit_request = request(
        seeds=(5, 6, 7), negative="grey", text_cfg=3.0, sampler="dpmpp_2m", schedule="karras"
    )
    job = service.submit(edit_request, client="a")
    assert job.wait(60) and job.state == "done"
    alone = editor.edit(
        PICTURE,
        "make it night",
        seeds=[5, 6, 7],
        negative="grey",
        text_cfg=3.0,
        sampler="dpmpp_2m",
        schedule="karras",
        steps=3,
    )
    assert [result.seed for result in job.results] == [5, 6, 7]
    for result, other in zip(job.results, alone, strict=True):
        assert abs(np.asarray(result.image).astype(int) - np.asarray(other)).max() <= 1
        assert result.image.info["parameters"] == other.info["parameters"]
        assert settings_of(result) == parse_infotext(other.info["parameters"])
    assert (job.step, job.steps, job.seconds_left, job.position) == (9, 9, 0.0, 0)


def test_pixels_outside_a_drawn_mask_are_unchanged_and_the_settings_name_the_mask(serve):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.filename = "sky.png"
    job = serve().submit(request(mask=mask), client="a")
    assert job.wait(60)
    [result] = job.results
    assert (np.asarray(result.image)[:, 32:] == np.asarray(PICTURE)[:, 32:]).all()
    assert settings_of(result).mask == "sky.png" and result.mask is None


def test_the_automatic_mask_of_each_result_is_returned(serve):
    job = serve().submit(request(auto_mask=0.3, seeds=(1, 2)), client="a")
    assert job.wait(60)
    assert [(result.mask.mode, result.mask.size) for result in job.results] == [("L", (64, 64))] * 2


def test_the_models_revision_and_lora_are_in_the_settings(serve, editor):
    origin = ModelSettings(revision="v2", lora=("style.safetensors:0.8",))
    service = serve({"fake": Editor(editor.bundle, origin=origin)})
    job = service.submit(request(), client="a")
    assert job.wait(60)
    settings = parse_infotext(job.results[0].image.info["parameters"])
    assert (settings.revision, settings.lora) == ("v2", ("style.safetensors:0.8",))


def test_there_are_no_previews_when_results_are_checked(serve, editor):
    editor.bundle.unet.seconds = 0.03

    def check(picture):
        if check.refuses:
            raise InputError("no such picture is given out")

    check.refuses = False
    service = serve(check=check)

    def run_job():
        job = service.submit(request(steps=8, previews=1), client="a")
        events = events_of(job)
        return job, [event for event in events if event.kind == "preview"]

    job, previews = run_job()
    # Except the small one of the finished result, which was checked.
    assert job.state == "done" and len(previews) <= 1 and job.results
    check.refuses = True
    job, previews = run_job()
    assert job.state == "failed" and not previews and job.previews == [None]


def test_the_tiny_vae_decodes_only_previews_and_matches_diffusers(serve, editor, tmp_path, monkeypatch):
    from diffusers import AutoencoderTiny

    blocks = editor.bundle.latent_factor.bit_length()
    widths = {f"{side}coder_block_out_channels": (8,) * blocks for side in ("en", "de")}
    counts = {f"num_{side}coder_blocks": (1,) * blocks for side in ("en", "de")}
    channels = editor.bundle.vae.config.latent_channels
    AutoencoderTiny(latent_channels=channels, **widths, **counts).save_pretrained(tmp_path / "taesd")
    oracle = AutoencoderTiny.from_pretrained(tmp_path / "taesd")
    decoded, previewed = [], []
    plain, tiny = JoinedEditor.decode, JoinedEditor.decode_preview
    monkeypatch.setattr(JoinedEditor, "decode", lambda self, x: decoded.append(x) or plain(self, x))

    def preview(self, x):
        previewed.append((x, tiny(self, x)))
        return previewed[-1][1]

    monkeypatch.setattr(JoinedEditor, "decode_preview", preview)
    editor.bundle.unet.seconds = 0.03
    service = serve(tiny_vae=tmp_path / "taesd")
    job = service.submit(request(steps=8, previews=1), client="a")
    events = events_of(job)
    assert job.state == "done" and any(event.kind == "preview" for event in events)
    assert len(decoded) == 1 and previewed
    with torch.no_grad():
        torch.testing.assert_close(previewed[0][1], oracle.decode(previewed[0][0]).sample)


def test_previews_of_a_failed_job_are_removed(serve, editor):
    editor.bundle.unet.seconds = 0.03

    def finish(picture):
        raise InputError("no such picture is given out")

    job = serve(finish=finish).submit(request(steps=8, previews=1), client="a")
    kinds = [event.kind for event in events_of(job)]
    assert "preview" in kinds and job.state == "failed" and job.previews == [None]


def test_a_stopped_job_keeps_its_finished_results(serve, editor):
    editor.bundle.unet.seconds = 0.03
    service = serve(join=1)
    job = service.submit(request(seeds=(1, 2, 3, 4), steps=5), client="a")
    until(lambda: len(job.results) == 2)
    service.cancel(job.id)
    assert job.wait(60) and job.state == "cancelled"
    assert [result.seed for result in job.results] in ([1, 2], [1, 2, 3])


def test_the_finish_hook_can_change_or_refuse_a_result(serve):
    def finish(picture):
        if finish.refuses:
            raise InputError("no such picture is given out")
        return Image.new("RGB", picture.size, "white")

    finish.refuses = False
    service = serve(finish=finish)
    job = service.submit(request(), client="a")
    assert job.wait(60) and job.results[0].image.getpixel((0, 0)) == (255, 255, 255)
    assert settings_of(job.results[0]).instruction == "make it night"
    finish.refuses = True
    job = service.submit(request(), client="a")
    assert job.wait(60) and (job.state, job.results) == ("failed", [])
    assert str(job.error) == "no such picture is given out"


# --- events, previews, cancellation ----------------------------------------------------------------


def test_every_listener_receives_the_steps_and_the_end(serve, editor):
    editor.bundle.unet.seconds = 0.02
    service = serve()
    job = service.submit(request(steps=6), client="a")
    received = [[], []]
    threads = [threading.Thread(target=lambda k=k: received[k].extend(events_of(job))) for k in range(2)]
    for thread in threads:
        thread.start()

    async def listen():
        events, _ = await asyncio.gather(collect(), job.until_end())
        await job.until_end()  # again, after the end
        return events

    async def collect():
        return [event async for event in job.events()]

    events = asyncio.run(listen())
    for thread in threads:
        thread.join(60)
    for stream in (*received, events):
        steps = [event.step for event in stream if event.kind == "step"]
        assert steps == sorted(set(steps)) and steps[-1] == 6
        assert stream[-1].kind == "done" and [event.kind for event in stream].count("done") == 1
    assert [event.kind for event in events_of(job)] == ["step", "done"]  # a late listener
    assert not job._listeners and not job._enders


def test_waiting_jobs_report_their_queue_position(serve, editor):
    editor.bundle.unet.seconds = 0.02
    service = serve(join=1)
    jobs = [service.submit(request(), client="a") for _ in range(4)]
    positions = [event.position for event in events_of(jobs[-1]) if event.kind == "position"]
    assert positions == sorted(positions, reverse=True) and positions[0] >= 2 and positions[-1] == 0


def test_previews_are_made_while_someone_listens(serve, editor, monkeypatch):
    monkeypatch.setattr(makers, "PREVIEW_SHARE", 1e9)
    editor.bundle.unet.seconds = 0.01
    service = serve()
    job = service.submit(request(previews=2, steps=6, seeds=(1, 2), size=32), client="a")
    shown = [(event.step, event.number) for event in events_of(job) if event.kind == "preview"]
    assert {number for _, number in shown} == {0, 1}
    assert {step for step, _ in shown} >= {4, 8}  # of 12 steps, counting both results
    assert all(preview.size == PICTURE.size for preview in job.previews)  # thumbnails of the results


def test_no_preview_is_made_when_nobody_listens(serve, monkeypatch):
    decoded = []
    decode = makers.JoinedEditor.decode
    monkeypatch.setattr(
        makers.JoinedEditor, "decode", lambda self, x: (decoded.append(len(x)), decode(self, x))[1]
    )
    service = serve()
    job = service.submit(request(previews=1, steps=6), client="a")
    assert job.wait(60)
    assert len(decoded) == 1  # the result


def test_previews_take_a_bounded_share_of_the_time(serve, editor, monkeypatch):
    """A decoder ten times as slow as a step may be called only occasionally."""
    took = []
    decode = makers.JoinedEditor.decode

    def slow(self, x):
        began = time.monotonic()
        time.sleep(0.2)
        try:
            return decode(self, x)
        finally:
            took.append(time.monotonic() - began)

    monkeypatch.setattr(makers.JoinedEditor, "decode", slow)
    editor.bundle.unet.seconds = 0.02
    began = time.monotonic()
    job = serve().submit(request(previews=1, steps=20), client="a")
    assert events_of(job)[-1].kind == "done"
    # The last is the result; the preview before it may exceed the share, earlier ones may not.
    assert len(took) >= 3
    assert sum(took[:-2]) <= 0.25 * (time.monotonic() - began)


def test_cancelling_frees_the_slot_within_a_step(serve, editor):
    editor.bundle.unet.seconds = 0.1
    service = serve(join=1)
    job = service.submit(request(steps=100), client="a")
    until(lambda: job.step >= 2)
    service.cancel(job.id)
    step, began = job.step, time.monotonic()
    assert job.wait(5) and job.state == "cancelled"
    assert time.monotonic() - began < 2 and job.step <= step + 1
    assert service.stats().running == 0
    after = service.submit(request(), client="a")
    assert after.wait(60) and after.state == "done"


def test_cancelling_a_waiting_job_removes_it_at_once(serve, editor):
    editor.bundle.unet.seconds = 0.05
    service = serve(join=1)
    running, waiting, last = (service.submit(request(steps=20), client="a") for _ in range(3))
    until(lambda: running.step > 0)
    service.cancel(waiting.id)
    assert waiting.state == "cancelled" and last.position == 0
    service.cancel("of nobody")
    service.cancel(running.id)
    service.cancel(last.id)
    assert running.wait(60)
    service.cancel(running.id)  # again: nothing happens
    assert service.stats().cancelled == 3


def test_the_time_left_is_estimated_from_measured_steps(serve, editor):
    editor.bundle.unet.seconds = 0.03
    service = serve(join=1)
    first = service.submit(request(steps=10), client="a")
    assert first.seconds_left is None or first.step
    until(lambda: first.step >= 5)
    assert 0 < first.seconds_left < 60
    assert first.wait(60)
    jobs = [service.submit(request(steps=10), client="a") for _ in range(3)]
    assert 0 < jobs[0].seconds_left <= jobs[1].seconds_left < jobs[2].seconds_left


# --- errors, each limited to its own job -----------------------------------------------------------


def rows_of(editor, picture):
    """A function that says which of the network's rows are conditioned on this picture."""
    from ip2p.pictures.images import to_tensor

    latent = editor.encode_image(to_tensor(picture))
    return lambda sample: (sample[:, 4:] - latent).abs().amax(dim=(1, 2, 3)) < 1e-4


def test_a_nan_result_fails_only_its_own_job(serve, editor):
    bad = Image.new("RGB", (64, 64), "red")
    is_bad = rows_of(editor, bad)

    def spoil(sample):
        sample[is_bad(sample)] = float("nan")

    editor.bundle.unet.before = spoil
    editor.bundle.unet.seconds = 0.02
    service = serve()
    jobs = [service.submit(request(image=image), client="a") for image in (PICTURE, bad, PICTURE)]
    assert all(job.wait(60) for job in jobs)
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert isinstance(jobs[1].error, ModelError) and "not finite" in str(jobs[1].error)


def test_running_out_of_memory_fails_only_the_job_that_does_not_fit_alone(serve, editor):
    bad = Image.new("RGB", (64, 64), "red")
    is_bad = rows_of(editor, bad)

    def full(sample):
        if is_bad(sample).any():
            raise torch.OutOfMemoryError("full")

    editor.bundle.unet.before = full
    service = serve()
    jobs = [service.submit(request(image=image), client="a") for image in (PICTURE, bad, PICTURE)]
    assert all(job.wait(60) for job in jobs)
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert isinstance(jobs[1].error, ResourceError) and "smaller size" in str(jobs[1].error)


def test_results_that_do_not_fit_together_are_made_one_by_one(serve, editor):
    def full(sample):
        if len(sample) > 3:
            raise torch.OutOfMemoryError("full")

    editor.bundle.unet.before = full
    job = serve().submit(request(seeds=(1, 2, 3)), client="a")
    assert job.wait(60) and job.state == "done"
    assert [result.seed for result in job.results] == [1, 2, 3]
    assert job.step == job.steps


def test_an_unexpected_error_names_the_job_and_the_service_keeps_running(serve, editor, caplog):
    def fault(sample):
        raise ZeroDivisionError("a secret instruction")

    editor.bundle.unet.before = fault
    service = serve()
    job = service.submit(request(), client="a")
    assert job.wait(60) and job.state == "failed"
    assert type(job.error) is Ip2pError and job.id in str(job.error) and "secret" not in str(job.error)
    editor.bundle.unet.before = lambda sample: None
    after = service.submit(request(), client="a")
    assert after.wait(60) and after.state == "done"
    assert service.stats().failed == 1


# --- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "limit"),
    [
        ({"image": Image.new("RGB", (300, 400))}, "image", "100,000"),
        ({"image": Image.new("RGB", (8, 8))}, "image", "16"),
        ({"image": Image.new("RGB", (20, 400))}, "image", "8 times"),
        ({"instruction": " \n"}, "instruction", "empty"),
        ({"instruction": "x" * 51}, "instruction", "50"),
        ({"negative": "x" * 51}, "negative", "50"),
        ({"seeds": ()}, "seeds", "1 to 4"),
        ({"seeds": (1,) * 5}, "seeds", "1 to 4"),
        ({"seeds": (-1,)}, "seeds", "0 to"),
        ({"seeds": (2**63,)}, "seeds", "0 to"),
        ({"steps": 10**9}, "steps", "1 to 30"),
        ({"steps": 0}, "steps", "1 to 30"),
        ({"steps": 2.5}, "steps", "1 to 30"),
        ({"text_cfg": float("nan")}, "text_cfg", "0 to 100"),
        ({"image_cfg": float("inf")}, "image_cfg", "0 to 100"),
        ({"image_cfg": -1.0}, "image_cfg", "0 to 100"),
        ({"auto_mask": 1.5}, "auto_mask", "0 to 1"),
        ({"feather": -1.0}, "feather", "0 to 4096"),
        ({"mask_padding": -1}, "mask_padding", "0 to 4096"),
        ({"previews": -1}, "previews", "0 to 30"),
        ({"sampler": "ddim"}, "sampler", "euler_ancestral"),
        ({"schedule": "x" * 9000}, "schedule", "karras"),
        ({"fit": "stretch"}, "fit", "original"),
        ({"model": "../secret"}, "model", "fake"),
        ({"size": 100_000}, "size", "4096"),
        ({"size": (100, 100)}, "size", "multiples"),
        ({"size": (512, 512)}, "size", "100,000"),
        ({"size": 1024}, "size", "100,000"),
        ({"mask": Image.new("L", (9, 9))}, "mask", "16"),
        ({"mask": Image.new("L", (32, 64), 255)}, "mask", "64"),
        ({"mask": Image.new("L", (64, 64))}, "mask", "black"),
        ({"mask": Image.new("L", (64, 64), 255), "auto_mask": 0.5}, "auto_mask", "one of them"),
    ],
)
def test_every_refusal_names_the_field_and_the_limit(serve, changes, field, limit):
    service = serve(limits=Limits(pixels=100_000, working_pixels=100_000, steps=30, count=4, words=50))
    with pytest.raises(SettingError) as refused:
        service.submit(request(limited_settings(service.limits), **changes), client="a")
    assert refused.value.field == field
    assert str(refused.value).startswith((field, "mask and auto_mask both")) and limit in str(refused.value)
    assert len(str(refused.value)) < 400
    assert service.stats().waiting == service.stats().running == 0


def test_the_default_working_size_limit_of_a_small_model_is_1024_squared(serve):
    with pytest.raises(SettingError, match="1,048,576"):
        serve().submit(request(size=(2048, 1024)), client="a")


def test_a_full_queue_refuses_requests_with_a_retry_time(serve, editor):
    editor.bundle.unet.seconds = 0.1
    service = serve(join=1, limits=Limits(queue=2, per_client=10))
    running = service.submit(request(steps=100), client="a")
    until(lambda: running.state == "running")
    for client in "bc":
        service.submit(request(), client=client)
    for attempt in (lambda: service.submit(request(), client="d"), lambda: service.check_room("d")):
        with pytest.raises(Full, match="2 requests are waiting") as full:
            attempt()
        assert full.value.scope == "queue" and 1 <= full.value.retry_after <= 600
    assert service.stats().rejected == {"queue": 2}


def test_one_client_cannot_fill_the_queue(serve, editor):
    editor.bundle.unet.seconds = 0.1
    service = serve(join=1, limits=Limits(queue=64, per_client=3))
    jobs = [service.submit(request(steps=100), client="a") for _ in range(3)]
    with pytest.raises(Full, match="You have 3 requests") as full:
        service.submit(request(), client="a")
    assert full.value.scope == "client"
    service.check_room("b")
    service.cancel(jobs[1].id)
    service.check_room("a")


def test_a_reserved_place_counts_until_it_is_used_or_released(serve, editor):
    editor.bundle.unet.seconds = 0.1
    service = serve(join=1, limits=Limits(queue=1, per_client=10))
    running = service.submit(request(steps=100), client="a")
    until(lambda: running.state == "running")
    with service.room("b") as place:
        for attempt in (lambda: service.submit(request(), client="c"), lambda: service.check_room("b")):
            with pytest.raises(Full, match="1 requests are waiting"):
                attempt()
        with pytest.raises(Full, match="1 requests are waiting"), service.room("c"):
            raise AssertionError("there was no room")
        waiting = service.submit(request(), client="b", place=place)
    assert waiting.state == "waiting"
    service.cancel(waiting.id)
    with pytest.raises(KeyError), service.room("c"):
        raise KeyError("the body cannot be read")
    service.check_room("c")
    limited = serve(join=1, limits=Limits(queue=64, per_client=1))
    with limited.room("a"), pytest.raises(Full, match="You have 1 requests"):
        limited.check_room("a")


def test_the_total_pixels_of_waiting_requests_are_limited(serve, editor):
    editor.bundle.unet.seconds = 0.1
    service = serve(join=1, limits=Limits(waiting_pixels=2 * 64 * 64))
    running = service.submit(request(steps=100), client="a")
    until(lambda: running.state == "running")
    for _ in range(2):
        service.submit(request(), client="b")
    with pytest.raises(Full, match="megapixels are waiting"):
        service.submit(request(), client="c")


# --- models ----------------------------------------------------------------------------------------


def test_models_load_on_demand_and_the_least_recently_used_one_is_unloaded(serve, editor):
    loads = []
    alive, alive_counts = set(), []

    class Counted(makers.JoinedEditor):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            alive.add(id(self))
            alive_counts.append(len(alive))

        def close(self):
            super().close()
            alive.discard(id(self))

    def loader(name):
        return lambda: (loads.append(name), editor)[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(makers, "JoinedEditor", Counted)
        service = serve({name: loader(name) for name in "xyz"}, loaded=2)
        assert service.models == ["x", "y", "z"] and not service.ready and loads == []
        service.warm()
        assert service.ready and loads == ["x"]
        for name in ("y", "x", "z", "z", "y"):  # z replaces y, the least recently used; y replaces x
            job = service.submit(request(model=name, steps=1), client="a")
            assert job.wait(60) and job.state == "done"
        assert loads == ["x", "y", "z", "y"]
        assert sorted(service.stats().loaded) == ["y", "z"] and max(alive_counts) <= 2
        # Many requests for all models at once: none starves, and the limit on loaded models holds.
        names = [random.Random(0).choice("xyz") for _ in range(12)]
        jobs = [service.submit(request(model=name, steps=1), client=name) for name in names]
        assert all(job.wait(60) and job.state == "done" for job in jobs)
        assert max(alive_counts) <= 2
        service.close()
    assert not alive


def test_a_model_that_fails_to_load_fails_only_its_own_jobs_and_is_retried(serve, editor):
    tries = []

    def load():
        tries.append(1)
        if len(tries) == 1:
            raise ModelError("broken.safetensors is cut short")
        return editor

    service = serve({"good": editor, "broken": load})
    jobs = [service.submit(request(model=name), client="a") for name in ("broken", "good")]
    assert all(job.wait(60) for job in jobs)
    assert [job.state for job in jobs] == ["failed", "done"]
    assert str(jobs[0].error) == "broken.safetensors is cut short"
    again = service.submit(request(model="broken"), client="a")
    assert again.wait(60) and again.state == "done"


def test_a_size_that_a_lazily_loaded_model_does_not_support_fails_with_its_field(serve, editor):
    service = serve({"fake": lambda: editor})
    job = service.submit(request(size=(100, 100)), client="a")
    assert job.wait(60) and isinstance(job.error, SettingError) and job.error.field == "size"
    assert (service.card().text_cfg, service.card().image_cfg) == (7.5, 1.5)
    with pytest.raises(SettingError):  # it is loaded now
        service.submit(request(size=(100, 100)), client="a")


# --- the queue alone, with edits that end when the test permits it -----------------------------------


class Gate:
    """Replaces JoinedEditor: records which edits began, and lets them end one by one."""

    def __init__(self):
        self.began = []
        self.permits = threading.Semaphore(0)
        self.stopped = threading.Event()
        self.bundle = SimpleNamespace(card=Card("gate", 64))

    def __call__(self, editor, **how):
        return self

    @contextlib.contextmanager
    def lane(self):
        lane = SimpleNamespace(stopped=False, pictures=None, x0=None)
        lane.stop = lambda: setattr(lane, "stopped", True)
        self.current = lane
        yield lane

    def resolved(self, settings):
        return settings.resolved(self.bundle.card)

    def working_size(self, pixels, size):
        return (64, 64)

    def fitting_batch(self, size):
        return 8

    def close(self):
        pass

    def edit(self, image, *, settings, seeds, callback, **how):
        self.began.append(settings.instruction)
        self.permits.acquire()
        if self.current.stopped:
            raise Stopped
        callback(1, 1, torch.zeros(len(seeds), 4, 1, 1))
        record = EditRecord(
            instruction=settings.instruction,
            steps=1,
            sampler="euler",
            text_cfg=1.0,
            image_cfg=1.0,
            seed=0,
            size=(64, 64),
            model="x",
        )
        pictures = [Image.new("RGB", (16, 16)) for _ in seeds]
        for picture in pictures:
            picture.info["parameters"] = format_infotext(record)
        return pictures


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(makers, "JoinedEditor", gate)
    return gate


LOOSE = Limits(queue=10_000, per_client=10_000)


@pytest.mark.parametrize("seed", range(8))
def test_clients_take_turns_and_jobs_run_in_the_order_of_their_positions(serve, gate, seed):
    """In any arrival order, each other client begins at most one edit between two of a client's."""
    chance = random.Random(seed)
    service = serve({"x": lambda: None}, join=1, limits=LOOSE)
    first = service.submit(request(instruction="first"), client="first")
    until(lambda: gate.began)
    owners = chance.choices("abcde", weights=[50, 1, 5, 5, 2], k=60)
    jobs = [
        service.submit(request(instruction=f"{owner}{number}"), client=owner)
        for number, owner in enumerate(owners)
    ]
    positions = {f"{job.client}{number}": job.position for number, job in enumerate(jobs)}
    assert sorted(positions.values()) == list(range(60))
    for _ in range(61):
        gate.permits.release()
    assert all(job.wait(60) for job in [first, *jobs])
    began = gate.began[1:]
    assert [positions[name] for name in began] == list(range(60))
    counts = {owner: owners.count(owner) for owner in set(owners)}
    for owner in counts:
        indices = [number for number, name in enumerate(began) if name[0] == owner]
        assert [int(began[number][1:]) for number in indices] == sorted(
            int(began[number][1:]) for number in indices
        )
        for before, after in itertools.pairwise([-1, *indices]):
            between = [name[0] for name in began[before + 1 : after]]
            assert len(between) == len(set(between))


def test_fifty_requests_of_one_client_delay_another_by_at_most_one(serve, gate):
    service = serve({"x": lambda: None}, join=1, limits=LOOSE)
    jobs = [service.submit(request(instruction=f"greedy {k}"), client="greedy") for k in range(50)]
    until(lambda: gate.began)
    for k in range(5):
        gate.permits.release()
        until(lambda k=k: len(gate.began) == k + 2)
    modest = service.submit(request(instruction="modest"), client="modest")
    assert modest.position <= 1
    for _ in range(51):
        gate.permits.release()
    assert all(job.wait(60) for job in [*jobs, modest])
    assert gate.began.index("modest") <= 7


def test_an_edit_of_many_results_takes_only_the_free_slots(serve, gate):
    service = serve({"x": lambda: None}, join=4, limits=LOOSE)
    one = service.submit(request(instruction="one", seeds=(1,)), client="a")
    until(lambda: len(gate.began) == 1)
    many = service.submit(request(instruction="many", seeds=tuple(range(8))), client="a")
    until(lambda: len(gate.began) == 2)
    late = service.submit(request(instruction="late"), client="b")
    assert (one.places, many.places) == (1, 3) and late.state == "waiting"
    for _ in range(10):
        gate.permits.release()
    assert all(job.wait(60) and job.state == "done" for job in (one, many, late))
    assert len(many.results) == 8


def test_draining_finishes_running_jobs_and_refuses_the_rest(serve, gate):
    service = serve({"x": lambda: None}, join=2, limits=LOOSE)
    jobs = [service.submit(request(instruction=str(k)), client="a") for k in range(5)]
    until(lambda: len(gate.began) == 2)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(service.drain(60)))
    thread.start()
    until(lambda: service.stats().draining)
    with pytest.raises(Draining) as refused:
        service.submit(request(), client="b")
    assert refused.value.retry_after > 0 and not service.ready
    assert all(job.wait(5) and isinstance(job.error, Draining) for job in jobs[2:])
    assert [job.state for job in jobs[:2]] == ["running"] * 2
    gate.permits.release()
    gate.permits.release()
    thread.join(60)
    assert answers == [True] and [job.state for job in jobs[:2]] == ["done"] * 2


def test_draining_stops_jobs_that_do_not_end_in_time(serve, editor):
    editor.bundle.unet.seconds = 0.1
    service = serve()
    job = service.submit(request(steps=100), client="a")
    until(lambda: job.step)
    assert service.drain(0.05) is False
    assert job.wait(10) and job.state == "failed" and isinstance(job.error, Draining)


def test_ended_jobs_are_dropped_by_count_bytes_and_age(serve, gate):
    for _ in range(30):
        gate.permits.release()

    def ended(service, count):
        jobs = [service.submit(request(), client="a") for _ in range(count)]
        assert all(job.wait(60) for job in jobs)
        return [service.job(job.id) is job for job in sorted(jobs, key=lambda job: job.ended)]

    assert ended(serve({"x": lambda: None}, join=1), 3) == [True] * 3
    assert ended(serve({"x": lambda: None}, join=1, keep_jobs=2), 3) == [False, True, True]
    # A 16x16 result counts as 1,024 bytes.
    assert ended(serve({"x": lambda: None}, join=1, keep_bytes=2100), 3) == [False, True, True]
    service = serve({"x": lambda: None}, join=1, keep_seconds=0.05)
    job = service.submit(request(), client="a")
    assert job.wait(60)
    time.sleep(0.06)
    assert service.job(job.id) is None and job.results  # a caller that holds the job keeps its results


def test_the_newest_job_is_kept_at_any_size_and_early_drops_are_recorded(serve, gate):
    for _ in range(9):
        gate.permits.release()
    service = serve({"x": lambda: None}, join=1, keep_bytes=1)
    first, second = (service.submit(request(seeds=(1, 2, 3)), client="a") for _ in range(2))
    assert first.wait(60) and second.wait(60)
    assert service.job(second.id) is second and service.job(first.id) is None
    assert service.jobs.shelf.dropped_early(first.id) and not service.jobs.shelf.dropped_early(second.id)
    service = serve({"x": lambda: None}, join=1, keep_seconds=0.05)
    job = service.submit(request(), client="a")
    assert job.wait(60)
    time.sleep(0.06)
    assert service.job(job.id) is None and not service.jobs.shelf.dropped_early(job.id)


def encode(picture):
    return b"%d" % picture.width, ".txt"


def test_results_to_be_fetched_later_are_on_disk_and_not_in_memory(serve, tmp_path):
    service = serve(store=tmp_path / "results", keep_bytes=1)
    jobs = [
        service.submit(request(auto_mask=0.3, seeds=(k, k + 1)), client="a", encode=encode, keep=True)
        for k in range(5)
    ]
    assert all(job.wait(60) and job.state == "done" for job in jobs)
    for job in jobs:
        assert service.job(job.id) is job and not job.results
        assert [service.store.read(kept.file) for kept in job.kept] == [b"64", b"64"]
        assert all(service.store.read(kept.mask).startswith(b"\x89PNG") for kept in job.kept)
        assert [parse_infotext(kept.parameters).seed for kept in job.kept] == [kept.seed for kept in job.kept]
    assert service.keep(jobs[0], encode) is jobs[0].kept  # not written again


def test_results_in_memory_do_not_evict_jobs_with_results_on_disk(serve, gate, tmp_path):
    for _ in range(9):
        gate.permits.release()
    service = serve({"x": lambda: None}, join=1, keep_bytes=1, store=tmp_path / "results")
    kept = service.submit(request(), client="a", encode=lambda picture: (b"", ".txt"), keep=True)
    others = [service.submit(request(), client="a") for _ in range(3)]
    assert kept.wait(60) and all(job.wait(60) for job in others)
    assert service.job(kept.id) is kept and service.job(others[0].id) is None


def test_results_that_do_not_fit_in_the_store_fail_the_job_and_leave_no_file(serve, tmp_path):
    service = serve(store=tmp_path / "results", store_bytes=3)
    job = service.submit(request(seeds=(1, 2)), client="a", encode=encode, keep=True)
    assert job.wait(60) and job.state == "failed" and "--store-mb" in str(job.error)
    assert len(service.store) == 0 and service.stats().running == 0
    again = service.submit(request(), client="a", encode=encode, keep=True)
    assert again.wait(60) and again.state == "done"


def test_the_statistics_of_a_service_add_up(serve, gate):
    service = serve({"x": lambda: None}, join=1, limits=LOOSE)
    jobs = [service.submit(request(), client=str(k)) for k in range(4)]
    until(lambda: gate.began)
    stats = service.stats()
    assert (stats.waiting, stats.running, stats.clients, stats.done) == (3, 1, 4, 0)
    service.cancel(jobs[3].id)
    for _ in range(3):
        gate.permits.release()
    assert all(job.wait(60) for job in jobs)
    stats = service.stats()
    assert (stats.waiting, stats.running, stats.clients, stats.done, stats.cancelled) == (0, 0, 0, 3, 1)
    counts = list(stats.seconds.values())
    assert counts == sorted(counts) and counts[-1] == 3 and stats.seconds_sum > 0


def test_the_log_describes_a_job_without_private_data(serve, gate, caplog):
    caplog.set_level(logging.INFO, "ip2p.serve")
    gate.permits.release()
    service = serve({"x": lambda: None}, join=1)
    job = service.submit(request(instruction="a secret wish"), client="203.0.113.9")
    assert job.wait(60)
    until(lambda: caplog.messages)
    [line] = caplog.messages
    fields = dict(word.split("=") for word in line.split())
    assert fields["job"] == job.id and fields["outcome"] == "done" and fields["size"] == "64x64"
    assert float(fields["seconds"]) >= float(fields["waited"]) >= 0
    assert "secret" not in line and "203.0.113.9" not in line and len(fields["client"]) == 8


def test_two_thousand_requests_leak_no_objects_or_threads(serve, gate):
    gate.permits = SimpleNamespace(acquire=lambda: None)
    service = serve({"x": lambda: None}, join=4, limits=LOOSE, keep_jobs=10)

    def run_jobs(count):
        for start in range(0, count, 50):
            jobs = [service.submit(request(), client=f"{start + k}") for k in range(50)]
            assert all(job.wait(60) for job in jobs)
            if start % 200 == 0:
                service.cancel(service.submit(request(), client="x").id)
                assert [event.kind for event in events_of(jobs[0])][-1] == "done"
        del jobs
        gate.began.clear()
        until(lambda: not service.stats().running)
        gc.collect()
        return len(gc.get_objects()), threading.active_count()

    run_jobs(200)
    objects, threads = run_jobs(200)
    after, threads_after = run_jobs(2000)
    assert threads_after == threads
    assert after - objects < 500  # a single job is a dozen
    assert len(service.jobs) <= 11 and not service.queue.clients and not service.queue.waiting


def test_many_real_edits_leak_no_objects_tensors_or_threads(serve):
    small = request(
        image=Image.new("RGB", (16, 16), "red"),
        size=16,
        steps=1,
        text_cfg=1.0,
        image_cfg=1.0,
        sampler="euler",
    )
    service = serve(limits=LOOSE, keep_jobs=4)

    def run_jobs(count):
        jobs = [service.submit(small, client=f"{k % 7}") for k in range(count)]
        assert all(job.wait(120) and job.state == "done" for job in jobs)
        del jobs
        until(lambda: not service.stats().running)
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        return len(gc.get_objects()), tensors, threading.active_count()

    run_jobs(20)
    rounds = [run_jobs(20), run_jobs(60), run_jobs(60), run_jobs(60)]
    objects, tensors, threads = zip(*rounds, strict=True)
    # A leak grows in every round; a library's caches grow in one of them.
    assert median(after - before for before, after in itertools.pairwise(objects)) < 500
    # There can be fewer, when objects of an earlier test are collected meanwhile.
    assert tensors[-1] <= tensors[0] and threads[-1] <= threads[0]


def test_closing_ends_every_thread(editor):
    before = set(threading.enumerate())
    service = service_of({"fake": editor}, join=3)
    assert service.submit(request(), client="a").wait(60)
    service.submit(request(steps=100), client="a")
    service.close()
    until(lambda: set(threading.enumerate()) <= before, 10)


def test_the_result_store_is_optional_and_emptied_on_close(serve, tmp_path):
    service = serve(store=tmp_path / "results", store_bytes=10, keep_seconds=60)
    name = service.store.put(b"data", ".png")
    assert service.store.read(name) == b"data" and service.store.shelf.seconds == 60
    service.close()
    assert not (tmp_path / "results" / name).exists()
    assert serve().store is None


def test_a_service_without_a_model_is_refused():
    with pytest.raises(InputError, match="--model"):
        service_of({})


def test_a_job_does_not_modify_its_request(serve):
    picture = PICTURE.copy()
    edit_request = request(image=picture)
    before = dataclasses.asdict(edit_request)
    job = serve().submit(edit_request, client="a")
    assert job.wait(60)
    assert dataclasses.asdict(edit_request) == before
