"""Oracle: diffusers' SDXL edit pipeline, on the same weights and noise, in fp32; wider than high."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from diffusers import (
    AutoencoderKL,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ip2p.devices import NoiseStream
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.errors import ModelError
from ip2p.images import to_tensor
from ip2p.models.bundle import Bundle, Card

pytestmark = pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")

STEPS = 8
SEEDS = [3, 4]
INSTRUCTION = "make it night"
WIDTH, HEIGHT = 64, 32
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    first, second = make_tokenizer(folder / "one"), make_tokenizer(folder / "two")
    torch.manual_seed(0)
    small = CLIPTextConfig(
        vocab_size=len(first),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=first.bos_token_id,
        eos_token_id=first.eos_token_id,
        pad_token_id=first.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(4, 8),
        use_linear_projection=True,
        cross_attention_dim=64,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    unet.conv_out.weight.data *= 0.25  # as in conftest, for the rounding of the first steps
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.13025,
    )
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    pipeline = StableDiffusionXLInstructPix2PixPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(small).eval(),
        text_encoder_2=CLIPTextModelWithProjection(small).eval(),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet.eval(),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def editor_of(pipeline, **change):
    from ip2p.editor import Editor

    bundle = Bundle(
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        text_encoder_2=pipeline.text_encoder_2,
        tokenizer_2=pipeline.tokenizer_2,
        scheduler_config=dict(pipeline.scheduler.config),
        latent_scale=pipeline.vae.config.scaling_factor,
        latent_factor=4,
        size_multiple=8,
        card=Card("xl", 64),
        folder=Path(),
        kind="sdxl",
    )
    return Editor(replace(bundle, **change))


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
        text_cfg=text_cfg,
        image_cfg=image_cfg,
        sampler=sampler,
        sigmas=linspace_sigmas(editor.schedule, STEPS) if sigmas is None else sigmas,
        **more,
    )
    return last


@pytest.mark.parametrize(
    ("negative", "zeros", "rescale"),
    [(None, True, 0.0), (None, False, 0.0), ("blurry, grey", True, 0.0), (None, True, 0.7)],
)
def test_sdxl_edits_match_diffusers(pipeline, wide, negative, zeros, rescale):
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    expected = theirs(pipeline, wide, 5.0, 1.5, negative, guidance_rescale=rescale)
    assert expected.std() > 0.1
    editor = editor_of(pipeline, zero_empty_text=zeros)
    actual = ours(editor, wide, 5.0, 1.5, negative or "", rescale=rescale)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_passes_in_turn_match_diffusers_too(pipeline, wide):
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    editor = editor_of(pipeline)
    editor.memory = "low"
    expected = theirs(pipeline, wide, 5.0, 1.5, None)
    torch.testing.assert_close(ours(editor, wide, 5.0, 1.5), expected, **CLOSE)


def test_cosxl_edits_match_diffusers(pipeline, wide, monkeypatch):
    # Its image latents are scaled, and it is told ln(sigma) / 4 in place of a time.
    scheduler = EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=120.0,
        sigma_data=1.0,
        prediction_type="v_prediction",
        sigma_schedule="exponential",
    )
    monkeypatch.setattr(pipeline, "is_cosxl_edit", True)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.clone()
    # It starts from noise · sqrt(sigma² + 1).
    noise = NoiseStream(SEEDS, (4, HEIGHT // 4, WIDTH // 4))()
    latents = noise * sigmas[0] / (sigmas[0] ** 2 + 1).sqrt()
    expected = theirs(pipeline, wide, 5.0, 1.5, None, latents=latents)
    editor = editor_of(pipeline, condition_scale=pipeline.vae.config.scaling_factor)
    assert editor.schedule.prediction == "v_prediction"
    actual = ours(editor, wide, 5.0, 1.5, sampler="euler", sigmas=sigmas)
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(linspace_sigmas(editor.schedule, STEPS), sigmas, rtol=2e-5, atol=0)


@pytest.mark.parametrize("negative", [None, "grey"])
def test_sdxl_texts_match_diffusers(pipeline, negative):
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    hidden, null_hidden, pooled, null_pooled = pipeline.encode_prompt(INSTRUCTION, negative_prompt=negative)
    editor = editor_of(pipeline)
    text, null_text = (editor.encode_text(words, (WIDTH, HEIGHT)) for words in (INSTRUCTION, negative or ""))
    for actual, expected in (
        (text.hidden, hidden),
        (text.pooled, pooled),
        (null_text.hidden, null_hidden),
        (null_text.pooled, null_pooled),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert text.time_ids.tolist() == [[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]]


def test_a_refiners_size_conditioning_is_refused(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.unet.add_embedding.linear_1, "in_features", 5 * 8 + 16)
    with pytest.raises(ModelError, match="takes 5 numbers beside the text.*have 6"):
        editor_of(pipeline).encode_text(INSTRUCTION, (WIDTH, HEIGHT))
