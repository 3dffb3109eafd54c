import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import fake_editor
from PIL import Image

from ip2p.base.errors import InputError, ResourceError
from ip2p.diffusion.samplers import SAMPLERS
from ip2p.editing.editor import Editor
from ip2p.serve.engine import JoinedEditor
from ip2p.serve.jobs import Stopped

PICTURES = [Image.effect_noise((64, 64), 40 + 10 * k).convert("RGB") for k in range(4)]


@pytest.fixture(scope="module")
def editor():
    return fake_editor(0.0)


@pytest.fixture
def joined(editor):
    editor.bundle.unet.before = lambda sample: None
    editor.bundle.unet.seconds = 0.0
    editor.bundle.unet.rows.clear()
    # Patient, so that a slow machine joins as a fast one does.
    joined = JoinedEditor(editor, join=8, patience=5.0)
    yield joined
    joined.close()


def at_once(*calls):
    """The result or exception of each call, each in its own thread."""
    answers = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(k):
        start.wait()
        try:
            answers[k] = calls[k]()
        except Exception as error:
            answers[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "an edit never ended"
    return answers


def latents(editor, picture, *, seed, steps, sampler="euler_ancestral", **scales):
    """The final fp32 latents of an edit, before they are rounded to a picture."""
    seen = []
    editor.edit(
        picture,
        "make it night",
        seeds=[seed],
        steps=steps,
        sampler=sampler,
        callback=lambda step, steps, x: seen.append(x),
        **scales,
    )
    return seen[-1]


def relative_error(one, other):
    # Untrained networks leave latents of about 14 (the first sigma), so the error is relative.
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_joined_edits_with_different_steps_and_scales_match_solo_edits(editor, joined, sampler):
    options = [
        {"seed": 1, "steps": 3, "sampler": sampler},
        {"seed": 2, "steps": 5, "sampler": sampler, "text_cfg": 2.0, "image_cfg": 1.0},
        {"seed": 3, "steps": 4, "sampler": sampler, "text_cfg": 1.0, "image_cfg": 1.0},
        {"seed": 4, "steps": 5, "sampler": "euler", "schedule": "karras", "negative": "grey"},
    ]
    alone = [latents(editor, picture, **how) for picture, how in zip(PICTURES, options, strict=True)]
    editor.bundle.unet.rows.clear()
    together = at_once(
        *(
            lambda picture=picture, how=how: latents(joined, picture, **how)
            for picture, how in zip(PICTURES, options, strict=True)
        )
    )
    assert max(relative_error(one, other) for one, other in zip(alone, together, strict=True)) < 1e-5
    assert max(editor.bundle.unet.rows) > 3  # the three passes of one edit are 3


def test_joined_edits_of_different_sizes_match_solo_edits(editor, joined):
    options = [{"size": 64}, {"size": 32}, {"size": 64}, {"size": 32}]
    alone = [latents(editor, PICTURES[k], seed=k, steps=3, **how) for k, how in enumerate(options)]
    together = at_once(
        *(
            lambda k=k, how=how: latents(joined, PICTURES[k], seed=k, steps=3, **how)
            for k, how in enumerate(options)
        )
    )
    assert [x.shape for x in together] == [x.shape for x in alone]
    assert max(relative_error(one, other) for one, other in zip(alone, together, strict=True)) < 1e-5


def test_simultaneous_edits_with_feature_caches_match_solo_edits(editor):
    plain = Editor(replace(editor.bundle, unet=editor.bundle.unet.unet))
    options = [{"steps": 4, "cache_every": 2}, {"steps": 5, "cache_every": 3}, {"steps": 4}]
    alone = [latents(plain, PICTURES[k], seed=k, **how) for k, how in enumerate(options)]
    assert relative_error(alone[0], latents(plain, PICTURES[0], seed=0, steps=4)) > 1e-4  # it has an effect
    joined = JoinedEditor(plain, join=8, patience=5.0)
    together = at_once(
        *(lambda k=k, how=how: latents(joined, PICTURES[k], seed=k, **how) for k, how in enumerate(options))
    )
    joined.close()
    assert max(relative_error(one, other) for one, other in zip(alone, together, strict=True)) < 1e-5


def test_joined_edits_with_several_seeds_or_masks_match_solo_edits(editor, joined):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    options = [
        {"seeds": [1, 2]},
        {"seeds": [3], "mask": mask, "mask_padding": 64},
        {"seeds": [4], "auto_mask": 0.5},
    ]

    def edit(maker, k):
        return maker.edit(PICTURES[k], "make it night", steps=3, **options[k])

    alone = [edit(editor, k) for k in range(3)]
    together = at_once(*(lambda k=k: edit(joined, k) for k in range(3)))
    for one, other in zip(alone, together, strict=True):
        for before, after in zip(one, other, strict=True):
            assert abs(np.asarray(before).astype(int) - np.asarray(after)).max() <= 1
            assert before.info["parameters"] == after.info["parameters"]


def test_joined_edits_make_fewer_calls_than_solo_edits(editor, joined):
    for k in range(4):
        editor.edit(PICTURES[k], "make it night", seeds=[k], steps=5)
    alone = len(editor.bundle.unet.rows)
    editor.bundle.unet.rows.clear()
    at_once(*(lambda k=k: joined.edit(PICTURES[k], "make it night", seeds=[k], steps=5) for k in range(4)))
    assert alone == 20
    # Edits start one after another, so the first calls may join fewer of them.
    assert len(editor.bundle.unet.rows) <= 12
    assert joined.calls[4] >= 1
    assert sum(number * calls for number, calls in joined.calls.items()) == 20


def test_a_lone_edit_is_byte_identical_to_the_plain_editors(editor, joined):
    one = editor.edit(PICTURES[0], "make it night", seeds=[7], steps=3)[0]
    other = joined.edit(PICTURES[0], "make it night", seeds=[7], steps=3)[0]
    assert one.tobytes() == other.tobytes()


def test_the_network_runs_in_a_single_thread(editor, joined):
    editor.bundle.unet.threads.clear()
    at_once(*(lambda k=k: joined.edit(PICTURES[k], "make it night", steps=2) for k in range(4)))
    assert len(editor.bundle.unet.threads) == 1
    assert threading.get_ident() not in editor.bundle.unet.threads


def test_a_call_has_no_more_edits_than_join(editor):
    calls = Counter()
    joined = JoinedEditor(editor, join=2, patience=5.0, calls=calls)
    at_once(*(lambda k=k: joined.edit(PICTURES[k], "make it night", steps=3, seeds=[k]) for k in range(4)))
    joined.close()
    assert set(calls) <= {1, 2} and calls[2] > 0


def test_a_call_has_no_more_rows_than_fit_in_memory(editor, joined, monkeypatch):
    # As if memory had room for one picture only.
    monkeypatch.setattr("ip2p.editing.editor.Editor.fitting_batch", lambda self, size: 1)
    editor.bundle.unet.rows.clear()
    at_once(*(lambda k=k: joined.edit(PICTURES[k], "make it night", steps=3, seeds=[k]) for k in range(3)))
    assert set(editor.bundle.unet.rows) == {3}


def test_a_call_that_runs_out_of_memory_is_retried_one_edit_at_a_time(editor, joined):
    def small(sample):
        if len(sample) > 3:
            raise torch.OutOfMemoryError("too many")

    alone = [latents(editor, PICTURES[k], seed=k, steps=3) for k in range(3)]
    editor.bundle.unet.before = small
    together = at_once(*(lambda k=k: latents(joined, PICTURES[k], seed=k, steps=3) for k in range(3)))
    assert max(relative_error(one, other) for one, other in zip(alone, together, strict=True)) < 1e-5
    assert max(editor.bundle.unet.rows) > 3  # the full call was tried


def test_an_error_fails_only_the_edit_that_caused_it(editor, joined):
    """The network fails on one of three edits, which it recognizes by the first noise of its seed."""
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))

    def guard(sample):
        # At the first step the network sees nearly the noise itself.
        if ((sample[:, :4] - noise).abs().amax(dim=(1, 2, 3)) < 0.1).any():
            raise RuntimeError("no answer to this one")

    editor.bundle.unet.before = guard
    answers = at_once(*(lambda k=k: latents(joined, PICTURES[k], seed=k, steps=3) for k in range(3)))
    assert isinstance(answers[1], RuntimeError)
    assert isinstance(answers[0], torch.Tensor) and isinstance(answers[2], torch.Tensor)


def test_a_refused_edit_does_not_hold_up_the_others(joined):
    def refused():
        return joined.edit(PICTURES[1], "", steps=3)

    answers = at_once(lambda: joined.edit(PICTURES[0], "make it night", steps=3), refused)
    assert isinstance(answers[1], InputError) and len(answers[0]) == 1


def test_an_edit_that_decodes_between_steps_is_not_waited_for(editor, joined):
    """With a patience of 5 seconds per step, waiting would take a minute."""
    began = time.monotonic()

    def slow(step, steps, x):
        with torch.inference_mode():
            joined.decode(x)

    at_once(
        lambda: joined.edit(PICTURES[0], "make it night", steps=6, callback=slow),
        lambda: joined.edit(PICTURES[1], "make it night", steps=6),
    )
    assert time.monotonic() - began < 30


def test_an_edit_with_a_slow_callback_does_not_block_the_others(editor):
    joined = JoinedEditor(editor, patience=0.01)
    started, release = threading.Event(), threading.Event()

    def dawdle(step, steps, x):
        started.set()
        release.wait(60)

    def other():
        started.wait(60)
        pictures = joined.edit(PICTURES[1], "make it night", steps=4)
        release.set()
        return pictures

    answers = at_once(lambda: joined.edit(PICTURES[0], "make it night", steps=2, callback=dawdle), other)
    joined.close()
    assert [len(pictures) for pictures in answers] == [1, 1]


def test_stopping_ends_an_edit_within_a_step(editor, joined):
    editor.bundle.unet.seconds = 0.2
    steps, lanes = [], []

    def edit():
        with joined.lane() as lane:
            lanes.append(lane)
            joined.edit(PICTURES[0], "make it night", steps=100, callback=lambda step, *_: steps.append(step))

    def stop():
        while len(steps) < 2:
            time.sleep(0.01)
        lanes[0].stop()
        return time.monotonic(), len(steps)

    answers = at_once(edit, stop)
    stopped, steps_at_stop = answers[1]
    assert isinstance(answers[0], Stopped)
    assert len(steps) <= steps_at_stop + 1
    assert time.monotonic() - stopped < 1


def test_stopping_one_edit_does_not_stop_the_other(editor, joined):
    lanes = []
    ready = threading.Event()

    def first():
        with joined.lane() as lane:
            lanes.append(lane)
            joined.edit(
                PICTURES[0], "make it night", steps=50, callback=lambda step, *_: step == 3 and ready.set()
            )

    def second():
        ready.wait(60)
        lanes[0].stop()
        return joined.edit(PICTURES[1], "make it night", steps=3)

    answers = at_once(first, second)
    assert isinstance(answers[0], Stopped) and len(answers[1]) == 1


def test_closing_fails_running_edits_and_ends_the_thread(editor):
    editor.bundle.unet.seconds = 0.05
    joined = JoinedEditor(editor)
    began = threading.Event()

    def edit():
        return joined.edit(PICTURES[0], "make it night", steps=100, callback=lambda *_: began.set())

    def close():
        began.wait(60)
        joined.close()

    answers = at_once(edit, close)
    editor.bundle.unet.seconds = 0.0
    assert isinstance(answers[0], ResourceError)
    assert not any(
        thread.name == "ip2p-engine" and thread is joined.engine._thread for thread in threading.enumerate()
    )
    with pytest.raises(ResourceError, match="was unloaded"):
        joined.edit(PICTURES[0], "make it night", steps=1)
