"""Feature caching: most steps run only the outermost layers of the UNet (DeepCache, Ma et al. 2024)."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ip2p.diffusion import Sigma

Features = Float[Tensor, "rows channels height width"]


class FeatureCache:
    """Runs a UNet in full at every nth step only, during one sampling run.

    The last layer of the last up block gets two inputs: the output of all deeper layers, which changes little
    from step to step, and the skip connection from the first convolution. The steps between two full ones
    reuse the deep features of the last full step and compute only the first convolution, that layer and the
    output. This is an approximation.

    unet: a diffusers UNet2DConditionModel. Its weights are shared, and it is not changed. If it was compiled
    as a whole, it runs without compilation here.
    """

    def __init__(self, unet: Any, every: int) -> None:
        self.every = every
        self._step, self._call = -1, 0
        self._level: float | None = None  # of the current step's noise
        block = unet.up_blocks[-1]
        self._recorder = _Recorder(block.resnets[-1], unet.conv_in.out_channels)
        recorded = _with_parts(block, resnets=nn.ModuleList([*block.resnets[:-1], self._recorder]))
        self._whole = _with_parts(unet, up_blocks=nn.ModuleList([*unet.up_blocks[:-1], recorded]))
        self._last_layer = _LastLayer(block)
        self._outer = _with_parts(
            unet,
            down_blocks=nn.ModuleList([_NoBlock()]),
            mid_block=None,
            up_blocks=nn.ModuleList([self._last_layer]),
        )

    def unet_at(self, sigma: Sigma, rows: int) -> nn.Module:
        """The network for the next call, with the arguments of the UNet; call it before the next `unet_at`.

        Calls at the same noise level belong to one step. rows: size of its batch; if it differs from that of
        the last full step, as at the ends of a guidance interval, the call is a full one.
        """
        level = float(sigma)
        self._call += 1
        if level != self._level:
            self._level, self._step, self._call = level, self._step + 1, 0
        deep = self._recorder.kept.get(self._call)
        if self._step % self.every == 0 or deep is None or len(deep) != rows:
            self._recorder.call = self._call
            return self._whole
        self._last_layer.deep = deep
        return self._outer


def _with_parts(module: Any, **parts: nn.Module | None) -> Any:
    """A copy of a module with other submodules; the rest is shared."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    other._compiled_call_impl = None
    return other


class _Recorder(nn.Module):
    """A resnet that keeps the deep features of its input, by the number of the call in its step."""

    def __init__(self, resnet: nn.Module, skip_channels: int) -> None:
        super().__init__()
        self.resnet, self.skip_channels = resnet, skip_channels
        self.kept: dict[int, Features] = {}
        self.call = 0

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        self.kept[self.call] = x[:, : -self.skip_channels]
        output: Tensor = self.resnet(x, temb)
        return output


class _NoBlock(nn.Module):
    """In place of the down blocks. Its output, plus a ControlNet's middle residual, is not used."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states.new_zeros(()), ()


class _LastLayer(nn.Module):
    """The last layer of an up block, with `deep` in place of the output of the layers before it."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.resnets = block.resnets[-1:]
        self.has_cross_attention = getattr(block, "has_cross_attention", False)
        self.attentions = block.attentions[-1:] if self.has_cross_attention else None
        self.deep: Features | None = None

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        encoder_hidden_states: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        assert self.deep is not None
        x: Tensor = self.resnets[0](torch.cat([self.deep, res_hidden_states_tuple[-1]], dim=1), temb)
        if self.attentions is not None:
            x = self.attentions[0](x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        return x
