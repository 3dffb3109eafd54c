"""The autoencoder's fixed encoder, its white latents, and its decoder's loss."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ip2p.training.storybook.autoencoder import (
    DecoderTask,
    components,
    new_autoencoder,
    picture_loss,
    skip_identities,
    start_from_components,
)
from ip2p.training.storybook.data import Crops, Pages, to_signed
from ip2p.training.storybook.presets import PRESETS


@pytest.fixture(scope="module")
def pages():
    return to_signed(Pages(24, 64, seed=3).make(0), torch.device("cpu"))


@pytest.fixture
def vae(pages):
    torch.manual_seed(0)
    preset = replace(PRESETS["cpu"], vae_channels=(16, 32, 64, 128), size=64)
    network = new_autoencoder(preset).eval()
    start_from_components(network, pages)
    return network


@torch.no_grad()
def test_the_encoder_starts_near_the_principal_components_of_patches(vae, pages):
    """Oracle: a linear fit of each patch from its latents loses little more than the best 16 components."""
    latents = vae.encode(pages).latent_dist.mode()
    spread = latents.std(dim=(0, 2, 3))
    assert spread.min() > 0.9 and spread.max() < 1.1
    patches = F.pixel_unshuffle(pages, 8).transpose(0, 1).reshape(192, -1)
    z = latents.transpose(0, 1).reshape(16, -1)
    z = torch.cat([z, torch.ones(1, z.shape[1])])
    fitted = z.T @ torch.linalg.lstsq(z.T, patches.T).solution
    lost = (fitted - patches.T).square().mean()
    centered = patches - patches.mean(dim=1, keepdim=True)
    best = torch.linalg.svdvals(centered.double())[16:].square().sum() / patches.numel()
    # Some components are dropped between the levels, and the last normalization is not exactly linear.
    assert float(lost) < 1.25 * float(best)


def test_components_are_orthonormal_and_ordered():
    x = (
        torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 7)[:, None, None]
    )
    axes, parts, units = components(x, 4)
    torch.testing.assert_close(axes @ axes.T, torch.eye(4), atol=1e-5, rtol=0)
    assert (units.diff() <= 0).all()
    torch.testing.assert_close(parts.std(dim=(0, 2, 3)), units, rtol=0.2, atol=0)


@torch.no_grad()
def test_latents_are_white_and_the_posterior_is_narrow(vae, pages):
    posterior = vae.encode(pages).latent_dist
    rows = posterior.mode().transpose(0, 1).reshape(16, -1)
    torch.testing.assert_close(torch.cov(rows), torch.eye(16), atol=0.15, rtol=0)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, math.exp(-3)))


@torch.no_grad()
def test_skipping_identities_changes_no_latent(vae, pages):
    before = vae.encode(pages).latent_dist.mode()
    skip_identities(vae.encoder)
    assert "forward" in vars(vae.encoder.mid_block.resnets[0])
    torch.testing.assert_close(vae.encode(pages).latent_dist.mode(), before, atol=1e-6, rtol=0)


def test_a_trained_block_is_not_skipped(vae):
    torch.nn.init.ones_(vae.encoder.mid_block.resnets[0].conv2.bias)
    skip_identities(vae.encoder)
    assert "forward" not in vars(vae.encoder.mid_block.resnets[0])
    assert "forward" in vars(vae.encoder.mid_block.resnets[1])


def test_only_the_decoder_is_trained(vae, pages):
    task = DecoderTask(vae, PRESETS["cpu"])
    loss, _ = task((pages[:2], torch.zeros(2, 16, 8, 8)))
    loss.backward()
    assert all(parameter.grad is None for parameter in vae.encoder.parameters())
    assert any(parameter.grad is not None for parameter in vae.decoder.parameters())
    names = {name.split(".")[0] for name in task.state_dict()}
    assert names == {"decoder", "post_quant_conv"}


def test_the_loss_penalizes_errors_of_level_hue_and_edges():
    error = torch.zeros(1, 3, 4, 4)
    assert picture_loss(error, 1.0, 1.0) == 0
    gray = error + 0.1
    assert math.isclose(float(picture_loss(gray, 1.0, 1.0)), 0.1 + 2 * 0.01, rel_tol=1e-5)
    red = error.clone()
    red[:, 0] = 0.1
    assert math.isclose(float(picture_loss(red, 3.0, 0.0)), (0.1 + 2 * 0.01) / 3 + 3 * 0.05, rel_tol=1e-5)
    edge = error.clone()
    edge[..., 2:] = 0.1
    plain = float(picture_loss(edge, 0.0, 0.0))
    assert math.isclose(float(picture_loss(edge, 0.0, 1.0)) - plain, 0.5 * 0.1 / 3, rel_tol=1e-5)


def test_most_crops_overlap_a_thing():
    from ip2p.training.storybook.data import draw_planes, training_scene
    from ip2p_storybook.cells import thing_map

    crops = Crops(8, 128, 1, crop=48, per_page=2).make(0)
    assert crops.shape == (8, 3, 48, 48) and crops.dtype == torch.uint8
    found = overlapping = 0
    for first in range(0, 8, 2):
        scene = training_scene("crop", 1, 0, first)
        page, things = torch.from_numpy(draw_planes(scene, 128)), thing_map(scene, 128) > 0
        for crop in crops[first : first + 2]:
            windows = page.unfold(1, 48, 1).unfold(2, 48, 1).permute(1, 2, 0, 3, 4)
            same = (windows == crop).flatten(2).all(dim=-1).nonzero()
            assert len(same)
            found += 1
            y, x = same[0].tolist()
            overlapping += bool(things[y : y + 48, x : x + 48].any())
    assert found == 8 and overlapping >= 5
