"""Oracle: diffusers' edit pipeline with each LoRA beside its layer, and with PEFT where it is installed."""

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from safetensors.torch import save_file
from torch import nn

from ip2p.base.devices import NoiseStream
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.editing.editor import Editor
from ip2p.pictures.images import to_tensor

STEPS, SEED, WEIGHT, RANK = 8, 4, 0.6, 2
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "proj", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def layers(root):
    """The layers that trainers give a LoRA: attention, its feed-forward, and convolutions."""
    return {
        name: module
        for name, module in root.named_modules()
        if (isinstance(module, nn.Linear) and name.endswith(LINEAR))
        or (isinstance(module, nn.Conv2d) and ".resnets." in name)
    }


@pytest.fixture
def pipeline(tiny_model_dir):
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_model_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def lora(pipeline, tmp_path):
    """A file of PEFT's naming for the UNet and the text encoder."""
    torch.manual_seed(0)
    weights = {}
    for prefix, root in (("unet.", pipeline.unet), ("text_encoder.text_model.", pipeline.text_encoder)):
        for name, module in layers(root).items():
            shape = module.weight.shape
            weights[f"{prefix}{name}.lora_A.weight"] = 0.1 * torch.randn(RANK, *shape[1:])
            weights[f"{prefix}{name}.lora_B.weight"] = 0.1 * torch.randn(
                shape[0], RANK, *(1,) * (len(shape) - 2)
            )
    save_file(weights, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors", weights


def theirs(pipeline, page):
    return pipeline(
        "make it night",
        image=page,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        negative_prompt="",
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images


def ours(editor, page):
    image_latent = editor.encode_image(to_tensor(page))
    *_, last = editor.edit_latents(
        image_latent,
        editor.encode_text("make it night"),
        editor.encode_text(""),
        noise=NoiseStream([SEED], image_latent.shape[1:]),
        sigmas=linspace_sigmas(editor.schedule, STEPS),
    )
    return last


def beside(module, down, up):
    """Adds the LoRA's own path to a layer's output."""
    inner = type(module).__new__(type(module))
    inner.__dict__ = dict(module.__dict__)
    inner._parameters = {"weight": nn.Parameter(down, requires_grad=False), "bias": None}

    def hook(_, inputs, output):
        low = type(module).forward(inner, *inputs)
        more = nn.functional.conv2d(low, up) if up.ndim == 4 else low @ up.T
        return output + WEIGHT * more

    module.register_forward_hook(hook)


def test_lora_edits_match_the_pipeline_with_the_lora_beside(pipeline, lora, tiny_model_dir, page):
    path, weights = lora
    plain = theirs(pipeline, page)
    for prefix, root in (("unet.", pipeline.unet), ("text_encoder.text_model.", pipeline.text_encoder)):
        for name, module in layers(root).items():
            key = f"{prefix}{name}"
            beside(module, weights[f"{key}.lora_A.weight"], weights[f"{key}.lora_B.weight"])
    expected = theirs(pipeline, page)
    assert (expected - plain).abs().max() > 0.1
    actual = ours(Editor.load(tiny_model_dir, device="cpu", dtype="fp32", loras=[(path, WEIGHT)]), page)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_lora_edits_match_diffusers_with_peft(pipeline, lora, tiny_model_dir, page):
    path, _ = lora
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="one")
    pipeline.set_adapters(["one"], [WEIGHT])
    expected = theirs(pipeline, page)
    actual = ours(Editor.load(tiny_model_dir, device="cpu", dtype="fp32", loras=[(path, WEIGHT)]), page)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
