"""Single files in the LDM layout: how they are read, and which are refused."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ip2p.base.errors import InputError, ModelError
from ip2p.models import keys
from ip2p.models.bundle import find_model, load_bundle
from ip2p.models.export import export_file
from ip2p.models.load import open_model

FOLDERS = ("sd1_dir", "sd2_dir", "xl_dir")


class Bomb:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="session")
def bare(tmp_path_factory, request):
    """A folder's model as other tools write it: one file without our header, next to its tokenizers."""
    paths = {}

    def get(name: str) -> Path:
        if name not in paths:
            folder = request.getfixturevalue(name)
            place = tmp_path_factory.mktemp(name)
            export_file(open_model(folder), place / "whole.safetensors")
            state = safetensors.torch.load_file(place / "whole.safetensors")
            (place / "whole.safetensors").unlink()
            if name == "sd2_dir":  # as other tools mark it
                state["v_pred"] = torch.zeros(0)
            safetensors.torch.save_file(state, place / "model.safetensors")
            for tokenizer in folder.glob("tokenizer*"):
                shutil.copytree(tokenizer, place / tokenizer.name)
            paths[name] = place / "model.safetensors"
        return paths[name]

    return get


def assert_same_networks(one, other):
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, its = getattr(one, part), getattr(other, part)
        assert (mine is None) == (its is None)
        if mine is not None:
            mine, its = mine.state_dict(), its.state_dict()
            assert list(mine) == list(its)
            assert all(torch.equal(mine[name], its[name]) for name in mine), part


@pytest.mark.parametrize("name", FOLDERS)
def test_a_single_file_from_other_tools_loads_like_the_folder(bare, request, name):
    file, folder = load_bundle(bare(name)), load_bundle(request.getfixturevalue(name))
    assert_same_networks(file, folder)
    assert file.kind == folder.kind
    assert (file.latent_scale, file.latent_factor) == (folder.latent_scale, folder.latent_factor)
    prediction = "v_prediction" if name == "sd2_dir" else "epsilon"
    assert file.scheduler_config["prediction_type"] == prediction
    for part in ("unet", "text_encoder"):
        ours, theirs = getattr(file, part).config, getattr(folder, part).config
        for number in ("attention_head_dim", "num_attention_heads", "hidden_act", "addition_time_embed_dim"):
            one, other = getattr(ours, number, None), getattr(theirs, number, None)
            assert (list(one) if isinstance(one, list | tuple) else one) == (
                list(other) if isinstance(other, list | tuple) else other
            )
    words = "make it night"
    assert file.tokenizer(words)["input_ids"] == folder.tokenizer(words)["input_ids"]
    assert file.card.name == "model"


def write_checkpoint(state, path, **more):
    """Write a .ckpt like the original trainer; the UNet's EMA weights are its weights plus 1."""
    ema_weights = {keys.ema_name(key): value + 1 for key, value in state.items() if key.startswith(keys.UNET)}
    rest = {"model_ema.decay": torch.tensor(0.9999), "betas": torch.zeros(1000)}
    torch.save({"state_dict": state | ema_weights | rest, "global_step": 22000, **more}, path)


def test_ema_weights_are_the_default_and_are_exported_under_the_plain_names(bare, tmp_path):
    state = safetensors.torch.load_file(bare("sd1_dir"))
    shutil.copytree(bare("sd1_dir").parent / "tokenizer", tmp_path / "tokenizer")
    write_checkpoint(state, tmp_path / "model.ckpt")
    plain = state["model.diffusion_model.input_blocks.0.0.bias"]
    assert torch.equal(load_bundle(tmp_path / "model.ckpt").unet.conv_in.bias, plain + 1)
    assert torch.equal(load_bundle(tmp_path / "model.ckpt", weights="plain").unet.conv_in.bias, plain)
    count = sum(key.startswith(keys.UNET) for key in state)
    assert open_model(tmp_path / "model.ckpt").ema == count + 1  # and the decay
    # EMA weights are exported under the names that other tools read.
    export_file(open_model(tmp_path / "model.ckpt"), tmp_path / "ema.safetensors")
    found = safetensors.torch.load_file(tmp_path / "ema.safetensors")
    assert torch.equal(found["model.diffusion_model.input_blocks.0.0.bias"], plain + 1)
    assert not any(key.startswith("model_ema") for key in found)
    assert found["betas"].shape == (1000,)


def test_a_file_without_ema_weights_gives_its_plain_weights(bare):
    state = safetensors.torch.load_file(bare("sd1_dir"))
    unet = load_bundle(bare("sd1_dir"), weights="ema").unet
    assert torch.equal(unet.conv_in.bias, state["model.diffusion_model.input_blocks.0.0.bias"])


def test_older_text_encoder_names_are_read(bare, tmp_path, sd1_dir):
    state = safetensors.torch.load_file(bare("sd1_dir"))
    old = {key.replace(keys.CLIP + "text_model.", keys.CLIP): value for key, value in state.items()}
    assert old.keys() != state.keys()
    shutil.copytree(bare("sd1_dir").parent / "tokenizer", tmp_path / "tokenizer")
    torch.save(old, tmp_path / "old.ckpt")  # without state_dict, like pruned checkpoints
    assert_same_networks(load_bundle(tmp_path / "old.ckpt"), load_bundle(sd1_dir))


def test_a_checkpoint_in_the_format_before_torch_1_6_is_read(tmp_path):
    from ip2p.models.load import open_weights

    weight = {"weight": torch.randn(3)}
    torch.save({"state_dict": weight}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(open_weights(tmp_path / "old.ckpt").read("weight"), weight["weight"])


def test_a_pickle_without_weights_is_refused(tmp_path):
    for number, value in enumerate((3, {"state_dict": 3}, {"state_dict": {}}, [torch.zeros(1)])):
        torch.save(value, tmp_path / f"{number}.ckpt")
        with pytest.raises(ModelError, match="holds no weights by name"):
            load_bundle(tmp_path / f"{number}.ckpt")


def test_trainer_objects_in_a_checkpoint_are_ignored(bare, tmp_path, sd1_dir):
    import sys
    import types

    import numpy as np

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind
    sys.modules[module.__name__] = module
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        sys.modules.setdefault(name, types.ModuleType(name))
    try:
        callbacks = {"callbacks": {kind: {"best": np.float64(0.5), "last": kind()}}}
        shutil.copytree(bare("sd1_dir").parent / "tokenizer", tmp_path / "tokenizer")
        torch.save(
            {"state_dict": safetensors.torch.load_file(bare("sd1_dir")), **callbacks}, tmp_path / "m.ckpt"
        )
    finally:
        for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
            del sys.modules[name]
    assert_same_networks(load_bundle(tmp_path / "m.ckpt"), load_bundle(sd1_dir))


def write_malicious(kind, path, marker):
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Bomb(marker)}))
    elif kind == "torch":
        torch.save({"state_dict": {"weight": torch.zeros(2)}, "more": Bomb(marker)}, path)
    elif kind == "os":
        path.write_bytes(b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(marker)))
            archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("kind", ["pickle", "torch", "os", "zip"])
@pytest.mark.parametrize("ending", [".ckpt", ".pt"])
def test_nothing_in_a_malicious_checkpoint_is_executed(tmp_path, kind, ending):
    marker, path = tmp_path / "made", tmp_path / f"model{ending}"
    write_malicious(kind, path, marker)
    with pytest.raises(ModelError, match="is a pickle that .*nothing in it was run") as error:
        load_bundle(path)
    assert error.value.code == 3
    assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "page"])
def test_a_damaged_file_is_reported_in_one_line(bare, tmp_path, ending, damage):
    path = tmp_path / f"model{ending}"
    if ending == ".ckpt":
        buffer = io.BytesIO()
        torch.save({"state_dict": {"weight": torch.zeros(1000)}}, buffer)
        data = buffer.getvalue()
    else:
        data = bare("sd1_dir").read_bytes()
    page = b"<!DOCTYPE html><html><body>Not found</body></html>"
    contents = {"cut": data[: len(data) // 2], "noise": b"\xff" * 100, "empty": b"", "page": page}
    path.write_bytes(contents[damage])
    with pytest.raises(ModelError, match=r"model\.(ckpt|safetensors)") as error:
        load_bundle(path)
    assert "\n" not in str(error.value)


def test_a_single_file_with_4_input_channels_is_not_an_editor(bare, tmp_path):
    state = safetensors.torch.load_file(bare("sd1_dir"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = state[first][:, :4].contiguous()
    safetensors.torch.save_file(state, tmp_path / "base.safetensors")
    message = r"takes 4 channels; an editor needs 8\. Train one: ip2p train --base .*base\.safetensors"
    with pytest.raises(ModelError, match=message):
        load_bundle(tmp_path / "base.safetensors")


def test_a_file_that_is_not_a_model_is_refused(tmp_path):
    safetensors.torch.save_file({"lora_unet.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="is no model that can be read.*no text encoder"):
        load_bundle(tmp_path / "lora.safetensors")


def test_a_missing_weight_is_named(bare, tmp_path):
    state = safetensors.torch.load_file(bare("sd1_dir"))
    state.pop("first_stage_model.decoder.conv_in.bias")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    shutil.copytree(bare("sd1_dir").parent / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(ModelError, match=r"lacks 1 weights, first_stage_model\.decoder\.conv_in\.bias first"):
        load_bundle(tmp_path / "model.safetensors")


def test_cosxl_is_recognized_by_its_noise_levels(bare, tmp_path):
    state = safetensors.torch.load_file(bare("xl_dir"))
    state |= {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    safetensors.torch.save_file(state, tmp_path / "cosxl.safetensors")
    for tokenizer in bare("xl_dir").parent.glob("tokenizer*"):
        shutil.copytree(tokenizer, tmp_path / tokenizer.name)
    bundle = load_bundle(tmp_path / "cosxl.safetensors")
    assert bundle.condition_scale == pytest.approx(0.13025)
    assert bundle.scheduler_config["_class_name"] == "EDMEulerScheduler"
    assert bundle.scheduler_config["sigma_max"] == 120.0
    from ip2p.editing.editor import Editor

    assert Editor(bundle).schedule.logarithmic


def test_a_file_without_a_tokenizer_is_refused_or_needs_clips(bare, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copy(bare("sd1_dir"), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="brings no tokenizer, and its .* words are not CLIP's"):
        load_bundle(tmp_path / "model.safetensors")
    from dataclasses import replace

    from ip2p.models.load import tokenizer_texts

    stored = open_model(tmp_path / "model.safetensors")
    text = stored.configs["text_encoder"] | {"vocab_size": 49408}
    stored = replace(stored, configs=stored.configs | {"text_encoder": text})
    with pytest.raises(
        ModelError, match="needs CLIP's tokenizer.*Fetch it: hf download openai/clip-vit-large-patch14 vocab"
    ):
        tokenizer_texts(stored)


def test_openclips_tokenizer_pads_with_exclamation_marks(xl_dir):
    from ip2p.models.load import _for_openclip, texts_of, tokenizer_from_texts

    texts = texts_of(xl_dir / "tokenizer")
    plain = tokenizer_from_texts(texts, xl_dir)
    assert plain.convert_ids_to_tokens(plain.pad_token_id) == "<|endoftext|>"
    changed = tokenizer_from_texts(_for_openclip(texts), xl_dir)
    assert (changed.pad_token, changed.eos_token) == ("!", "<|endoftext|>")
    ids = changed("make it night", padding="max_length")["input_ids"]
    assert ids[-1] == changed.convert_tokens_to_ids("!")
    assert ids[:5] == plain("make it night")["input_ids"][:5]


def test_modifying_loaded_weights_does_not_change_the_file(bare):
    path = bare("sd1_dir")
    before = path.read_bytes()
    for weight in load_bundle(path).unet.parameters():
        weight.add_(1)
    assert path.read_bytes() == before


def test_half_precision_weights_are_loaded_exactly(bare, tmp_path):
    export_file(open_model(bare("sd1_dir")), tmp_path / "half.safetensors", dtype=torch.float16)
    state = safetensors.torch.load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    bundle = load_bundle(tmp_path / "half.safetensors", dtype=torch.float16)
    assert torch.equal(bundle.unet.conv_in.weight, state["model.diffusion_model.input_blocks.0.0.weight"])


def test_sdxl_autoencoders_stay_in_fp32(xl_dir):
    bundle = load_bundle(xl_dir, dtype=torch.float16)
    assert (bundle.unet.dtype, bundle.text_encoder_2.dtype, bundle.vae.dtype) == (
        torch.float16,
        torch.float16,
        torch.float32,
    )


def test_a_folder_with_only_fp16_files_is_read(sd1_dir, tmp_path):
    folder = shutil.copytree(sd1_dir, tmp_path / "half")
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.stem + ".fp16.safetensors"))
    assert_same_networks(load_bundle(folder), load_bundle(sd1_dir))


# --- another autoencoder ---


def save_random_vae(folder, scale=0.18215):
    from conftest import make_vae

    torch.manual_seed(9)
    vae = make_vae(scale, 512)
    vae.save_pretrained(folder)
    return vae.state_dict()


def test_a_replacement_autoencoder_is_read_from_a_folder_a_model_or_a_file(sd1_dir, bare, tmp_path):
    expected = save_random_vae(tmp_path / "vae")
    ldm = {
        key: make().contiguous()
        for key, make in keys.to_ldm(
            keys.vae_table(list(expected), {"block_out_channels": (32, 32, 64)}, ""), expected.__getitem__
        )
    }
    safetensors.torch.save_file(ldm, tmp_path / "bare.safetensors")
    torch.save({"state_dict": {keys.VAE + k: v for k, v in ldm.items()}}, tmp_path / "vae.ckpt")
    for vae in ("vae", ".", "bare.safetensors", "vae.ckpt", "vae/diffusion_pytorch_model.safetensors"):
        bundle = load_bundle(sd1_dir, vae=tmp_path / vae)
        found = bundle.vae.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), vae
        assert bundle.latent_scale == 0.18215
    assert not torch.equal(
        load_bundle(sd1_dir).vae.encoder.conv_in.weight, expected["encoder.conv_in.weight"]
    )


def test_an_incompatible_or_missing_autoencoder_is_refused(sd1_dir, xl_dir, tmp_path):
    with pytest.raises(ModelError, match=r"other latents than the model's.*0\.13025.*made for SD 1\.x"):
        load_bundle(sd1_dir, vae=xl_dir)
    with pytest.raises(ModelError, match="no such file"):
        load_bundle(sd1_dir, vae=tmp_path / "none.safetensors")


# --- the hub ---


def test_a_revision_is_valid_only_with_a_hub_name(sd1_dir, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(name, *, local_files_only, revision=None, **_):
        asked.append(revision)
        return str(sd1_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_model("some/model", revision="v2") == sd1_dir
    assert asked == ["v2"]
    with pytest.raises(InputError, match="is not a hub name, so it has no --revision v2"):
        find_model(sd1_dir, revision="v2")


def test_the_offline_download_command_includes_the_revision(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"Fetch it: hf download some/model --revision v2$"):
        find_model("some/model", revision="v2")


def test_an_invalid_ip2p_header_is_refused(bare, tmp_path):
    state = safetensors.torch.load_file(bare("sd1_dir"))
    for entry in ("{", json.dumps([1]), json.dumps({"configs": {"unet": {}}})):
        safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"ip2p": entry})
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            load_bundle(tmp_path / "model.safetensors")
