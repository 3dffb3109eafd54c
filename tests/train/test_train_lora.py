import copy
import sys

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

from ip2p.base.errors import InputError
from ip2p.models.base import load_base
from ip2p.models.bundle import load_bundle
from ip2p.models.lora import apply_loras
from ip2p.training.lora import add_lora, lora_state, merged, save_lora


@pytest.fixture
def base(tiny_model_dir):
    return load_base(tiny_model_dir)


def predict(unet):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn((2, 8, 16, 16), generator=generator)
    text = torch.randn((2, 77, 32), generator=generator)
    with torch.no_grad():
        return unet.eval()(latent, torch.tensor([900, 10]), text).sample


def perturb(parameters):
    """Perturb, as training would: the up matrices start at zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_new_lora_changes_nothing_and_only_it_is_trained(base):
    before = predict(base.unet)
    trained = add_lora(base.unet, 4)
    assert torch.equal(predict(base.unet), before)
    names = [name for name, p in base.unet.named_parameters() if p.requires_grad]
    assert len(names) == len(trained) and all(".lora_" in name for name in names)
    # 4 projections of 2 attentions of 3 transformer blocks, down and up.
    assert len(trained) == 2 * 4 * 2 * 4
    frozen = {n: p.clone() for n, p in base.unet.named_parameters() if not p.requires_grad}
    base.unet.train()(torch.ones(1, 8, 16, 16), 5, torch.ones(1, 77, 32)).sample.square().mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    assert not torch.equal(predict(base.unet), before)
    assert all(torch.equal(p, frozen[n]) for n, p in base.unet.named_parameters() if n in frozen)


@pytest.mark.parametrize(("targets", "alpha"), [("attention", None), ("all", 6.0), (["attn2.to_q"], 1.0)])
def test_a_saved_lora_matches_the_trained_one_here_and_in_diffusers(
    base, tiny_model_dir, tmp_path, targets, alpha
):
    """Oracle: diffusers' load_lora_weights."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    before = predict(base.unet)
    perturb(add_lora(base.unet, 4, alpha, targets=targets))
    expected = predict(base.unet)
    assert (expected - before).abs().max() > 1e-3
    path = tmp_path / "lora.safetensors"
    save_lora(base.unet, path)

    ours = load_bundle(tiny_model_dir)
    apply_loras(ours, [(path, 1.0)])
    torch.testing.assert_close(predict(ours.unet), expected, rtol=0, atol=1e-5)

    theirs = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_model_dir)
    theirs.load_lora_weights(path)
    torch.testing.assert_close(predict(theirs.unet), expected, rtol=0, atol=1e-5)

    merged_unet = merged(base.unet)
    torch.testing.assert_close(predict(merged_unet), expected, rtol=0, atol=1e-5)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    assert merged_unet.state_dict().keys() == theirs.unet.state_dict().keys()
    for name, weight in theirs.unet.state_dict().items():
        torch.testing.assert_close(merged_unet.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)


def test_all_means_every_linear_and_convolutional_layer(base):
    layers = [n for n, m in base.unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    add_lora(base.unet, 2, targets="all")
    assert {key.split(".lora_")[0] for key in lora_state(base.unet)} == {f"unet.{name}" for name in layers}


def test_a_widened_input_convolution_is_fully_trained_and_only_in_the_merged_model(tmp_path):
    base = load_base(make_model(tmp_path / "base", in_channels=4))
    assert base.widened
    trained = add_lora(base.unet, 4, targets="all", conv_in=base.widened)
    assert base.unet.conv_in.weight in set(trained) and base.unet.conv_in.bias in set(trained)
    perturb(trained)
    expected = predict(base.unet)
    with pytest.raises(InputError, match="cannot contain the input convolution, which was widened"):
        save_lora(base.unet, tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()
    merged_unet = merged(base.unet)
    torch.testing.assert_close(predict(merged_unet), expected, rtol=0, atol=1e-5)
    # Further training does not change the merged model.
    kept = copy.deepcopy(merged_unet.state_dict())
    perturb(trained)
    assert all(torch.equal(weight, kept[name]) for name, weight in merged_unet.state_dict().items())


def test_the_scale_is_part_of_the_saved_weights(base, tmp_path):
    perturb(add_lora(base.unet, 4, 2.0, targets=["attn1.to_q"]))
    save_lora(base.unet, tmp_path / "lora.safetensors")
    stored = load_file(tmp_path / "lora.safetensors")
    layer = base.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert not any("alpha" in name for name in stored)
    product = stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
    torch.testing.assert_close(product, layer.get_delta_weight("ip2p"))


def test_a_seeded_lora_is_reproducible_and_does_not_advance_the_global_rng(tiny_model_dir):
    states = []
    for seed in (1, 1, 2):
        unet = load_base(tiny_model_dir).unet
        torch.manual_seed(9)
        add_lora(unet, 2, seed=seed)
        states.append((lora_state(unet), torch.rand(1)))
    (one, after), (same, _), (other, _) = states
    assert all(torch.equal(weight, same[key]) for key, weight in one.items())
    assert any(not torch.equal(weight, other[key]) for key, weight in one.items())
    torch.manual_seed(9)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "words"),
    [
        (0, None, "attention", "rank of the LoRA is 0; use 1 or more"),
        (2, 0.0, "attention", "alpha of the LoRA is 0; use a positive number"),
        (2, float("nan"), "attention", "alpha of the LoRA is nan"),
        (2, None, ["to_q", "to_z"], "is named 'to_z'; use attention, all"),
    ],
)
def test_invalid_lora_settings_are_refused_with_a_reason(base, rank, alpha, targets, words):
    with pytest.raises(InputError, match=words):
        add_lora(base.unet, rank, alpha, targets=targets)
    assert all(p.requires_grad for p in base.unet.parameters())


def test_without_peft_the_error_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs PEFT: pip install 'ip2p\[lora\]'"):
        add_lora(base.unet, 4)
