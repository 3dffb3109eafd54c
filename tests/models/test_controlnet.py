import json

import pytest
import torch
from conftest import make_controlnet
from PIL import Image

from ip2p.base.errors import InputError, ModelError
from ip2p.editing.editor import Editor
from ip2p.models.controlnet import Control, load_controlnet


@pytest.fixture(scope="module")
def controlnet_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlnets") / "tiny"
    make_controlnet().save_pretrained(folder)
    return folder


def test_a_controlnet_is_loaded_with_an_editor(tiny_model_dir, controlnet_dir, page):
    editor = Editor.load(tiny_model_dir, device="cpu", dtype="fp32", controlnet=controlnet_dir)
    assert not editor.controlnet.training
    control = editor.control(page.resize((40, 40)), (64, 48), 0.5)
    assert control.picture.shape == (1, 3, 48, 64)
    assert control.picture.min() >= 0 and control.picture.max() <= 1
    black = editor.control(Image.new("RGB", (8, 8)), (64, 64))
    assert (black.picture == 0).all()


def test_each_guidance_pass_gets_the_control_image_of_its_row():
    class Network:
        def __call__(self, noisy, time, controlnet_cond, **_):
            return [controlnet_cond], noisy

    pictures = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    text = {"encoder_hidden_states": torch.zeros(6, 1, 1)}
    out = Control(Network(), pictures)(torch.zeros(6, 4, 2, 2), torch.zeros(6), text)
    assert out["down_block_additional_residuals"][0][:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dim": 48}, "cross_attention_dim is 48, the editor's 32"),
        ({"block_out_channels": (32, 32)}, "block_out_channels"),
        ({"in_channels": 8}, "takes 8 channels of noise, not 4"),
        ({"conditioning_embedding_out_channels": (8, 16, 16, 16)}, "shrinks its picture 8 times"),
    ],
)
def test_a_controlnet_that_does_not_match_the_editor_is_refused(tiny_editor, change, message):
    with pytest.raises(ModelError, match=message):
        Editor(tiny_editor.bundle, controlnet=make_controlnet(**change))


def test_a_path_that_is_not_a_controlnet_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ModelError, match="holds a UNet2DConditionModel, not a ControlNetModel"):
        load_controlnet(tiny_model_dir / "unet")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_controlnet(tmp_path)
    file = tmp_path / "control.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is not a folder; a ControlNet is a folder"):
        load_controlnet(file)
    with pytest.raises(ModelError, match="nothing is not there; a ControlNet"):
        load_controlnet(tmp_path / "nothing")


def test_a_pickled_controlnet_is_not_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle.*was not opened"):
        load_controlnet(tmp_path)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1, 101])
def test_a_scale_out_of_range_is_an_error(tiny_editor, page, scale):
    editor = Editor(tiny_editor.bundle, controlnet=make_controlnet())
    with pytest.raises(InputError, match="control_scale is .*; it must be a number from 0 to 100"):
        editor.edit(page, "make it night", control_image=page, control_scale=scale)


def test_a_control_image_without_a_controlnet_is_an_error(tiny_editor, page):
    with pytest.raises(InputError, match="needs a ControlNet.*(controlnet)"):
        tiny_editor.control(page, (64, 64))
