"""`ip2p train` end to end on tiny models: from pairs and a base to an editor, stopped, damaged, resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_model
from PIL import Image

from ip2p.base.errors import InputError, ModelError, ResourceError, Terminated
from ip2p.base.files import write_text
from ip2p.base.ledger import lock_folder
from ip2p.cli import main as cli
from ip2p.models.bundle import find_model
from ip2p.pictures.images import to_bytes
from ip2p.training import loop, trainer, validation
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.settings import TrainConfig
from ip2p.training.storybook.pairs import write_pairs
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.scene import rng_for

SIDE = 64


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A parquet of 24 storybook pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_pairs((sample_edit(rng_for("test", 0, k)) for k in range(24)), path, size=SIDE)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small Stable Diffusion of 4 channels."""
    return make_model(tmp_path_factory.mktemp("base") / "sd", in_channels=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(pairs: Path, base: Path, cache: Path, output: Path) -> TrainConfig:
    """Six fp32 steps with a checkpoint every two steps."""
    return TrainConfig(
        data=str(pairs),
        base=str(base),
        output=output,
        steps=6,
        batch=4,
        size=SIDE,
        lr=1e-3,
        cache=cache,
        precision="fp32",
        save_every=2,
        validate_every=0,
        workers=0,
        track="none",
        device="cpu",
    )


@pytest.fixture
def config(pairs, base, cache, tmp_path) -> TrainConfig:
    return settings(pairs, base, cache, tmp_path / "editor")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted((folder / "unet").glob("*.safetensors"))
    return {key: weight for file in files for key, weight in load_file(file).items()}


def state(config: TrainConfig) -> dict:
    return Checkpoints(config.output / trainer.TRAINING).load()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """Make the loop call `action` when `step` begins; the result undoes it."""
    real = loop.learning_rate

    def arrange(step: int, action):
        def at(config, now, progress):
            if now == step:
                action()
            return real(config, now, progress)

        monkeypatch.setattr(loop, "learning_rate", at)
        return lambda: monkeypatch.setattr(loop, "learning_rate", real)

    return arrange


def kill():
    raise Killed


@pytest.fixture(scope="module")
def whole(pairs, base, cache, tmp_path_factory):
    """The settings of a finished run that nothing disturbed."""
    config = settings(pairs, base, cache, tmp_path_factory.mktemp("whole") / "editor")
    trainer.run_training(config)
    return config


# --- the output ---


def test_the_output_is_an_editor_for_ip2p_and_diffusers(whole, page):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    from ip2p.editing.editor import Editor

    [result] = Editor.load(whole.output, device="cpu").edit(page, "make it night", steps=2)
    assert result.size == page.size
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(whole.output)
    assert pipeline.unet.config.in_channels == 8
    card = (whole.output / "README.md").read_text()
    assert "pairs.parquet" in card and "| lr | 0.001 |" in card and "| steps | 6 |" in card
    assert str(whole.output.parent) not in card
    assert json.loads((whole.output / "run.json").read_text())["settings"]["steps"] == 6


def test_the_saved_weights_are_the_ema_weights(whole):
    average = state(whole)["ema"]["average"]
    for key, value in weights(whole.output).items():
        assert torch.equal(value, average[f"unet.{key}"].half()), key


def test_a_finished_run_is_reported_and_left_unchanged(whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.output.rglob("*") if p.is_file() and p.name != ".lock"}
    assert trainer.train(whole) == whole.output
    assert "is finished: 6 steps. Increase --steps" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_finished_run_refuses_a_changed_setting_by_name(whole):
    with pytest.raises(InputError, match=r"was trained with --lr .*, but it is now 0\.5; use the same value"):
        trainer.train(whole, lr=0.5)


def test_the_card_of_a_trained_model_has_no_known_psnr(whole):
    assert json.loads((whole.output / "ip2p.json").read_text())["known_psnr"] is None


def test_training_changes_every_weight(whole, base):
    from ip2p.models.base import load_base

    start = load_base(base).unet.state_dict()
    last = state(whole)["model"]
    new = [k for k in start if not torch.equal(last[f"unet.{k}"], start[k])]
    assert len(new) == len(start)
    image_part = last["unet.conv_in.weight"][:, 4:]
    assert image_part.abs().max() > 0


# --- long jobs ---


def test_a_killed_and_resumed_run_is_bit_identical_to_an_undisturbed_one(config, whole, stop_at):
    restore = stop_at(5, kill)  # one step after the checkpoint of step 4
    with pytest.raises(Killed):
        trainer.run_training(config)
    restore()
    assert state(config)["step"] == 4
    trainer.run_training(config)
    ours, theirs = state(config), state(whole)
    for part in ("model", "optimizer"):
        a, b = ours[part], theirs[part]
        if part == "optimizer":
            a, b = ({f"{i}.{k}": v for i, row in x["state"].items() for k, v in row.items()} for x in (a, b))
        assert same(a, b), part
    assert same(ours["ema"]["average"], theirs["ema"]["average"])
    assert same(weights(config.output), weights(whole.output))
    logs = [
        [json.loads(line)["step"] for line in (c.output / "training" / "log.jsonl").read_text().splitlines()]
        for c in (config, whole)
    ]
    assert logs[0] == logs[1] == [6]


def test_a_finished_run_extended_by_more_steps_matches_a_single_run(config, whole):
    trainer.run_training(config.changed(steps=4))
    assert state(config)["step"] == 4
    trainer.run_training(config)
    assert same(weights(config.output), weights(whole.output))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_and_resuming_gives_the_same_weights(config, whole, stop_at, number, error):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        restore = stop_at(3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(error):
            trainer.run_training(config)
    finally:
        signal.signal(signal.SIGINT, before)
    restore()
    assert state(config)["step"] == 4  # the interrupted step was finished
    trainer.run_training(config)
    assert same(weights(config.output), weights(whole.output))


def test_a_truncated_newest_checkpoint_falls_back_to_the_previous_one(config, whole, stop_at, caplog):
    restore = stop_at(5, kill)
    with pytest.raises(Killed):
        trainer.run_training(config)
    restore()
    newest = config.output / "training" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    trainer.run_training(config)
    assert "step-00000004.pt is missing or truncated" in caplog.text
    assert same(weights(config.output), weights(whole.output))


def test_a_non_finite_step_is_not_applied_and_its_samples_are_listed(config, monkeypatch, stop_at):
    from ip2p.training.objective import EditTask

    original_forward = EditTask.forward

    def bad_at_three(self, batch):
        loss, numbers = original_forward(self, batch)
        return (loss * float("nan") if steps["now"] == 3 else loss), numbers

    steps = {"now": 0}
    original_rate = loop.learning_rate
    monkeypatch.setattr(
        loop, "learning_rate", lambda c, s, p: (steps.update(now=s), original_rate(c, s, p))[1]
    )
    monkeypatch.setattr(EditTask, "forward", bad_at_three)
    with pytest.raises(ModelError, match=r"step 3 are not finite.*not-applied.jsonl.*--nan-steps 10"):
        trainer.run_training(config)
    saved = state(config)
    assert saved["step"] == 3 and all(torch.isfinite(v).all() for v in saved["model"].values())
    [row] = [
        json.loads(x) for x in (config.output / "training" / "not-applied.jsonl").read_text().splitlines()
    ]
    assert row["step"] == 3 and len(row["ids"]) == 4
    # The same call fails again; with nan_steps the run skips the step and finishes.
    with pytest.raises(ModelError):
        trainer.run_training(config)
    assert trainer.run_training(config.changed(nan_steps=10)).finished
    assert all(torch.isfinite(v).all() for v in state(config)["model"].values())


def test_a_second_run_in_the_same_folder_is_refused(config):
    with lock_folder(config.output), pytest.raises(InputError, match="another ip2p process is writing to"):
        trainer.run_training(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1e-4}, "--lr 0.001, but it is now 0.0001"),
        ({"batch": 8}, "batch"),
        ({"seed": 1}, "seed"),
        ({"lora": 2}, "lora"),
    ],
)
def test_a_changed_setting_is_refused_by_name(whole, change, named):
    before = (whole.output / "training" / "manifest.jsonl").read_bytes()
    with pytest.raises(InputError, match=named):
        trainer.run_training(whole.changed(steps=8, **change))
    assert before == (whole.output / "training" / "manifest.jsonl").read_bytes()


def test_changed_data_is_refused_on_resume(config, tmp_path, stop_at):
    data = tmp_path / "own.parquet"
    data.write_bytes(Path(config.data).read_bytes())
    config = config.changed(data=str(data))
    restore = stop_at(3, kill)
    with pytest.raises(Killed):
        trainer.run_training(config)
    restore()
    write_pairs((sample_edit(rng_for("test", 1, k)) for k in range(24)), data, size=SIDE)
    with pytest.raises(InputError, match="content of --data"):
        trainer.run_training(config)


def test_the_micro_batch_may_change_on_resume(config, stop_at):
    restore = stop_at(3, kill)
    with pytest.raises(Killed):
        trainer.run_training(config)
    restore()
    assert trainer.run_training(config.changed(micro_batch=2)).finished


def test_a_time_limit_saves_and_the_next_call_resumes(config, whole):
    assert not trainer.run_training(config.changed(seconds=0.0)).finished
    assert not (config.output / "model_index.json").exists()
    trainer.run_training(config)
    assert same(weights(config.output), weights(whole.output))


def test_a_run_killed_while_saving_the_editor_saves_it_on_the_next_call(config, monkeypatch, whole):
    real = trainer.save_editor
    monkeypatch.setattr(trainer, "save_editor", lambda *a, **k: kill())
    with pytest.raises(Killed):
        trainer.run_training(config)
    assert not (config.output / "model_index.json").exists()
    monkeypatch.setattr(trainer, "save_editor", real)
    trainer.run_training(config)
    assert same(weights(config.output), weights(whole.output))


# --- starting points ---


def test_a_lora_of_an_editor_is_saved_as_a_file_and_as_a_merged_model(config, tiny_model_dir, page):
    from ip2p.editing.editor import Editor

    config = config.changed(base=str(tiny_model_dir), lora=2, ema=0.0)
    trainer.run_training(config)
    trained = state(config)["model"]
    assert trained and all(".lora_" in name for name in trained)
    merged = Editor.load(config.output, device="cpu", dtype="fp32")
    with_lora_file = Editor.load(
        tiny_model_dir, device="cpu", dtype="fp32", loras=[(config.output / trainer.LORA_FILE, 1.0)]
    )
    edits = [np.asarray(e.edit(page, "make it night", steps=3)[0], int) for e in (merged, with_lora_file)]
    assert abs(edits[0] - edits[1]).max() <= 2  # the merged one is in fp16
    assert np.abs(edits[0]).sum() > 0


def test_a_lora_of_stable_diffusion_trains_the_widened_input_too(config):
    config = config.changed(lora=2)
    trainer.run_training(config)
    trained = state(config)["model"]
    assert any("conv_in" in name for name in trained) and any(".lora_" in name for name in trained)
    assert not (config.output / trainer.LORA_FILE).exists()
    assert weights(config.output)["conv_in.weight"].shape[1] == 8


def test_a_unet_can_start_from_its_config_alone(config, tiny_model_dir, tmp_path):
    unet_config = tmp_path / "unet.json"
    unet_config.write_text((tiny_model_dir / "unet" / "config.json").read_text())
    with pytest.raises(InputError, match="add --parts-from MODEL"):
        trainer.run_training(config.changed(base=str(unet_config)))
    assert trainer.run_training(
        config.changed(base=str(unet_config), parts=str(tiny_model_dir), steps=2)
    ).finished


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_unet_alone_is_trained_with_the_other_parts_of_another_model(
    config, tiny_model_dir, tmp_path, form
):
    """Training starts from its weights, not noise: a step with lr 0 leaves them unchanged."""
    from safetensors.torch import load_file, save_file

    unet_weights = load_file(tiny_model_dir / "unet" / "diffusion_pytorch_model.safetensors")
    unet_weights = {key: value + 0.01 for key, value in unet_weights.items()}
    base = shutil.copytree(tiny_model_dir / "unet", tmp_path / "unet")
    save_file(unet_weights, base / "diffusion_pytorch_model.safetensors")
    if form == "file":
        base = base / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match="UNet alone.*--parts-from"):
        trainer.run_training(config.changed(base=str(base)))
    config = config.changed(base=str(base), parts_from=str(tiny_model_dir), steps=1, lr=0.0)
    assert trainer.run_training(config).finished
    written = weights(config.output)  # in fp16, like the base
    assert all(
        torch.allclose(written[key].float(), unet_weights[key].float(), atol=1e-3) for key in unet_weights
    )


@pytest.mark.parametrize("kind", ["sd2", "xl"])
def test_sd2_and_sdxl_can_be_trained_and_loaded(config, sd2_dir, xl_dir, page, kind):
    from ip2p.editing.editor import Editor

    folder = {"sd2": sd2_dir, "xl": xl_dir}[kind]
    config = config.changed(base=str(folder), steps=2)
    trainer.run_training(config)
    scheduler = json.loads((config.output / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == ("v_prediction" if kind == "sd2" else "epsilon")
    [result] = Editor.load(config.output, device="cpu").edit(page, "make it night", steps=1)
    assert result.size == page.size


def test_the_packaged_model_can_be_trained_further(config, page):
    from ip2p.editing.editor import Editor

    config = config.changed(base="storybook", data="storybook", steps=2, pool=8, size=None)
    trainer.run_training(config)
    start = weights(find_model("storybook"))
    trained = weights(config.output)
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[key], start[key]) for key in start)
    [result] = Editor.load(config.output, device="cpu").edit(page, "make it night", steps=1)
    assert result.size == page.size


def test_validations_that_are_turned_on_when_a_run_resumes_say_what_they_are_worth(config, stop_at, capsys):
    restore = stop_at(3, kill)
    with pytest.raises(Killed):
        trainer.run_training(config)
    restore()
    result = trainer.run_training(config.changed(validate_every=2, validate_steps=1))
    assert result.finished
    rows = [json.loads(x) for x in (config.output / "training" / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6]
    assert "were trained on, so their scores are too good" in " ".join(capsys.readouterr().err.split())


# --- samples ---


def test_training_without_a_cache_finishes(config):
    result = trainer.run_training(config.changed(no_cache=True, pool=8))
    assert result.finished


def test_training_on_the_storybook_logs_its_scores(config, tiny_model_dir):
    config = config.changed(
        data="storybook", base=str(tiny_model_dir), validate_every=4, held_out=2, validate_steps=1
    )
    trainer.run_training(config)
    rows = [json.loads(x) for x in (config.output / "training" / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6]
    assert {"loss", "psnr", "success", "kept"} <= rows[0].keys()


def test_broken_rows_are_skipped_and_more_than_one_percent_stops_the_run(config, tmp_path):

    from PIL import Image

    folder = tmp_path / "own"
    rng = np.random.default_rng(0)
    for name in ("before", "after"):
        (folder / name).mkdir(parents=True)
        for k in range(120):
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(
                folder / name / f"{k:03}.png"
            )
    rows = "".join(f"before/{k:03}.png,after/{k:03}.png,make it night\n" for k in range(120))
    (folder / "metadata.csv").write_text("before,after,instruction\n" + rows)
    broken = folder / "after" / "007.png"
    broken.write_bytes(broken.read_bytes()[:100])
    config = config.changed(data=str(folder))
    # Without a cache, a broken row is found when it is drawn.
    for name, changes in (("cached", {"steps": 1}), ("online", {"steps": 5, "no_cache": True, "pool": 120})):
        run_config = config.changed(output=config.output.with_name(name), batch=24, **changes)
        assert trainer.run_training(run_config).finished
    quarantined = (config.output.with_name("online") / "training" / "quarantine.jsonl").read_text()
    assert "007" in quarantined
    for k in (8, 9):
        broken = folder / "after" / f"{k:03}.png"
        broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken"):
        trainer.run_training(config.changed(output=config.output.with_name("other")))


# --- validations ---


def test_validations_are_logged_with_pictures_and_stop_a_run_that_gets_worse(
    config, tiny_clip_dir, monkeypatch
):
    config = config.changed(
        steps=40,
        validate_every=2,
        held_out=2,
        validate_steps=1,
        clip=str(tiny_clip_dir),
        stop_when_worse=3,
    )
    config = config.changed(watch="loss")
    values = iter([0.5, 0.4, 0.45, 0.6, 0.41, 0.1])
    monkeypatch.setattr(validation, "held_out_loss", lambda *a, **k: next(values))
    result = trainer.run_training(config)
    assert result.stopped_early and result.step == 10
    folder = config.output / "training"
    rows = [json.loads(x) for x in (folder / "curves.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [0.5, 0.4, 0.45, 0.6, 0.41]
    assert {"psnr", "clip_image", "clip_directional"} <= rows[0].keys()
    assert len(list((folder / "held-out").glob("*.png"))) == 5 and (config.output / "curves.png").exists()
    assert trainer.run_training(config) is None  # it is finished


def test_held_out_pairs_are_not_trained_on(config, drawn):
    config = config.changed(steps=30, validate_every=100, held_out=2, lr=1e-5)
    trainer.run_training(config)
    assert len(set(drawn)) == 22


def siblings(path: Path, counts: list[int]) -> Path:
    """A parquet with `counts[k]` pairs of prompt k; the ids are PROMPT/SEED."""
    rows = []
    for prompt, count in enumerate(counts):
        texts = {name: f"{name} of {prompt}" for name in ("original_prompt", "edit_prompt", "edited_prompt")}
        for seed in range(count):
            values = np.random.default_rng((prompt, seed)).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
            before, after = (to_bytes(Image.fromarray(one).resize((SIDE, SIDE))) for one in values)
            row = {"id": f"{prompt}/{seed}", "original_image": before, "edited_image": after}
            rows.append(row | texts)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The ids of all pairs that training draws, in order."""
    found: list[str] = []
    real = trainer.CachedSamples.batch

    def note(self, places):
        batch = real(self, places)
        found.extend(batch.ids)
        return batch

    monkeypatch.setattr(trainer.CachedSamples, "batch", note)
    return found


def test_a_prompt_with_four_pairs_is_drawn_as_often_as_one_with_one_pair(config, drawn, tmp_path):
    data = siblings(tmp_path / "pairs.parquet", [4, 1])
    trainer.run_training(config.changed(data=str(data), steps=10, batch=8, save_every=100, lr=1e-5))
    assert len(drawn) == 80
    assert Counter(id.split("/")[0] for id in drawn) == {"0": 40, "1": 40}
    assert set(drawn) == {"0/0", "0/1", "0/2", "0/3", "1/0"}


def test_training_and_the_held_out_split_share_no_prompt(config, drawn, tmp_path, monkeypatch):
    held = []
    real = trainer.CachedSamples.__init__

    def note(self, cache, *rest, kept, **more):
        held.extend(cache.ids[place] for place in range(len(cache.ids)) if place not in set(kept))
        real(self, cache, *rest, kept=kept, **more)

    monkeypatch.setattr(trainer.CachedSamples, "__init__", note)
    data = siblings(tmp_path / "pairs.parquet", [4] * 10)
    trainer.run_training(
        config.changed(data=str(data), steps=9, save_every=100, validate_every=100, held_out=1, lr=1e-5)
    )
    assert len(held) == 4 and len({id.split("/")[0] for id in held}) == 1  # all pairs of one prompt
    prompts = Counter(id.split("/")[0] for id in drawn)
    assert set(prompts.values()) == {4} and len(prompts) == 9 and held[0].split("/")[0] not in prompts


def test_auto_tracking_writes_curves_to_tensorboard(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer.run_training(
        config.changed(steps=2, track="auto", validate_every=1, held_out=2, validate_steps=1)
    )
    tags = set()
    for events in (config.output / "training" / "tensorboard").rglob("events*"):
        read = EventAccumulator(str(events))
        read.Reload()
        tags |= set(read.Tags()["scalars"])
    assert {"loss", "norm", "held out/loss", "held out/psnr"} <= tags


def test_without_tensorboard_auto_tracks_nothing_and_asking_for_it_is_an_error(monkeypatch):
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
    assert trainer._trackers("auto") is None and trainer._trackers("none") is None
    with pytest.raises(InputError, match=r"pip install 'ip2p\[track\]'"):
        trainer._trackers("tensorboard")
    with pytest.raises(InputError, match="pip install wandb"):
        trainer._trackers("wandb")


def test_stop_when_worse_needs_enough_pairs_to_hold_out(config, tmp_path):
    few = tmp_path / "few.parquet"
    write_pairs((sample_edit(rng_for("test", 0, k)) for k in range(6)), few, size=SIDE)
    with pytest.raises(InputError, match="has 6 rows"):
        trainer.run_training(config.changed(data=str(few), validate_every=2, stop_when_worse=1))


def test_two_processes_train_validate_and_save_one_editor(config, tmp_path):
    """The command under torchrun: caches, steps, validations that may stop it, one folder."""
    changes = {"validate_every": 2, "held_out": 2, "validate_steps": 1, "cache": tmp_path / "cache"}
    both = config.changed(output=tmp_path / "two", **changes)
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(both).items()
        if value not in (None, False) and value != getattr(TrainConfig, name, None)
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    process = subprocess.run(
        [*launch, "-m", "ip2p", "train", *flags, "--stop-when-worse", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split() == [str(both.output)]
    assert (both.output / "model_index.json").exists()
    trainer.run_training(config.changed(**changes))
    curves = [
        [json.loads(line)["loss"] for line in (folder / "training" / "curves.jsonl").read_text().splitlines()]
        for folder in (both.output, config.output)
    ]
    # In fp32, AdamW turns rounding errors of zero gradients into steps (tests/train/test_reference.py).
    steps = min(map(len, curves))
    assert steps >= 2 and curves[0][:steps] == pytest.approx(curves[1][:steps], abs=1e-3)


def test_min_snr_with_zero_terminal_snr_is_refused_for_epsilon(config, tmp_path):
    base = shutil.copytree(config.base, tmp_path / "zero")
    path = base / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}
    path.write_text(json.dumps(scheduler))
    with pytest.raises(InputError, match="--min-snr divides by"):
        trainer.train(config, base=str(base), min_snr=5.0, prediction="epsilon")


def test_min_snr_with_zero_terminal_snr_gets_a_warning_for_velocity(config, tmp_path, capsys):
    base = shutil.copytree(config.base, tmp_path / "zero")
    path = base / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}
    path.write_text(json.dumps(scheduler))
    trainer.train(config, base=str(base), min_snr=5.0, prediction="v_prediction", steps=1)
    assert "last noise level has no signal, so --min-snr gives it a weight of 0 for velocity" in (
        capsys.readouterr().err
    )
    curve = (config.output / "training" / "log.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(curve[0])["loss"])


def test_a_run_reports_its_memory_and_is_refused_if_it_cannot_fit(config, capsys, monkeypatch):
    trainer.train(config, steps=1, device="cpu")
    line = next(line for line in capsys.readouterr().err.splitlines() if "memory: about" in line)
    for part in ("parameters", "gradients", "optimizer", "EMA", "activations about", "cpu has"):
        assert part in line
    monkeypatch.setattr(trainer, "free_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="are free. Try --micro-batch 2 .*--checkpointing, --lora 16"):
        trainer.train(config, steps=2, device="cpu")


# --- the command line ---


def test_the_command_trains_with_a_recipe(pairs, base, cache, here, capsys):
    write_text(here / "recipe.yaml", "batch: 4\nlr: 0.001\nema_updates: 4\nmin_snr: null\nsize: 64\n")
    line = f"train --data {pairs} --base {base} --output made --steps 2 --config recipe.yaml --cache {cache}"
    assert (
        cli.main(
            [*line.split(), "--precision", "fp32", "--validate-every", "0", "--track", "none", "--profile"]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out.strip() == "made"
    assert "images/s" in captured.err and "backward" in captured.err
    settings = json.loads(Path("made/run.json").read_text())["settings"]
    assert (settings["batch"], settings["lr"], settings["ema_updates"], settings["min_snr"]) == (
        4,
        0.001,
        4,
        None,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--base x --output y", "--data is missing"),
        ("--data x --output y", "--base is missing"),
        ("--data x --base y", "--output is missing"),
        ("--data none.parquet --base storybook --output y", "none.parquet"),
        ("--data x --base y --output z --batch 10 --micro-batch 4", "--batch 10 is not a multiple"),
        ("--data x --base y --output z --lr nan", "--lr"),
        ("--data x --base y --output z --ema 1", "--ema is 1"),
        (
            "--data x --base y --output z --text-null 0.5 --image-null 0.4 --both-null 0.3",
            "add up to more than 1",
        ),
        ("--data x --base y --output z --steps 0", "--steps"),
        ("--data storybook --base storybook --output z --size 60", "is not a multiple of"),
        ("--data storybook --base storybook --output z --track nonsense", "choose one of: auto, none"),
    ],
)
def test_invalid_settings_exit_with_code_2_and_a_reason(here, capsys, words, says):
    assert cli.main(["train", *words.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert says in lines[-1], lines
