"""Oracle: a plain loop over diffusers' UNet, ControlNetModel and scheduler, in fp32."""

import pytest
import torch
from conftest import make_controlnet
from diffusers import EulerAncestralDiscreteScheduler

from ip2p.base.devices import NoiseStream
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.editing.editor import Editor
from ip2p.pictures.images import to_tensor
from ip2p.settings import EditSettings

STEPS = 8
TEXT_CFG, IMAGE_CFG, SCALE = 7.5, 1.5, 0.8


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_residuals_in_all_three_passes_match_a_plain_loop(tiny_editor, page, memory):
    network = make_controlnet()
    editor = Editor(tiny_editor.bundle, controlnet=network, memory=memory)
    image = editor.encode_image(to_tensor(page))
    text, null_text = editor.encode_text("make it night"), editor.encode_text("")
    edges = page.transpose(0)

    scheduler = EulerAncestralDiscreteScheduler.from_config(dict(editor.bundle.scheduler_config))
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(image.shape, generator=generator) * scheduler.init_noise_sigma
    words = torch.cat([text, null_text, null_text])
    pictures = torch.cat([image, image, torch.zeros_like(image)])
    shown = ((to_tensor(edges) + 1) / 2).repeat(3, 1, 1, 1)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat([x] * 3), t)
            down, middle = network(
                noisy, t, encoder_hidden_states=words, controlnet_cond=shown, conditioning_scale=SCALE
            ).to_tuple()
            full, image_only, neither = editor.bundle.unet(
                torch.cat([noisy, pictures], dim=1),
                t,
                encoder_hidden_states=words,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample.chunk(3)
            mixed = neither + TEXT_CFG * (full - image_only) + IMAGE_CFG * (image_only - neither)
            x = scheduler.step(mixed, t, x, generator=generator).prev_sample

    def ours(control):
        *_, last = editor.edit_latents(
            image,
            text,
            null_text,
            noise=NoiseStream([6], image.shape[1:]),
            settings=EditSettings(text_cfg=TEXT_CFG, image_cfg=IMAGE_CFG),
            sigmas=linspace_sigmas(editor.schedule, STEPS),
            control=control,
        )
        return last

    actual = ours(editor.control(edges, page.size, SCALE))
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-4)
    assert (ours(None) - x).abs().max() > 0.01
    torch.testing.assert_close(ours(editor.control(edges, page.size, 0.0)), ours(None), rtol=0, atol=1e-5)
