"""Oracles: `torch.optim.Muon`, which takes only two-dimensional weights, `torch.optim.AdamW`, and an SVD."""

import torch
from torch import nn

from ip2p.training import loop
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.loop import LoopConfig, fit, new_accelerator
from ip2p.training.muon import Muon, orthogonalized


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step_with_the_same_gradients(steps, *runs):
    """Step the optimizers of `runs`, pairs of (parameters, optimizers), with equal random gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradients = [torch.randn(p.shape, generator=generator) for p in runs[0][0]]
        for trained, optimizers in runs:
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient.clone().view(parameter.shape)
            for optimizer in optimizers:
                optimizer.step()


def test_matrices_match_torch_muon_and_vectors_match_torch_adamw():
    shapes = (6, 9), (9, 4), (6, 9), (7,)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    groups = [
        {"params": ours[:3], "weight_decay": 0.02, "matrices": True},
        {"params": ours[3:], "weight_decay": 0.01},
    ]
    muon = torch.optim.Muon(theirs[:3], lr=1e-2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[3:], lr=1e-2, weight_decay=0.01, betas=(0.9, 0.99))
    step_with_the_same_gradients(
        5, (ours, [Muon(groups, lr=1e-2, betas=(0.9, 0.99))]), (theirs, [muon, adamw])
    )
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


def test_a_convolution_counts_as_the_matrix_of_its_output_channels():
    (weight,), (matrix,) = parameters((4, 3, 2, 2)), parameters((4, 12))
    with torch.no_grad():
        matrix.copy_(weight.flatten(1))
    step_with_the_same_gradients(
        3,
        ([weight], [Muon([{"params": [weight], "matrices": True}], lr=1e-2)]),
        ([matrix], [Muon([{"params": [matrix], "matrices": True}], lr=1e-2)]),
    )
    torch.testing.assert_close(weight.flatten(1), matrix)


def test_the_memory_layout_of_a_convolution_makes_no_difference():
    (plain,), (last,) = parameters((4, 3, 2, 2)), parameters((4, 3, 2, 2))
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    step_with_the_same_gradients(
        3,
        ([plain], [Muon([{"params": [plain], "matrices": True}], lr=1e-2)]),
        ([last], [Muon([{"params": [last], "matrices": True}], lr=1e-2)]),
    )
    torch.testing.assert_close(plain, last)


def test_orthogonalization_keeps_the_singular_vectors_and_makes_the_values_about_one():
    for rows, columns in ((8, 20), (20, 8)):
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ orthogonalized(matrix[None])[0].float() @ v.T
        assert (inside - torch.diag(inside.diag())).abs().max() < 0.05
        assert inside.diag().min() > 0.6 and inside.diag().max() < 1.3


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = nn.ModuleDict(
            {
                "conv_in": nn.Conv2d(3, 4, 3, padding=1),
                "middle": nn.Conv2d(4, 4, 3, padding=1),
                "conv_out": nn.Conv2d(4, 3, 3, padding=1),
            }
        )
        self.text_encoder = nn.Linear(3, 3)

    def forward(self, x):
        for layer in self.unet.values():
            x = layer(x)
        return self.text_encoder(x.movedim(1, -1)).square().mean(), {}


def batches(start):
    while True:
        yield [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(start))]
        start += 1


def train(folder, steps):
    network = Network()
    fit(
        network,
        batches,
        LoopConfig(steps=steps, batch=8, lr=1e-2, ema=0.9, optimizer="muon"),
        folder=folder,
        accelerator=new_accelerator("cpu", "no"),
        fingerprint={},
    )
    return Checkpoints(folder).load()["model"]


def test_muon_trains_the_inner_matrices_of_the_unet_alone():
    network = dict(Network().named_parameters())
    config = LoopConfig(steps=1, batch=8, lr=1e-2, optimizer="muon", decay_vectors=False)
    groups = loop.new_optimizer(network, config).param_groups
    assert sum(len(group["params"]) for group in groups) == len(network)
    (inner,) = (group for group in groups if group["matrices"])
    assert [p is network["unet.middle.weight"] for p in inner["params"]] == [True]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    uninterrupted = train(tmp_path / "a", 6)
    train(tmp_path / "b", 3)
    resumed = train(tmp_path / "b", 6)
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)
    before = Network().unet["middle"].weight
    assert not torch.equal(before, uninterrupted["unet.middle.weight"])
