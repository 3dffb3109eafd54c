import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from memory_rows import Rows
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.data.records import Pair
from ip2p.editing.editor import Editor
from ip2p.models.bundle import load_bundle
from ip2p.models.clip import Clip
from ip2p.pictures.images import load_image
from ip2p.training import curves as module
from ip2p.training.cache import build_cache
from ip2p.training.curves import Curves
from ip2p.training.loss import add_noise, scaled_linear_alpha_bar
from ip2p.training.transform import Transform
from ip2p.training.validation import HeldOut, Watch, held_out, held_out_loss, judged


@pytest.fixture(scope="module")
def bundle(tiny_model_dir):
    """The tiny model in fp32. Do not modify it."""
    return load_bundle(tiny_model_dir)


@pytest.fixture(scope="module")
def clip(tiny_clip_dir):
    return Clip.load(tiny_clip_dir)


@pytest.fixture(scope="module")
def cache(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    transform = Transform(size=(32, 32))
    return build_cache(Rows(5), bundle, transform, folder, dtype="fp32", say=lambda _: None)


# --- which rows ------------------------------------------------------------------------------------


def test_held_out_rows_depend_on_their_ids_and_not_on_their_order():
    ids = [f"row {number}" for number in range(300)]
    places = held_out(ids, 10)
    assert len(set(places)) == 10 and places == sorted(places)
    shuffled = [ids[k] for k in np.random.default_rng(0).permutation(300)]
    assert {shuffled[k] for k in held_out(shuffled, 10)} == {ids[k] for k in places}
    assert set(places) < set(held_out(ids, 20)), "more rows are the same ones and others"
    assert held_out(ids, 10, seed=1) != places
    # With fewer rows, those that remain are still held out.
    assert {ids[k] for k in places if k < 200} <= {ids[k] for k in held_out(ids[:200], 10)}


def test_holding_out_all_rows_is_refused():
    with pytest.raises(InputError, match="Holding out 3 of 3 rows leaves none"):
        held_out(["a", "b", "c"], 3)


# --- loss ------------------------------------------------------------------------------------------


def rows_of(cache, places: list[int]):
    """The ids and the unaugmented latents of some rows."""
    return [cache.ids[place] for place in places], cache.read(places, [0] * len(places))


def test_held_out_loss_is_the_mean_over_rows_and_noise_levels(cache):
    seen, rows = [], [1, 4]

    def loss(latents, indices, noise, timesteps):
        places = [rows[index] for index in indices]
        assert (latents.std == 0).all()
        seen.extend(zip(places, timesteps.tolist(), [row.numpy().tobytes() for row in noise], strict=True))
        assert torch.equal(latents.mean, cache.read(places, [0] * len(places)).mean)
        return timesteps.float() * (1 + torch.tensor(places))

    value = held_out_loss(loss, *rows_of(cache, rows), batch=3)
    assert value == pytest.approx(np.mean([t * (1 + place) for place, t, _ in seen]))
    assert len(seen) == 8 and len({noise for *_, noise in seen}) == 8
    for place in (1, 4):
        times = [t for p, t, _ in seen if p == place]
        assert sorted(t // 250 for t in times) == [0, 1, 2, 3], "each quarter of the noise levels once"
    first, seen[:] = list(seen), []
    rows[:] = [4, 1]
    held_out_loss(loss, *rows_of(cache, rows), batch=8)
    assert sorted(seen) == sorted(first), "the same whatever the batch and the order"


def test_held_out_loss_of_a_network_does_not_depend_on_the_batch_size(bundle, cache):
    alpha_bar = scaled_linear_alpha_bar()

    def loss(latents, places, noise, timesteps):
        x = torch.cat([add_noise(latents.mean, noise, alpha_bar[timesteps]), latents.before], dim=1)
        predicted = bundle.unet(x, timesteps, torch.zeros(len(places), 77, 32)).sample
        return (predicted - noise).square().mean(dim=(1, 2, 3))

    rows = rows_of(cache, [0, 2, 3])
    torch.manual_seed(1)
    one = held_out_loss(loss, *rows, batch=1)
    torch.manual_seed(2)
    assert held_out_loss(loss, *rows, batch=12) == pytest.approx(one, rel=1e-5)
    assert held_out_loss(loss, *rows, seed=1) != pytest.approx(one, rel=1e-5)


# --- edits -----------------------------------------------------------------------------------------

SIZE = (64, 64)


def pairs(page: Image.Image, *, captions: bool = True) -> list[Pair]:
    pixels = np.asarray(page)
    texts = ("a page", "a dark page") if captions else ("", "")
    return [
        Pair(
            id=f"p{k}",
            before=pixels,
            after=pixels // (k + 2),
            instruction=text,
            caption=texts[0],
            edited_caption=texts[1],
        )
        for k, text in enumerate(["make it night", "make it\ndark"])
    ]


def test_validation_edits_scores_and_saves_the_held_out_pictures(bundle, clip, page, tmp_path):
    rows = pairs(page)
    scored_editors = []

    def score(editor):
        assert isinstance(editor, Editor) and not editor.bundle.unet.training
        scored_editors.append(editor)
        return {"storybook": 12.5}

    check = HeldOut(rows, tmp_path, SIZE, settings={"steps": 2}, clip=clip, score=score)
    state = torch.get_rng_state()
    bundle.unet.train()
    numbers = check(500, bundle)
    assert bundle.unet.training, "it goes on learning"
    bundle.unet.eval()
    assert torch.equal(torch.get_rng_state(), state), "training's own randomness is not touched"
    assert numbers["storybook"] == 12.5 and len(scored_editors) == 1
    # The editor called directly, with the seeds 0 and 1.
    edited = [
        Editor(bundle).edit(page, pair.instruction, seeds=[k], steps=2, size=64)[0]
        for k, pair in enumerate(rows)
    ]
    outputs, targets, inputs = (
        torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
        for pictures in (edited, [pair.after for pair in rows], [pair.before for pair in rows])
    )
    expected = judged(inputs, outputs, targets, rows, clip)
    assert {k: v for k, v in numbers.items() if k != "storybook"} == pytest.approx(expected, abs=2e-3)
    sheet = load_image(tmp_path / "held-out" / "step-00000500.png")
    cell = [np.asarray(sheet.crop((left, 29, left + 64, 93))) for left in (8, 80, 152)]
    assert np.array_equal(cell[0], rows[0].before) and np.array_equal(cell[2], rows[0].after)
    assert np.abs(cell[1].astype(int) - np.asarray(edited[0])).max() <= 1
    assert check(600, bundle) == numbers, "the same weights give the same numbers"


def test_the_metrics_match_their_definitions(clip, page):
    rows = pairs(page)
    inputs, targets = (
        torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
        for pictures in ([pair.before for pair in rows], [pair.after for pair in rows])
    )
    outputs = targets.clone()
    outputs[0] += 10
    numbers = judged(inputs, outputs, targets, rows, clip)
    mse = np.array([(10 / 255) ** 2, 0])
    # images.signed_psnr is capped at 106 dB.
    assert numbers["psnr"] == pytest.approx((-10 * np.log10(mse[0]) + 10 * np.log10(4e10)) / 2, rel=1e-4)
    assert numbers["l1"] == pytest.approx(10 / 255 / 2, rel=1e-4)
    by_clip = clip.similarities(inputs / 255, outputs / 255, ["a page"] * 2, ["a dark page"] * 2)
    assert numbers["clip_directional"] == pytest.approx(float(by_clip.directional.mean()), abs=1e-5)
    assert numbers["clip_image"] == pytest.approx(float(by_clip.image_image.mean()), abs=1e-5)
    assert set(judged(inputs, outputs, targets, rows)) == {"psnr", "l1"}


@pytest.mark.parametrize("captions", ["none", "equal"])
def test_without_captions_the_target_direction_is_that_of_the_pictures(clip, page, captions):
    rows = pairs(page, captions=captions == "equal")
    if captions == "equal":
        rows[1] = replace(rows[1], edited_caption="a page")
    inputs, targets = (
        torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
        for pictures in ([pair.before for pair in rows], [pair.after for pair in rows])
    )
    # The target picture itself has the target direction.
    assert judged(inputs, targets, targets, rows, clip)["clip_directional"] == pytest.approx(1, abs=1e-4)
    outputs = torch.roll(targets, 7, dims=3)
    a, b, c = (clip.images(pictures / 255) for pictures in (inputs, outputs, targets))
    expected = float(F.cosine_similarity(b - a, c - a).mean())
    assert judged(inputs, outputs, targets, rows, clip)["clip_directional"] == pytest.approx(
        expected, abs=1e-5
    )


def test_rows_that_cannot_be_edited_are_skipped(page, tmp_path):
    good, other = pairs(page)
    rows = [replace(good, before=b"broken"), replace(other, instruction="  "), replace(good, id="p9")]
    assert [pair.id for pair in HeldOut(rows, tmp_path, SIZE).pairs] == ["p9"]
    with pytest.raises(InputError, match="No held-out row can be edited"):
        HeldOut(rows[:2], tmp_path, SIZE)


# --- curves ----------------------------------------------------------------------------------------


def test_curves_are_read_back_and_a_resumed_run_drops_later_points(tmp_path):
    curves = Curves(tmp_path / "run")
    for step in (100, 200, 300):
        curves.add(step, {"loss": 1 / step})
        if step != 200:
            curves.add(step, {"psnr": float("nan") if step == 300 else 20})
    reloaded = Curves(tmp_path / "run")
    assert reloaded.keys() == ["loss", "psnr"]
    assert reloaded.series("loss") == [(100, 0.01), (200, 0.005), (300, 1 / 300)]
    assert reloaded.series("psnr") == [(100, 20.0)]
    reloaded.forget_after(200)
    reloaded.add(300, {"loss": 7})
    lines = [json.loads(line) for line in reloaded.path.read_text().splitlines()]
    assert lines == reloaded.rows == Curves(tmp_path / "run").rows
    assert Curves(tmp_path / "run").series("loss") == [(100, 0.01), (200, 0.005), (300, 7)]


def test_only_the_truncated_line_is_lost(tmp_path):
    curves = Curves(tmp_path)
    curves.add(1, {"loss": 3})
    curves.add(2, {"loss": 2})
    curves.path.write_bytes(curves.path.read_bytes()[:-5])
    curves = Curves(tmp_path)
    curves.add(3, {"loss": 1})
    assert Curves(tmp_path).series("loss") == [(1, 3), (3, 1)]


def test_curves_are_drawn_from_the_first_step_to_the_last(tmp_path):
    curves = Curves(tmp_path)
    assert curves.draw() is None
    for step in range(1, 3001):
        curves.rows.append({"step": step, "loss": 3001.0 - step, "flat": 5.0})
    sheet = np.asarray(load_image(curves.draw()))
    width, height = module.PANEL
    assert sheet.shape == (height, 2 * width, 3)

    def blue(panel):
        rows, columns = np.nonzero((panel == (0x1F, 0x6F, 0xB2)).all(axis=-1))
        return rows, columns

    rows, columns = blue(sheet[:, :width])
    assert columns.max() - columns.min() > 380 and rows.max() - rows.min() > 170
    falls = np.corrcoef(columns, rows)[0, 1]
    assert falls > 0.99, "a falling curve goes down on the page"
    rows, columns = blue(sheet[:, width:])
    assert np.ptp(rows) <= 2 and np.ptp(columns) > 380


# --- stopping --------------------------------------------------------------------------------------


def test_watch_stops_after_the_set_number_of_validations_without_a_new_best():
    watch = Watch("psnr", 2)
    values = [20, 22, 21, 23, 23, float("nan"), 22]
    assert [watch.see(step, {"psnr": v}) for step, v in enumerate(values)] == [False] * 5 + [True] * 2
    assert (watch.best, watch.best_step) == (23, 3)
    lower = Watch("loss", 1, higher_is_better=False)
    assert [lower.see(step, {"loss": v}) for step, v in enumerate([3, 2, 2.5])] == [False, False, True]
    assert lower.best_step == 1
    never = Watch("loss", 0)
    assert not any(never.see(step, {"loss": -step}) for step in range(50))


def test_a_resumed_watch_continues_its_count():
    watch = Watch("psnr", 3)
    for step, value in enumerate([20, 19, 18]):
        watch.see(step, {"psnr": value})
    resumed = Watch("psnr", 3)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.best_step == 0 and not resumed.stopped
    assert resumed.see(3, {"psnr": 19.5}) and resumed.stopped
    other = Watch("l1", 3, higher_is_better=False)
    other.load_state_dict(watch.state_dict())
    assert other.best is None


def test_a_missing_number_is_reported_with_the_given_ones():
    with pytest.raises(InputError, match="needs clip_directional.*Choose one of: psnr, l1"):
        Watch("clip_directional", 2).see(1, {"psnr": 20, "l1": 0.1})
