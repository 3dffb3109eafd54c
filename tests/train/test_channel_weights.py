"""Weights of latent channels in the loss: against an eigendecomposition, and against a weighted sum."""

from types import SimpleNamespace

import numpy as np
import torch

from ip2p.training.loss import Shares, scaled_linear_alpha_bar
from ip2p.training.objective import EditBatch, EditTask, Objective, random_draws
from ip2p.training.storybook.autoencoder import channel_weights
from ip2p.training.storybook.data import draw_planes, training_scene
from ip2p.training.storybook.presets import PRESETS

SMOKE = PRESETS["smoke"]
SIDE, CHANNELS, PAGES = 8, 5, 12


def patches_of(pixels: torch.Tensor) -> torch.Tensor:
    """[batch, 3, h, w] as [batch, h / 8, w / 8, 192]."""
    return torch.nn.functional.pixel_unshuffle(pixels, SIDE).movedim(1, -1)


def test_weights_are_the_standard_deviations_of_principal_components():
    pages = np.stack([draw_planes(training_scene("channel weights", k), SMOKE.size) for k in range(PAGES)])
    patches = patches_of(torch.from_numpy(pages).float() / 127.5 - 1).flatten(0, 2)
    values, vectors = np.linalg.eigh(np.cov(patches.numpy().T))
    values, vectors = values[::-1][:CHANNELS].copy(), vectors[:, ::-1][:, :CHANNELS].copy()
    white = torch.from_numpy(vectors / np.sqrt(values)).float()

    def encode(pixels):
        latents = (patches_of(pixels) @ white).movedim(-1, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    found = channel_weights(SimpleNamespace(encode=encode, device=torch.device("cpu")), SMOKE, PAGES)
    expected = np.sqrt(values) / np.sqrt(values).mean()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


def test_the_loss_weighs_the_channels():
    torch.manual_seed(0)
    objective = Objective(prediction="sample", shares=Shares(text=0.0, image=0.0, both=0.0))
    weights = torch.tensor([2.5, 1.0, 0.4, 0.1])
    output = torch.randn(3, 4, 8, 8)

    def unet(inputs, timesteps, context, return_dict):
        return (output,)

    shape = (4, 8, 8)
    batch = EditBatch(
        before=torch.randn(3, *shape),
        mean=torch.randn(3, *shape),
        std=torch.zeros(()),
        draws=random_draws(range(3), 0, shape, objective),
        text=torch.zeros(3, 5, 16),
        ids=(),
    )
    task = EditTask(unet, scaled_linear_alpha_bar(), objective, latent_scale=1.0, channel_weights=weights)
    errors = (output - batch.mean).square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(task(batch)[0], (weights * errors).mean())
    assert "channel_roots" not in task.state_dict()  # so that older checkpoints load
