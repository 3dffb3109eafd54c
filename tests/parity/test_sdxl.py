"""Oracle: diffusers' edit pipelines for SDXL and SD 2.x, on the same weights and noise, in fp32."""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from PIL import Image

from ip2p.base.devices import NoiseStream
from ip2p.base.errors import ModelError
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.editing.editor import Editor
from ip2p.pictures.images import to_tensor
from ip2p.settings import EditSettings

pytestmark = pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")

STEPS = 8
SEEDS = [3, 4]
INSTRUCTION = "make it night"
WIDTH, HEIGHT = 64, 32
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def pipeline(xl_dir):
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(xl_dir, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def editor(xl_dir):
    return Editor.load(xl_dir, device="cpu", dtype="fp32")


def changed(editor, memory="auto", **change):
    return Editor(replace(editor.bundle, **change), memory=memory)


@pytest.fixture
def wide(page):
    return page.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def theirs(pipeline, picture, text_cfg, image_cfg, negative, **more):
    return pipeline(
        INSTRUCTION,
        image=picture,
        width=WIDTH,
        height=HEIGHT,
        guidance_scale=text_cfg,
        image_guidance_scale=image_cfg,
        negative_prompt=negative,
        num_inference_steps=STEPS,
        num_images_per_prompt=len(SEEDS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **more,
    ).images


def ours(editor, picture, text_cfg, image_cfg, negative="", sampler="euler_ancestral", sigmas=None, **more):
    image_latent = editor.encode_image(to_tensor(picture))
    *_, last = editor.edit_latents(
        image_latent,
        editor.encode_text(INSTRUCTION, (WIDTH, HEIGHT)),
        editor.encode_text(negative, (WIDTH, HEIGHT)),
        noise=NoiseStream(SEEDS, image_latent.shape[1:]),
        settings=EditSettings(text_cfg=text_cfg, image_cfg=image_cfg, sampler=sampler, **more),
        sigmas=linspace_sigmas(editor.schedule, STEPS) if sigmas is None else sigmas,
    )
    return last


@pytest.mark.parametrize(
    ("negative", "zeros", "rescale", "memory"),
    [
        (None, True, 0.0, "auto"),
        (None, True, 0.0, "low"),
        (None, False, 0.0, "auto"),
        ("blurry, grey", True, 0.0, "auto"),
        (None, True, 0.7, "auto"),
    ],
)
def test_sdxl_edits_match_diffusers(pipeline, editor, wide, negative, zeros, rescale, memory):
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    expected = theirs(pipeline, wide, 5.0, 1.5, negative, guidance_rescale=rescale)
    assert expected.std() > 0.1
    editor = changed(editor, memory, zero_empty_text=zeros)
    actual = ours(editor, wide, 5.0, 1.5, negative or "", text_cfg_rescale=rescale)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_cosxl_edits_match_diffusers(pipeline, editor, wide):
    # Its image latents are scaled, and it receives ln(sigma) / 4 instead of a time step.
    scheduler = EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=120.0,
        sigma_data=1.0,
        prediction_type="v_prediction",
        sigma_schedule="exponential",
    )
    pipeline.is_cosxl_edit, pipeline.scheduler = True, scheduler
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.clone()
    # It starts from noise · sqrt(sigma² + 1).
    noise = NoiseStream(SEEDS, (4, HEIGHT // 4, WIDTH // 4))()
    latents = noise * sigmas[0] / (sigmas[0] ** 2 + 1).sqrt()
    expected = theirs(pipeline, wide, 5.0, 1.5, None, latents=latents)
    editor = changed(
        editor,
        condition_scale=pipeline.vae.config.scaling_factor,
        scheduler_config=dict(scheduler.config),
    )
    actual = ours(editor, wide, 5.0, 1.5, sampler="euler", sigmas=sigmas)
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(linspace_sigmas(editor.schedule, STEPS), sigmas, rtol=2e-5, atol=0)


@pytest.mark.parametrize("negative", [None, "grey"])
def test_sdxl_texts_match_diffusers(pipeline, editor, negative):
    hidden, null_hidden, pooled, null_pooled = pipeline.encode_prompt(INSTRUCTION, negative_prompt=negative)
    text, null_text = (editor.encode_text(words, (WIDTH, HEIGHT)) for words in (INSTRUCTION, negative or ""))
    for actual, expected in (
        (text.hidden, hidden),
        (text.pooled, pooled),
        (null_text.hidden, null_hidden),
        (null_text.pooled, null_pooled),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert text.time_ids.tolist() == [[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]]


def test_a_refiners_size_conditioning_is_refused(editor, monkeypatch):
    unet = editor.bundle.unet
    numbers = 5 * unet.config.addition_time_embed_dim
    pooled = editor.bundle.text_encoder_2.config.projection_dim
    monkeypatch.setattr(unet.add_embedding.linear_1, "in_features", numbers + pooled)
    with pytest.raises(ModelError, match="takes 5 numbers beside the text.*have 6"):
        editor.encode_text(INSTRUCTION, (WIDTH, HEIGHT))


def test_sdxl_edits_a_picture_from_end_to_end(editor, page):
    (result,) = editor.edit(page, "make it night", steps=2, size=64)
    assert result.size == page.size


def test_an_sd2_edit_matches_diffusers(sd2_dir, page):
    # OpenCLIP's penultimate layer, linear projections, velocity.
    editor = Editor.load(sd2_dir, device="cpu", dtype="fp32")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(sd2_dir)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        INSTRUCTION,
        image=page,
        guidance_scale=5.0,
        image_guidance_scale=1.5,
        negative_prompt="",
        num_inference_steps=STEPS,
        num_images_per_prompt=len(SEEDS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    torch.testing.assert_close(ours(editor, page, 5.0, 1.5), expected, **CLOSE)
