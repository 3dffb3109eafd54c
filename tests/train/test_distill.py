"""`ip2p distill` on tiny models: the student's targets, the distilled model, and resuming after a kill."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZE

import ip2p
from ip2p.base.errors import InputError, ModelError
from ip2p.cli import main as cli
from ip2p.diffusion.denoiser import UNetDenoiser
from ip2p.diffusion.guidance import embed_scales, guided
from ip2p.diffusion.schedule import lcm_sigmas, schedule_from_config
from ip2p.editing.editor import Editor
from ip2p.models.bundle import Card
from ip2p.models.widen import add_scales_input
from ip2p.training import loop, trainer
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.distill import LEVELS, Distillation, DistillTask, _card
from ip2p.training.loss import add_noise, snr_weight, split_noisy, velocity
from ip2p.training.objective import Draws, EditBatch
from ip2p.training.settings import DistillConfig
from ip2p.training.storybook.pairs import write_pairs
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.scene import rng_for


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, Path]:
    """A parquet of 24 storybook pairs, and a folder for the cache."""
    folder = tmp_path_factory.mktemp("distill")
    path = folder / "pairs.parquet"
    write_pairs((sample_edit(rng_for("test", 0, k)) for k in range(24)), path, size=SIZE)
    return {"data": path, "cache": folder / "cache"}


@pytest.fixture
def config(shared, tiny_model_dir, tmp_path) -> DistillConfig:
    """Four fp32 steps with a checkpoint every two steps."""
    return DistillConfig.read(
        {
            "model": str(tiny_model_dir),
            "data": str(shared["data"]),
            "cache": shared["cache"],
            "output": tmp_path / "fast",
            **{"steps": 4, "batch": 4, "lr": 1e-3, "precision": "fp32", "save_every": 2, "workers": 0},
            **{"validate_every": 0, "track": "none", "device": "cpu", "dtype": "fp32"},
        }
    )


def task_of(config: DistillConfig) -> DistillTask:
    recipe = Distillation()
    bundle = recipe.open(config, torch.device("cpu"))
    objective = recipe.objective(config, "epsilon")
    return recipe.task(config, bundle, objective, (SIZE, SIZE)).eval()


def batch_of(count: int, *, times=None, scales=None) -> EditBatch:
    torch.manual_seed(0)
    shape, not_dropped = (count, 4, 16, 16), torch.zeros(count, dtype=torch.bool)
    if times is None:
        times = torch.randint(0, 1000, (count,))
    draws = Draws(
        torch.randn(shape), torch.randn(shape), times, not_dropped, not_dropped, not_dropped, scales
    )
    before, mean, std = torch.randn(shape), torch.randn(shape), 0.1 * torch.rand(shape)
    return EditBatch(before, mean, std, draws, torch.randn(count, 77, 32), ids=())


def activate_scales(unet) -> None:
    """Give the scales an effect, as training would."""
    torch.manual_seed(5)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.1)


# --- training targets ---


def test_the_teacher_matches_guided_sampling(config):
    """Oracle: `diffusion.guidance.guided`, one sample at a time."""
    task = task_of(config)
    scales = torch.tensor([[7.5, 1.5], [1.0, 1.0], [3.0, 2.0]])
    batch = batch_of(3, times=torch.tensor([999, 400, 20]))
    target, image = task.latents(batch)
    times, a = batch.draws.timesteps, task.alpha_bar[batch.draws.timesteps]
    x = add_noise(target, batch.draws.noise, a)
    with torch.no_grad():
        epsilon = task.guided(x, image, times, {"text": batch.text}, scales)
        x0, _ = split_noisy(x, epsilon, a, "epsilon")
        schedule = schedule_from_config(
            json.loads(Path(config.base, "scheduler/scheduler_config.json").read_text())
        )
        model = UNetDenoiser(task.teacher, schedule)
        for k in range(3):
            sigma = schedule.sigma(times[k].double()).float()
            denoise = guided(
                model,
                text=batch.text[k : k + 1],
                null_text=task.null["text"],
                image=image[k : k + 1],
                text_cfg=float(scales[k, 0]),
                image_cfg=float(scales[k, 1]),
            )
            ours = denoise(x[k : k + 1] * (1 + sigma**2).sqrt(), sigma)
            torch.testing.assert_close(x0[k : k + 1], ours, rtol=1e-4, atol=1e-4 * float(1 + sigma))


def test_an_untrained_student_matches_the_teacher_without_guidance(config):
    task, batch = task_of(config), batch_of(3, scales=torch.rand(3, 2))
    with torch.no_grad():
        predicted, expected, a, _ = task.predict(batch)
        target, image = task.latents(batch)
        x = torch.cat([add_noise(target, batch.draws.noise, a), image], dim=1)
        plain = task.teacher(x, batch.draws.timesteps, batch.text).sample
    assert torch.equal(predicted, plain)
    assert not torch.allclose(predicted, expected, atol=1e-3)


def test_the_scales_reach_the_network_and_are_drawn_within_their_ranges(config):
    task = task_of(config.changed(text_range=(2, 9), image_range=(1, 2)))
    activate_scales(task.unet)
    drawn = task._scales(torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.999, 0.999]]), 3)
    torch.testing.assert_close(drawn, torch.tensor([[2.0, 1.0], [5.5, 1.5], [8.993, 1.999]]))
    outputs = []
    with torch.no_grad():
        for scale in (0.0, 0.9):
            batch = batch_of(1, scales=torch.tensor([[scale, 0.2]]))
            outputs.append(task.predict(batch)[0])
    assert not torch.allclose(*outputs, atol=1e-4)


def test_closer_scales_have_closer_embeddings():
    scales = torch.tensor([[7.5, 1.5], [7.6, 1.5], [7.5, 1.6], [3.0, 1.5]])
    rows = embed_scales(scales, 128)
    assert rows.shape == (4, 128) and rows.abs().max() <= 1
    near, other, far = (float((rows[0] - rows[k]).norm()) for k in (1, 2, 3))
    assert 0 < near < far and near == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_split_noisy_inverts_add_noise(prediction):
    torch.manual_seed(0)
    clean, noise, a = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.9, 0.5, 0.01])
    predicted = noise if prediction == "epsilon" else velocity(clean, noise, a)
    found = split_noisy(add_noise(clean, noise, a), predicted, a, prediction)
    for one, other in zip(found, (clean, noise), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_no_noise_level_outweighs_the_others(prediction, config):
    """With an error that is typical of the prediction (noise: √(1 − ā), velocity: 1, x0: 1 in x0's terms)."""
    a = torch.tensor([1e-4, 0.5, 0.9999])
    objective = Distillation().objective(config, prediction)
    weight = snr_weight(a, objective.snr_clip, prediction)
    in_x0 = {"epsilon": (1 - a) / a, "v_prediction": 1 - a, "sample": torch.ones(3)}[prediction]
    clamped = weight / in_x0  # the weight of the squared error of x0
    assert torch.allclose(clamped[:2], torch.ones(2), rtol=1e-3)
    assert clamped[2] * {"sample": 1.0}.get(prediction, float(1 - a[2])) <= 5.0


def test_few_step_targets_match_a_ddim_step_followed_by_the_student(config):
    """Oracle: diffusers' DDIMScheduler for the step; the last level's target is the teacher's x0."""
    from diffusers import DDIMScheduler

    task = task_of(config.changed(stage="few-steps"))
    activate_scales(task.unet)
    batch = batch_of(2, times=torch.tensor([991, 3]), scales=torch.full((2, 2), 0.5))
    with torch.no_grad():
        predicted, expected, a, _ = task.predict(batch)
        times = torch.tensor([999, 19])
        assert torch.equal(a, task.alpha_bar[times])
        target, image = task.latents(batch)
        x = add_noise(target, batch.draws.noise, a)
        scales = task._scales(batch.draws.scales, 2)
        epsilon = task.guided(x, image, times, {"text": batch.text}, scales)
        ddim = DDIMScheduler.from_pretrained(config.base, subfolder="scheduler", clip_sample=False)
        ddim.set_timesteps(LEVELS)
        later = ddim.step(epsilon[:1], 999, x[:1]).prev_sample
        condition = embed_scales(scales[:1], 128)
        channels = torch.cat([later, image[:1]], dim=1)
        e = task.unet(channels, 979, batch.text[:1], timestep_cond=condition).sample
        b = task.alpha_bar[[979]]
    torch.testing.assert_close(expected[:1], split_noisy(later, e, b, "epsilon")[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected[1:], split_noisy(x[1:], epsilon[1:], a[1:], "epsilon")[0])
    assert predicted.shape == expected.shape


def test_few_step_models_are_sampled_at_their_training_levels():
    schedule = schedule_from_config({"beta_schedule": "scaled_linear"})
    times = schedule.time(lcm_sigmas(schedule, LEVELS)[:-1].double()).round().long().tolist()
    assert times == list(range(999, 0, -20))


@pytest.mark.parametrize("stage", ["guidance", "few-steps"])
@pytest.mark.parametrize("lora", [None, 4])
def test_the_loss_decreases_and_the_teacher_does_not_change(config, stage, lora):
    if lora:
        from ip2p.training.lora import add_lora
    config = config.changed(stage=stage, lora=lora)
    recipe = Distillation()
    bundle = recipe.open(config, torch.device("cpu"))
    if lora:
        add_lora(bundle.unet, lora)
    task = recipe.task(config, bundle, recipe.objective(config, "epsilon"), (SIZE, SIZE))
    task.train()
    assert not task.teacher.training
    before = copy.deepcopy(task.teacher.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in task.parameters() if p.requires_grad], lr=1e-2 if lora else 2e-3
    )
    batch = batch_of(4, times=torch.tensor([900, 700, 500, 300]), scales=torch.rand(4, 2))
    losses = []
    for _ in range(25):
        loss, _ = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert task.unet.time_embedding.cond_proj.weight.abs().max() > 0
    after = task.teacher.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


# --- the distilled model ---


@pytest.fixture(scope="module")
def fast(shared, tiny_model_dir, tmp_path_factory) -> Path:
    """A model distilled for two steps by the command."""
    output = tmp_path_factory.mktemp("fast") / "fast"
    args = ["--model", tiny_model_dir, "--data", shared["data"], "--cache", shared["cache"], "-o", output]
    train_args = ["--steps", "2", "--batch", "4", "--lr", "1e-3", "--device", "cpu", "--workers", "0"]
    validate_args = ["--validate-every", "2", "--validate-steps", "2", "--track", "none", "--dtype", "fp32"]
    assert cli.main(["distill", *map(str, [*args, *train_args, *validate_args])]) == 0
    return output


def test_an_edit_takes_one_pass_per_step_and_both_scales_have_an_effect(fast, page, monkeypatch):
    editor = Editor.load(fast, device="cpu", dtype="fp32")
    assert editor.model.scales_size == 128
    assert editor.bundle.card.text_cfg_range == (1, 12) and editor.bundle.card.image_cfg_range == (1, 2.5)
    activate_scales(editor.bundle.unet)
    sizes = []
    editor.bundle.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))

    def edited(**changes):
        return np.asarray(editor.edit(page, "make it night", steps=3, **changes)[0], int)

    default = edited()
    assert sizes == [1, 1, 1]
    for changed in (edited(text_cfg=2), edited(image_cfg=2.2)):
        assert np.abs(changed - default).max() > 0
    assert len(editor.edit(page, "make it night", steps=2, auto_mask=True)) == 1


def test_a_step_matches_diffusers_unet_with_timestep_cond(fast):
    """Oracle: diffusers' UNet2DConditionModel, loaded from the folder, with timestep_cond."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(fast, subfolder="unet")
    assert unet.config.time_cond_proj_dim == 128
    editor = Editor.load(fast, device="cpu", dtype="fp32")
    activate_scales(unet), activate_scales(editor.bundle.unet)
    torch.manual_seed(3)
    x, image, text = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), editor.encode_text("make it night")
    sigma = editor.schedule.sigma(torch.tensor(500.0)).float()
    with torch.inference_mode():
        ours = guided(editor.model, text=text, null_text=text, image=image, text_cfg=4.0, image_cfg=1.2)(
            x, sigma
        )
        condition = embed_scales(torch.tensor([[4.0, 1.2]]), 128)
        inputs = torch.cat([x / (1 + sigma**2).sqrt(), image], dim=1)
        theirs = x - sigma * unet(inputs, 500, text, timestep_cond=condition).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_cfg": 20}, "text_cfg is 20, and fast was distilled for 1 to 12. Try 12"),
        ({"image_cfg": 0.5}, "image_cfg is 0.5, and fast was distilled for 1 to 2.5. Try 1"),
        ({"negative": "blurry"}, "negative has no effect on fast"),
        ({"text_cfg_rescale": 0.5}, "text_cfg_rescale has no effect on fast"),
    ],
)
def test_settings_that_were_not_distilled_are_refused(fast, page, changes, says):
    with pytest.raises(InputError, match=says):
        Editor.load(fast, device="cpu").edit(page, "make it night", **changes)


def test_cfg_interval_works_if_both_ranges_contain_1(fast, page):
    editor = Editor.load(fast, device="cpu", dtype="fp32")
    assert len(editor.edit(page, "make it night", steps=2, cfg_interval=(0.2, 0.9))) == 1


@pytest.mark.parametrize(
    ("changes", "interval"),
    [({}, (0.3, 1)), ({"text_range": (2, 8)}, (0, 1)), ({"stage": "few-steps"}, (0, 1))],
)
def test_the_card_keeps_the_teachers_interval_if_the_student_can_use_it(config, changes, interval):
    teacher = Card(name="teacher", native_size=SIZE, cfg_interval=(0.3, 1))
    card = _card(config.model_copy(update=changes), teacher)
    assert card.cfg_interval == interval


def test_the_servers_joined_editor_matches_the_editor_for_a_distilled_model(fast, page):
    from ip2p.serve.engine import JoinedEditor

    editor = Editor.load(fast, device="cpu", dtype="fp32")
    activate_scales(editor.bundle.unet)
    expected = editor.edit(page, "make it night", steps=2, text_cfg=3)
    joined = JoinedEditor(editor)
    try:
        [result] = joined.edit(page, "make it night", steps=2, text_cfg=3)
    finally:
        joined.close()
    assert np.abs(np.asarray(result, int) - np.asarray(expected[0], int)).max() <= 1


def test_the_model_card_describes_the_distillation(fast):
    card = (fast / "README.md").read_text()
    assert "Distilled with ip2p" in card and "text CFG 1 to 12 and image CFG 1 to 2.5" in card
    assert "from diffusers import" not in card
    assert json.loads((fast / "ip2p.json").read_text())["text_cfg_range"] == [1, 12]
    assert (fast / "training" / "curves.png").is_file()


def test_a_distilled_model_without_its_ranges_is_refused(fast, tmp_path):
    import shutil

    shutil.copytree(fast, tmp_path / "bare", ignore=shutil.ignore_patterns("training", "ip2p.json"))
    with pytest.raises(ModelError, match="ip2p.json has no usable text_cfg_range"):
        Editor.load(tmp_path / "bare", device="cpu")


def test_a_few_step_model_edits_in_four_steps_by_default(fast, config, page):
    output = ip2p.distill(config, model=str(fast), stage="few-steps", steps=1, validate_every=1, held_out=1)
    editor = Editor.load(output, device="cpu", dtype="fp32")
    card = editor.bundle.card
    assert (card.steps, card.sampler, card.schedule) == (4, "lcm", "lcm")
    calls = []
    editor.bundle.unet.register_forward_hook(lambda *_: calls.append(1))
    editor.edit(page, "make it night")
    assert len(calls) == 4


def test_a_lora_is_merged_into_a_complete_model(config, page):
    output = ip2p.distill(config, lora=2, steps=1)
    assert not (output / trainer.LORA_FILE).exists()
    state = Checkpoints(output / trainer.TRAINING).load()["model"]
    assert any("cond_proj" in name for name in state) and all(
        ".lora_" in name or "cond_proj" in name for name in state
    )
    assert len(Editor.load(output, device="cpu").edit(page, "make it night", steps=1)) == 1


@pytest.mark.parametrize("kind", ["sd2", "xl"])
def test_sd2_and_sdxl_editors_can_be_distilled(config, sd2_dir, xl_dir, page, kind):
    output = ip2p.distill(config, model=str({"sd2": sd2_dir, "xl": xl_dir}[kind]), steps=1, size=SIZE)
    assert len(Editor.load(output, device="cpu").edit(page, "make it night", steps=1)) == 1


# --- resuming ---


@pytest.mark.parametrize("stage", ["guidance", "few-steps"])
def test_a_killed_and_resumed_run_is_bit_identical_to_an_undisturbed_one(
    config, tmp_path, monkeypatch, stage
):
    def fail_at_step_3(loop_config, step, progress):
        if step == 3:
            raise KeyError("killed")
        return original(loop_config, step, progress)

    original = loop.learning_rate
    config = config.changed(stage=stage)
    undisturbed = ip2p.distill(config, output=tmp_path / "whole")
    monkeypatch.setattr(loop, "learning_rate", fail_at_step_3)
    with pytest.raises(KeyError):
        ip2p.distill(config)
    monkeypatch.setattr(loop, "learning_rate", original)
    resumed = ip2p.distill(config)
    one, other = (Checkpoints(folder / trainer.TRAINING).load() for folder in (undisturbed, resumed))
    for part in ("model", "ema"):
        left, right = (state[part]["average"] if part == "ema" else state[part] for state in (one, other))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


# --- refusals and bases ---


def test_training_a_distilled_model_is_refused(fast, config):
    from ip2p.training.settings import TrainConfig

    values = {name: getattr(config, name) for name in TrainConfig.model_fields}
    with pytest.raises(InputError, match="is a distilled model, and training would destroy its guidance"):
        trainer.train(TrainConfig(**values).changed(base=str(fast)))


def test_a_base_without_image_channels_is_refused(config, tmp_path):
    from conftest import make_model

    base = make_model(tmp_path / "sd", in_channels=4)
    with pytest.raises(InputError, match="is not an editor"):
        ip2p.distill(config, model=str(base))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text-range", "5", "2"], "--text-range 5 2 is empty"),
        (["--text-range", "1", "5"], "--text-range 1 5 does not contain 7.5"),
        (["--min-snr", "5"], "--min-snr does not apply to distillation"),
        (["--stage", "all"], "--stage"),
        ([], "--output is missing; write: ip2p distill --model MODEL"),
    ],
)
def test_invalid_distillation_settings_exit_with_code_2(capsys, config, tmp_path, words, says):
    output = ["--output", str(tmp_path / "out")] if words else []
    args = ["--model", config.base, "--data", config.data, *output, *words]
    assert cli.main(["distill", *args]) == 2
    assert says in capsys.readouterr().err


def test_a_range_beyond_the_teachers_is_refused(fast, config):
    with pytest.raises(InputError, match=r"--text-range 1 30: .*fast was distilled for 1 to 12"):
        ip2p.distill(config, model=str(fast), text_range=(1, 30))


def test_a_new_scales_input_does_not_change_the_output(tiny_editor):
    unet = copy.deepcopy(tiny_editor.bundle.unet)
    inputs = torch.randn(1, 8, 16, 16), 500, torch.randn(1, 77, 32)
    with torch.no_grad():
        before = unet(*inputs).sample
        add_scales_input(unet, 16)
        assert torch.equal(unet(*inputs, timestep_cond=torch.randn(1, 16)).sample, before)
    assert unet.config.time_cond_proj_dim == 16


def test_parts_from_completes_an_editor_that_is_a_unet_alone(config, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir / "unet", tmp_path / "alone")
    complete = Distillation().open(config, torch.device("cpu"))
    unet_only = config.changed(base=str(tmp_path / "alone"), parts_from=str(tiny_model_dir))
    opened = Distillation().open(unet_only, torch.device("cpu"))
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(complete, part).state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in getattr(opened, part).state_dict().items())
