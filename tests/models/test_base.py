import json
import shutil

import pytest
import torch
from bases import make_base
from safetensors.torch import load_file

from ip2p.base.errors import ModelError
from ip2p.models import bundle
from ip2p.models.base import load_base, new_from_config, prediction_of
from ip2p.models.export import export_file
from ip2p.models.load import open_model
from ip2p.models.text import encode_prompt


@pytest.fixture(scope="module")
def bases(sd1_dir, sd2_dir, xl_dir, tmp_path_factory):
    """Folders with a small SD 1.x, SD 2.x and SDXL base model, by name. Read-only."""
    folder = tmp_path_factory.mktemp("bases")
    editors = {"SD 1.x": sd1_dir, "SD 2.x": sd2_dir, "SDXL": xl_dir}
    return {name: make_base(editor, folder / name) for name, editor in editors.items()}


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def copy(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "kind", "prediction"),
    [("SD 1.x", "sd", "epsilon"), ("SD 2.x", "sd", "v_prediction"), ("SDXL", "sdxl", "epsilon")],
)
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_stable_diffusion_base_is_widened_when_loaded_from_either_layout(
    bases, tmp_path, name, kind, prediction, layout
):
    folder = path = bases[name]
    if layout == "file":
        path = tmp_path / "base.safetensors"
        export_file(open_model(folder), path)
    base = load_base(path)
    assert (base.kind, base.widened, base.unet.config.in_channels) == (kind, True, 8)
    assert prediction_of(base) == prediction
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for weight, value in base.unet.state_dict().items():
        original = value[:, :4] if weight == "conv_in.weight" else value
        assert torch.equal(original, stored[weight]), weight


def test_an_editor_is_loaded_unchanged(tiny_model_dir):
    base = load_base(tiny_model_dir)
    assert not base.widened
    stored = load_file(tiny_model_dir / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in base.unet.state_dict().items())


def test_only_the_unet_is_trainable_and_training_does_not_change_the_files(copy):
    for path in copy.rglob("*.safetensors"):
        path.chmod(0o400)
    before = {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    base = load_base(copy)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in base.unet.parameters())
    for network in (base.vae, base.text_encoder):
        assert not any(p.requires_grad for p in network.parameters())
        assert not network.training and network.dtype == torch.float32
    optimizer = torch.optim.AdamW(base.unet.parameters(), lr=0.1)
    sum(p.square().sum() for p in base.unet.parameters()).backward()
    optimizer.step()
    assert before == {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    again = load_base(copy).unet
    assert not torch.equal(again.conv_in.weight, base.unet.conv_in.weight)


def test_truncating_the_file_after_loading_does_not_change_the_unets_weights(copy):
    base = load_base(copy)
    kept = base.unet.conv_in.weight.detach().clone()
    with open(copy / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.truncate(100)  # reading it through a memory map would now kill the process
    assert torch.equal(base.unet.conv_in.weight, kept)


@pytest.mark.parametrize(
    ("channels", "words"), [(9, "takes 9 channels, as those for inpainting do"), (5, "takes 5 channels;")]
)
def test_a_base_with_other_input_channels_is_refused(copy, channels, words):
    change(copy / "unet" / "config.json", in_channels=channels)
    with pytest.raises(ModelError, match=words + ".*4 .Stable Diffusion. or 8 .an editor.*--base"):
        load_base(copy)


def test_a_hub_name_and_revision_are_passed_to_snapshot_download(monkeypatch, bases):
    asked = []

    def snapshot_download(name, **more):
        asked.append((name, more["revision"]))
        return str(bases["SD 1.x"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    base = load_base("someone/stable-diffusion", revision="v1")
    assert base.widened and base.card.name == "someone/stable-diffusion"
    assert asked == [("someone/stable-diffusion", "v1")]


def test_unsupported_bases_are_refused_in_one_line(copy, xl_dir, tmp_path):
    scheduler = copy / "scheduler" / "scheduler_config.json"
    change(scheduler, prediction_type="flow_prediction")
    refusal = "prediction_type is 'flow_prediction'; epsilon, v_prediction and sample"
    with pytest.raises(ModelError, match=refusal) as caught:
        load_base(copy)
    change(scheduler, prediction_type="epsilon", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ModelError, match="is a flow model"):
        load_base(copy)
    cosxl = shutil.copytree(xl_dir, tmp_path / "cosxl")
    change(cosxl / "model_index.json", is_cosxl_edit=True)
    with pytest.raises(ModelError, match="is a CosXL model, whose noise levels"):
        load_base(cosxl)
    change(
        cosxl / "scheduler" / "scheduler_config.json",
        **{"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"},
    )
    with pytest.raises(ModelError, match="is a CosXL model") as caught:
        load_base(cosxl)
    assert "\n" not in str(caught.value)


def test_load_bundle_refuses_a_base_model(bases):
    with pytest.raises(ModelError, match=r"4 channels; an editor needs 8\. Train one: ip2p train --base"):
        bundle.load_bundle(bases["SDXL"])


# --- a randomly initialized UNet ---------------------------------------------------------------

SMALL = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


@pytest.mark.parametrize(("parts", "features"), [("editor", 32), ("SD 1.x", 64)])
def test_a_random_unet_takes_the_other_components_from_a_model(
    tiny_model_dir, bases, tmp_path, parts, features
):
    folder = tiny_model_dir if parts == "editor" else bases[parts]
    config = SMALL | {"cross_attention_dim": features, "_name_or_path": "/home/someone"}
    (tmp_path / "unet.json").write_text(json.dumps(config))
    one = new_from_config(config, folder, seed=5)
    two = new_from_config(tmp_path / "unet.json", folder, seed=5)
    other = new_from_config(config, folder, seed=6)
    assert one.unet.config.in_channels == 8 and not one.widened
    assert one.card.native_size == 8 * one.latent_factor
    weights = one.unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in two.unet.state_dict().items())
    assert not torch.equal(weights["conv_in.weight"], other.unet.state_dict()["conv_in.weight"])
    assert weights["conv_in.weight"][:, 4:].std() > 0.01
    assert all(p.requires_grad for p in one.unet.parameters())
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in one.vae.state_dict().items())
    hidden = encode_prompt(one, "make it night", (64, 64)).hidden
    sample = one.unet(torch.zeros(1, 8, 8, 8), torch.tensor([3]), hidden).sample
    assert sample.shape == (1, 4, 8, 8) and sample.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"in_channels": 4},
        {"out_channels": 8},
        {"cross_attention_dim": 48},
        {"_class_name": "UNet2DModel"},
        {"addition_embed_type": "text_time"},
        {"block_out_channels": [30, 64]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_an_incompatible_unet_config_is_refused(tiny_model_dir, wrong):
    config = SMALL | {"cross_attention_dim": 32} | wrong
    with pytest.raises(ModelError) as caught:
        new_from_config(config, tiny_model_dir)
    assert "\n" not in str(caught.value)
    assert next(iter(wrong)) in str(caught.value) or "config" in str(caught.value)


def test_initializing_a_unet_does_not_change_the_global_random_state(tiny_model_dir):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    new_from_config(SMALL | {"cross_attention_dim": 32}, tiny_model_dir)
    assert torch.equal(torch.rand(1), expected)
