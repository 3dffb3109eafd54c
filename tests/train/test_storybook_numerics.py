import pytest
import torch

from ip2p.training.storybook import numerics
from ip2p.training.storybook.numerics import FP32, Numerics, measure_numerics

BF16_LAST = Numerics("bf16", torch.channels_last)


@pytest.mark.parametrize(
    ("fast", "factor", "chosen"),
    [(BF16_LAST, 0.2, BF16_LAST), (BF16_LAST, 0.95, FP32), (Numerics("no", torch.channels_last), 0.5, None)],
)
def test_the_fastest_format_is_chosen_if_it_is_clearly_faster(monkeypatch, fast, factor, chosen):
    monkeypatch.setattr(numerics, "_block_pass", lambda each, *shape: lambda: factor if each == fast else 1.0)
    assert measure_numerics(torch.device("cpu")) == (chosen or fast)


def test_other_work_during_one_round_changes_nothing(monkeypatch):
    def block_pass(each, *shape):
        rounds = iter(range(100))
        return lambda: 5.0 if next(rounds) == 1 else 0.2 if each == BF16_LAST else 1.0

    monkeypatch.setattr(numerics, "_block_pass", block_pass)
    assert measure_numerics(torch.device("cpu")) == BF16_LAST


def test_a_real_measurement_chooses_a_supported_precision():
    found = measure_numerics(torch.device("cpu"), channels=16, side=4, batch=2)
    assert found.precision in ("no", "bf16")


def test_a_gpu_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(numerics, "_block_pass", None)
    assert measure_numerics(torch.device("cuda")) == BF16_LAST
    assert measure_numerics(torch.device("mps")) == FP32
