"""Feature caching: against the UNet with its deep features replaced by hooks, and against counted calls."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from ip2p.diffusion.caching import FeatureCache
from ip2p.diffusion.denoiser import UNetDenoiser, call_unet
from ip2p.diffusion.guidance import guided
from ip2p.diffusion.schedule import Schedule

WIDTHS = (32, 64, 64)
BLOCKS = {
    "attention in the last up block": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    "no attention there": ("DownBlock2D", "UpBlock2D"),
}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def unet(request) -> UNet2DConditionModel:
    down, up = request.param
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=(down, "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", up),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return network.eval().requires_grad_(False)


def inputs(seed: int, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn((rows, 8, 16, 16), generator=generator),
        "timestep": torch.full((rows,), float(900 - 100 * seed)),
        "encoder_hidden_states": torch.randn((rows, 5, 16), generator=generator),
    }


def control_of(unet: UNet2DConditionModel, rows: dict[str, torch.Tensor]) -> dict[str, object]:
    torch.manual_seed(1)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = rows["sample"]
    with torch.no_grad():
        down, middle = network(
            x,
            rows["timestep"],
            rows["encoder_hidden_states"],
            torch.ones(len(x), 3, 32, 32),
            return_dict=False,
        )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def with_deep_features_of(unet, first, rows, residuals):
    """The UNet's output for `rows` with the deep features that it has for `first`, replaced by hooks."""
    layer, skip = unet.up_blocks[-1].resnets[-1], unet.conv_in.out_channels
    kept = {}
    hook = layer.register_forward_pre_hook(lambda _, args: kept.update(deep=args[0][:, :-skip]))
    call_unet(unet, first, residuals)
    hook.remove()
    hook = layer.register_forward_pre_hook(
        lambda _, args: (torch.cat([kept["deep"], args[0][:, -skip:]], dim=1), *args[1:])
    )
    output = call_unet(unet, rows, residuals)
    hook.remove()
    return output


@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "ControlNet"])
def test_cached_steps_equal_the_unet_with_the_earlier_deep_features(unet, controlled):
    first, second = inputs(0), inputs(1)
    residuals = control_of(unet, first) if controlled else {}
    cache = FeatureCache(unet, 2)
    full = call_unet(cache.unet_at(torch.tensor(9.0), 2), first, residuals)
    assert torch.equal(full, call_unet(unet, first, residuals))
    cached = call_unet(cache.unet_at(torch.tensor(8.0), 2), second, residuals)
    torch.testing.assert_close(cached, with_deep_features_of(unet, first, second, residuals))
    assert not torch.allclose(cached, call_unet(unet, second, residuals), atol=1e-3)
    again = call_unet(cache.unet_at(torch.tensor(7.0), 2), second, residuals)
    assert torch.equal(again, call_unet(unet, second, residuals))


def test_a_cache_does_not_change_the_unet(unet):
    rows, before = inputs(0), dict(unet.named_modules())
    plain = call_unet(unet, rows)
    cache = FeatureCache(unet, 3)
    for sigma in (3.0, 2.0, 1.0):
        call_unet(cache.unet_at(torch.tensor(sigma), 2), rows)
    assert dict(unet.named_modules()) == before
    assert torch.equal(call_unet(unet, rows), plain)


@pytest.mark.parametrize("in_turn", [False, True], ids=["passes at once", "passes in turn"])
@pytest.mark.parametrize("every", [2, 3])
def test_deep_layers_run_at_every_nth_step_and_where_the_number_of_passes_changes(unet, in_turn, every):
    schedule = Schedule(torch.linspace(0.01, 10, 1000).double())
    calls = []
    unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    sigmas = (9.0, 8.0, 7.0, 6.0, 3.0, 2.0)  # guidance at the first four, in the second run

    def deep_calls(interval: tuple[float, float]) -> int:
        calls.clear()
        denoise = guided(
            UNetDenoiser(unet, schedule, cache=FeatureCache(unet, every)),
            text=torch.randn(1, 5, 16),
            null_text=torch.zeros(1, 5, 16),
            image=torch.randn(1, 4, 16, 16),
            text_cfg=5.0,
            image_cfg=1.5,
            interval=interval,
            in_turn=in_turn,
        )
        for sigma in sigmas:
            denoise(torch.randn(1, 4, 16, 16), torch.tensor(sigma))
        return len(calls)

    def expected(passes: list[int]) -> int:
        if in_turn:
            return sum(passes[::every])
        return sum(k % every == 0 or passes[k] != passes[k - 1] for k in range(len(passes)))

    assert deep_calls((0.0, 1.0)) == expected([3] * 6)
    assert deep_calls((0.5, 1.0)) == expected([3, 3, 3, 3, 1, 1])
