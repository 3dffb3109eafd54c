import pytest
import torch
from bases import make_base, random_latent, run_unet
from conftest import make_model
from torch import nn

from ip2p.base.errors import ModelError
from ip2p.models.base import load_base
from ip2p.models.load import load_part
from ip2p.models.widen import widen_conv_in


@pytest.fixture(scope="module")
def bases(sd1_dir, sd2_dir, xl_dir, tmp_path_factory):
    """Folders with a small SD 1.x, SD 2.x and SDXL base model, by name. Read-only."""
    folder = tmp_path_factory.mktemp("bases")
    editors = {"SD 1.x": sd1_dir, "SD 2.x": sd2_dir, "SDXL": xl_dir}
    return {name: make_base(editor, folder / name) for name, editor in editors.items()}


def load_unet(folder):
    from diffusers import UNet2DConditionModel

    return load_part(UNet2DConditionModel, folder / "unet", torch.float32)


@pytest.mark.parametrize("name", ["SD 1.x", "SD 2.x", "SDXL"])
def test_a_widened_unet_gives_the_same_output_as_before_for_any_picture(bases, name):
    before = load_unet(bases[name])
    assert before.conv_in.bias.abs().min() > 0
    widened = load_base(bases[name]).unet.eval()
    noisy = random_latent(4)
    expected = run_unet(before, noisy)
    for picture in (torch.zeros(2, 4, 8, 8), random_latent(4, seed=3), 30 * random_latent(4, seed=4)):
        # Some CPU kernels sum the products of more channels in a different order.
        found = run_unet(widened, torch.cat([noisy, picture], dim=1))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_new_channels_are_zero_and_the_bias_is_copied(tmp_path):
    unet = load_unet(make_model(tmp_path / "base", in_channels=4))
    old = unet.conv_in
    widen_conv_in(unet, 8)
    new = unet.conv_in
    assert unet.config.in_channels == new.in_channels == 8
    assert torch.equal(new.weight[:, :4], old.weight) and (new.weight[:, 4:] == 0).all()
    assert torch.equal(new.bias, old.bias) and new.bias.data_ptr() != old.bias.data_ptr()
    # A gradient reaches the new channels, so that training can use the picture.
    new.requires_grad_(True)(torch.ones(1, 8, 4, 4)).sum().backward()
    assert (new.weight.grad[:, 4:] != 0).all()


def test_a_unet_with_more_channels_than_requested_is_refused(tmp_path):
    unet = load_unet(make_model(tmp_path / "base", in_channels=4))
    unet.conv_in = nn.Conv2d(9, 32, 3, padding=1)
    with pytest.raises(ModelError, match="takes 9 channels, more than the 8"):
        widen_conv_in(unet, 8)
