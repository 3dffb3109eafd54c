"""Round trips between the layouts keep all names, values and configs."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from ip2p.base.errors import InputError, ModelError
from ip2p.models.export import check_target, export_file, export_folder, replacing_folder
from ip2p.models.load import LEFTOVERS, open_model


def weights(path: Path):
    return {file.relative_to(path): safetensors.torch.load_file(file) for file in path.rglob("*.safetensors")}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def assert_same_folders(one: Path, other: Path):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for file in ours:
        assert_same_weights(ours[file], theirs[file])
    for file in one.rglob("*.json"):
        theirs_file = other / file.relative_to(one)
        assert json.loads(file.read_text()) == json.loads(theirs_file.read_text()), file
    assert {p.relative_to(one) for p in one.rglob("*")} == {p.relative_to(other) for p in other.rglob("*")}


@pytest.mark.parametrize("name", ["tiny_model_dir", "sd1_dir", "sd2_dir", "xl_dir"])
def test_folder_to_file_and_back_is_exact(request, tmp_path, name):
    folder = request.getfixturevalue(name)
    export_file(open_model(folder), tmp_path / "model.safetensors")
    export_folder(open_model(tmp_path / "model.safetensors"), tmp_path / "back")
    assert_same_folders(folder, tmp_path / "back")
    # A second file is byte-identical to the first.
    export_file(open_model(tmp_path / "back"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["sd1_dir", "sd2_dir", "xl_dir"])
def test_file_to_folder_and_back_is_exact(request, tmp_path, name):
    folder = request.getfixturevalue(name)
    export_file(open_model(folder), tmp_path / "first.safetensors")
    state = safetensors.torch.load_file(tmp_path / "first.safetensors")
    # Extra tensors of the published files.
    state |= {"betas": torch.arange(1000.0), "alphas_cumprod": torch.rand(1000)}
    if name == "sd2_dir":
        block = "cond_stage_model.model.transformer.resblocks."
        last = {k.replace(f"{block}1.", f"{block}2."): v + 1 for k, v in state.items() if f"{block}1." in k}
        state |= last | {"cond_stage_model.model.text_projection": torch.rand(64, 64)}
    elif name == "xl_dir":
        state |= {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6)}
    else:
        ids = torch.arange(77)[None]
        state |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": ids}
    (tmp_path / "one").mkdir()
    safetensors.torch.save_file(state, tmp_path / "one" / "model.safetensors")
    for tokenizer in folder.glob("tokenizer*"):
        shutil.copytree(tokenizer, tmp_path / "one" / tokenizer.name)
    export_folder(open_model(tmp_path / "one" / "model.safetensors"), tmp_path / "folder")
    assert (tmp_path / "folder" / LEFTOVERS).exists()
    export_file(open_model(tmp_path / "folder"), tmp_path / "back.safetensors")
    assert_same_weights(state, safetensors.torch.load_file(tmp_path / "back.safetensors"))


@pytest.mark.parametrize("name", ["sd1_dir", "xl_dir"])
def test_a_written_folder_opens_in_diffusers(request, tmp_path, name):
    """Oracle: diffusers' pipelines load the converted folder."""
    import diffusers

    folder = request.getfixturevalue(name)
    export_file(open_model(folder), tmp_path / "model.safetensors")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")  # without our header
    for tokenizer in folder.glob("tokenizer*"):
        shutil.copytree(tokenizer, tmp_path / tokenizer.name)
    export_folder(open_model(tmp_path / "model.safetensors"), tmp_path / "folder")
    xl = "XL" if name == "xl_dir" else ""
    kind = getattr(diffusers, f"StableDiffusion{xl}InstructPix2PixPipeline")
    kwargs = {"add_watermarker": False} if xl else {}
    ours = kind.from_pretrained(tmp_path / "folder", **kwargs)
    theirs = kind.from_pretrained(folder, **kwargs)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if xl else [])):
        assert_same_weights(getattr(ours, part).state_dict(), getattr(theirs, part).state_dict())


def test_a_single_file_of_the_storybook_model_gives_identical_edits(tmp_path, page):
    from ip2p.editing.editor import Editor
    from ip2p.models.bundle import packaged_models

    if "storybook" not in packaged_models():
        pytest.skip("the storybook model is not in this installation")
    from ip2p.models.bundle import find_model

    export_file(open_model(find_model("storybook")), tmp_path / "storybook.safetensors")
    results = []
    for model in ("storybook", tmp_path / "storybook.safetensors"):
        editor = Editor.load(model, device="cpu", dtype="fp32")
        results.append(editor.edit(page, "make it night", steps=3)[0])
        card = editor.bundle.card
        assert (card.name, card.native_size, card.known_psnr) == (
            "storybook",
            editor.bundle.unet.config.sample_size * editor.bundle.latent_factor,
            card.known_psnr,
        )
    assert results[0].tobytes() == results[1].tobytes()
    assert results[0].info["parameters"] == results[1].info["parameters"]


def test_a_missing_weight_is_an_error_before_anything_is_written(sd1_dir, tmp_path):
    folder = shutil.copytree(sd1_dir, tmp_path / "broken")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    state.pop("encoder.conv_in.bias")
    safetensors.torch.save_file(state, path)
    with pytest.raises(ModelError, match=r"lacks 1 weights, encoder\.conv_in\.bias"):
        export_file(open_model(folder), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 weights, encoder\.conv_in\.bias"):
        export_folder(open_model(folder), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "model_index.json").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(target) as temporary:
        (temporary / "model_index.json").write_text("new")
        raise RuntimeError
    assert (target / "model_index.json").read_text() == "old"
    with replacing_folder(target) as temporary:
        (temporary / "model_index.json").write_text("new")
    assert (target / "model_index.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_invalid_targets_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "home.txt").write_text("")
    (tmp_path / "a.safetensors").write_text("")
    for name, overwrite, words in (
        ("model.ckpt", False, "would be a pickle.*write .*model.safetensors"),
        ("file", True, "is a file; name a folder"),
        ("letters", False, "is there already; add --overwrite"),
        ("letters", True, "holds other things than a model"),
        ("a.safetensors", False, "already exists"),
    ):
        with pytest.raises(InputError, match=words):
            check_target(tmp_path / name, overwrite=overwrite)
    check_target(tmp_path / "new" / "model", overwrite=False)
    check_target(tmp_path / "a.safetensors", overwrite=True)


def test_the_safetensors_library_reads_an_exported_file(sd1_dir, tmp_path):
    """Oracle: the safetensors library checks that a file is complete and has no holes."""
    export_file(open_model(sd1_dir), tmp_path / "model.safetensors", dtype=torch.bfloat16)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
        assert file.get_tensor("model.diffusion_model.out.2.bias").dtype == torch.bfloat16
        attention = "first_stage_model.decoder.mid.attn_1.q.weight"
        assert file.get_slice(attention).get_shape() == [64, 64, 1, 1]


@pytest.mark.parametrize("channels", [4, 8])
def test_an_sd1_v_prediction_file_warns_and_gets_an_automatic1111_config(tmp_path, channels):
    import yaml
    from conftest import make_sd_model

    folder = make_sd_model(tmp_path / "v", prediction="v_prediction", in_channels=channels)
    stored = open_model(folder)
    with pytest.warns(UserWarning, match=r"predicts velocity.*model\.yaml beside it tells AUTOMATIC1111"):
        export_file(stored, tmp_path / "model.safetensors")
    model = yaml.safe_load((tmp_path / "model.yaml").read_text())["model"]
    unet = model["params"]["unet_config"]["params"]
    assert model["params"]["parameterization"] == "v" and unet["in_channels"] == channels
    assert model["target"].endswith("ddpm_edit.LatentDiffusion" if channels == 8 else "ddpm.LatentDiffusion")
    config = stored.configs["unet"]
    assert [unet["model_channels"] * each for each in unet["channel_mult"]] == config["block_out_channels"]
    assert unet["context_dim"] == config["cross_attention_dim"]


def test_an_x0_prediction_file_warns_and_keeps_its_scheduler_config(tmp_path):
    from conftest import make_sd_model

    stored = open_model(make_sd_model(tmp_path / "x0", prediction="sample", in_channels=8))
    with pytest.warns(UserWarning, match="predicts the picture itself.*Only ip2p and diffusers"):
        export_file(stored, tmp_path / "model.safetensors")
    back = open_model(tmp_path / "model.safetensors")
    assert back.configs["scheduler"] == stored.configs["scheduler"]
    assert back.configs["scheduler"]["prediction_type"] == "sample"


def test_an_epsilon_prediction_file_gets_no_yaml_config_and_no_warning(sd1_dir, tmp_path, recwarn):
    export_file(open_model(sd1_dir), tmp_path / "model.safetensors")
    assert not (tmp_path / "model.yaml").exists() and not recwarn
