"""Memory estimates before a run, 8-bit Adam, and EMA weights in CPU memory."""

import copy
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from ip2p.base.errors import InputError, ResourceError
from ip2p.cli import main as cli
from ip2p.training import loop
from ip2p.training.budget import TrainingMemory, training_memory
from ip2p.training.ema import Ema
from ip2p.training.loop import LoopConfig, fit, new_accelerator


def unet(**more) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "in_channels": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    return UNet2DConditionModel(**settings | more)


def saved_bytes(model, batch: int) -> int:
    """Oracle: the bytes that autograd saves for the backward pass, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        noisy, text = torch.randn(batch, 8, 16, 16), torch.randn(batch, 77, 32)
        model(noisy, torch.zeros(batch), text)
    return sum(size for _, size in saved.values())


def test_estimated_activations_match_what_autograd_saves_within_30_percent():
    model = unet()
    need = training_memory(model, [], micro_batch=2, latent_size=(16, 16))
    assert need.activations == pytest.approx(saved_bytes(model, 2), rel=0.3)
    half = training_memory(model, [], micro_batch=2, latent_size=(16, 16), half=True)
    checkpointed = training_memory(model, [], micro_batch=2, latent_size=(16, 16), checkpointing=True)
    assert 0.5 < half.activations / need.activations < 1
    assert checkpointed.activations < 0.6 * need.activations


def test_weights_gradients_optimizer_and_ema_are_exact_to_the_byte():
    model, frozen = unet(), torch.nn.Linear(10, 10)
    count = sum(p.numel() for p in model.parameters())
    need = training_memory(model, [frozen], micro_batch=1, latent_size=(16, 16))
    assert (need.parameters, need.gradients, need.ema) == (4 * count + 440, 4 * count, 4 * count)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 8, 16, 16), 0, torch.randn(1, 77, 32)).sample.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert need.optimizer == sum(m.numel() * m.element_size() for m in moments)
    small = training_memory(model, [], micro_batch=1, latent_size=(16, 16), optimizer="adamw8bit", ema=False)
    assert small.ema == 0 and small.optimizer < need.optimizer / 3.8


def test_a_run_that_cannot_fit_is_refused_and_one_that_may_not_gets_a_warning():
    need = TrainingMemory(
        parameters=4 * 10**9, gradients=10**9, optimizer=2 * 10**9, ema=10**9, activations=10**9, loaded=10**9
    )
    assert need.check("cuda", 8 * 10**9, "--x") is None and need.check("cuda", None, "--x") is None
    assert "may run out of memory. If it does, try --x." in need.check("cuda", 7 * 10**9 + 1, "--x")
    with pytest.raises(ResourceError, match="needs 8.0 GB on cuda .*, and 7.0 GB are free. Try --x"):
        need.check("cuda", 6 * 10**9, "--x")
    assert need.line("cuda", 8 * 10**9) == (
        "memory: about 9.0 GB: parameters 4.0 GB, gradients 1.0 GB, optimizer 2.0 GB, EMA 1.0 GB, "
        "activations about 1.0 GB; cuda has 9.0 GB for it"
    )


@pytest.mark.parametrize("times", [1, 3])
def test_ema_on_cpu_is_bit_identical(times):
    torch.manual_seed(1)
    model = torch.nn.Linear(50, 40)
    default, offloaded = Ema(model, 0.99), Ema(model, 0.99, on_cpu=True)
    restored = None
    for step in range(25):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        default.update(model, times)
        offloaded.update(model, times)
        if step == 12:
            state = copy.deepcopy(offloaded.state_dict())
            restored = Ema(model, 0.99, on_cpu=True)
            restored.load_state_dict(state)
        elif restored is not None:
            restored.update(model, times)
    for ema in (offloaded, restored):
        assert ema.updates == default.updates
        assert all(torch.equal(ema.state_dict()["average"][k], v) for k, v in default.average.items())
    with offloaded.in_place(model):
        assert torch.equal(model.weight, default.average["weight"])


# --- 8-bit Adam -------------------------------------------------------------------------------------


class Task(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(128, 64)

    def forward(self, batch):
        return self.net(batch).square().mean(), {}


def batches(start):
    step = start
    while True:
        yield [torch.randn(8, 128, generator=torch.Generator().manual_seed(step))]
        step += 1


def train(folder, steps, **more):
    task = Task()
    fit(
        task,
        batches,
        LoopConfig(steps=steps, batch=8, lr=1e-2, ema=0.9, **more),
        folder=folder,
        accelerator=new_accelerator("cpu", "no"),
        fingerprint={},
    )
    return task.net.weight.detach()


def test_training_with_ema_on_cpu_is_bit_identical(tmp_path):
    assert torch.equal(train(tmp_path / "a", 7), train(tmp_path / "b", 7, ema_on_cpu=True))


def test_8_bit_adam_without_its_library_says_how_to_install_it(tmp_path, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'ip2p\[8bit\]'"):
        train(tmp_path, 1, optimizer="adamw8bit")


def test_8_bit_adam_stores_uint8_states_and_resumes_bit_identically(tmp_path):
    pytest.importorskip("bitsandbytes", reason="an extra: ip2p[8bit]")
    uninterrupted = train(tmp_path / "a", 6, optimizer="adamw8bit")
    train(tmp_path / "b", 3, optimizer="adamw8bit")
    assert torch.equal(train(tmp_path / "b", 6, optimizer="adamw8bit"), uninterrupted)
    task = Task()
    optimizer = loop.new_optimizer(
        dict(task.named_parameters()), LoopConfig(steps=1, batch=8, lr=1e-2, optimizer="adamw8bit")
    )
    task(next(batches(0))[0])[0].backward()
    optimizer.step()
    assert optimizer.state[task.net.weight]["state1"].dtype == torch.uint8
    plain = train(tmp_path / "c", 6)
    assert torch.nn.functional.cosine_similarity(uninterrupted.flatten(), plain.flatten(), dim=0) > 0.99


def test_8_bit_adam_and_ema_on_cpu_are_recipe_keys(tmp_path):
    (tmp_path / "recipe.yaml").write_text("optimizer: adamw8bit\nema_on_cpu: true\n")
    config = cli.parse("train", ["--config", str(tmp_path / "recipe.yaml")])
    assert (config.optimizer, config.ema_on_cpu) == ("adamw8bit", True)
