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
    seconds = lambda numerics, *shape, **more: factor if numerics == fast else 1.0  # noqa: E731
    monkeypatch.setattr(numerics, "_block_seconds", seconds)
    assert measure_numerics(torch.device("cpu")) == (chosen or fast)


def test_a_real_measurement_chooses_a_supported_precision():
    found = measure_numerics(torch.device("cpu"), channels=16, side=4, batch=2)
    assert found.precision in ("no", "bf16")


def test_a_gpu_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(numerics, "_block_seconds", None)
    assert measure_numerics(torch.device("cuda")) == BF16_LAST
    assert measure_numerics(torch.device("mps")) == FP32
