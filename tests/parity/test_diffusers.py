"""Oracle: diffusers' edit pipeline and its schedulers, on the same weights and noise, in fp32."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
)

from ip2p.base.devices import NoiseStream
from ip2p.diffusion.samplers import SAMPLERS
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.pictures.images import to_tensor
from ip2p.settings import EditSettings

# One picture for several results is what is compared; its warning asks for copies of the picture.
pytestmark = pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")

STEPS = 10
SEEDS = [3, 4]
INSTRUCTION = "make it night"
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir):
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_model_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def theirs(pipeline, page, text_cfg, image_cfg, negative="", **more):
    return pipeline(
        INSTRUCTION,
        image=page,
        guidance_scale=text_cfg,
        image_guidance_scale=image_cfg,
        negative_prompt=negative,
        num_inference_steps=STEPS,
        num_images_per_prompt=len(SEEDS),
        generator=generators(),
        output_type="latent",
        **more,
    ).images


def ours(editor, page, text_cfg, image_cfg, negative="", sampler="euler_ancestral", sigmas=None):
    image_latent = editor.encode_image(to_tensor(page))
    *_, last = editor.edit_latents(
        image_latent,
        editor.encode_text(INSTRUCTION),
        editor.encode_text(negative),
        noise=NoiseStream(SEEDS, image_latent.shape[1:]),
        settings=EditSettings(text_cfg=text_cfg, image_cfg=image_cfg, sampler=sampler),
        sigmas=linspace_sigmas(editor.schedule, STEPS) if sigmas is None else sigmas,
    )
    return last


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "negative"),
    [(7.5, 1.5, ""), (7.5, 1, ""), (1, 1, ""), (7.5, 1.5, "blurry, grey"), (7.5, 1, "blurry, grey")],
)
def test_euler_ancestral_matches_diffusers(pipeline, tiny_editor, page, text_cfg, image_cfg, negative):
    # At (1, 1) diffusers turns guidance off, and equation 3 leaves one prediction: the same.
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        tiny_editor.bundle.scheduler_config, timestep_spacing="linspace"
    )
    expected = theirs(pipeline, page, text_cfg, image_cfg, negative)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tiny_editor, page, text_cfg, image_cfg, negative), expected, **CLOSE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_matches_diffusers(pipeline, tiny_editor, page, prediction, monkeypatch):
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        tiny_editor.bundle.scheduler_config, timestep_spacing="linspace", prediction_type=prediction
    )
    expected = theirs(pipeline, page, 7.5, 1.5)
    object.__setattr__(tiny_editor.schedule, "prediction", prediction)
    try:
        actual = ours(tiny_editor, page, 7.5, 1.5, sampler="euler")
    finally:
        object.__setattr__(tiny_editor.schedule, "prediction", "epsilon")
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m_matches_diffusers(pipeline, tiny_editor, page, karras):
    scheduler = DPMSolverMultistepScheduler.from_config(
        tiny_editor.bundle.scheduler_config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",  # with it the last step is first order at any count of steps, as ours is
        lower_order_final=True,
        timestep_spacing="linspace",
        use_karras_sigmas=karras,
    )
    # Its linspace divides [0, T-1] into N whole-numbered steps and leaves the last out, where the
    # original (and ours) has N fractional times with both ends: so its own sigmas are used here.
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    if karras:
        # It rounds the time that it tells the UNet; undo that, so that the solver alone is compared.
        times = tiny_editor.schedule.time(sigmas[:-1])
        scheduler.set_timesteps = lambda *_, **__: setattr(scheduler, "timesteps", times)
        scheduler._step_index = None
    # It works on x / sqrt(1 + sigma²) and starts from plain noise where x starts from noise · sigma.
    latents = torch.cat([torch.randn((1, 4, 16, 16), generator=g) for g in generators()])
    pipeline.scheduler = scheduler
    expected = theirs(pipeline, page, 7.5, 1.5, latents=latents * sigmas[0] / (1 + sigmas[0] ** 2).sqrt())
    torch.testing.assert_close(
        ours(tiny_editor, page, 7.5, 1.5, sampler="dpmpp_2m", sigmas=sigmas), expected, **CLOSE
    )


def test_linspace_sigmas_match_diffusers(tiny_editor):
    scheduler = EulerAncestralDiscreteScheduler.from_config(dict(tiny_editor.bundle.scheduler_config))
    for steps in (2, 10, 20, 100):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(linspace_sigmas(tiny_editor.schedule, steps).float(), scheduler.sigmas)
        times = tiny_editor.schedule.time(scheduler.sigmas[:-1].double()).float()
        torch.testing.assert_close(times, scheduler.timesteps.float(), rtol=0, atol=2e-3)


def test_text_and_image_encodings_match_diffusers(pipeline, tiny_editor, page):
    words = pipeline._encode_prompt(INSTRUCTION, "cpu", 1, False)
    torch.testing.assert_close(tiny_editor.encode_text(INSTRUCTION), words, rtol=0, atol=1e-6)
    latents = pipeline.prepare_image_latents(to_tensor(page), 1, 1, torch.float32, "cpu", False)
    torch.testing.assert_close(tiny_editor.encode_image(to_tensor(page)), latents, rtol=0, atol=1e-6)


def test_every_sampler_has_its_oracle_here():
    # The oracles of LCM and TCD, diffusers' own schedulers, are in tests/diffusion/test_samplers.py.
    assert set(SAMPLERS) == {"euler_ancestral", "euler", "dpmpp_2m", "lcm", "tcd"}
