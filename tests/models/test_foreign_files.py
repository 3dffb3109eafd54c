"""Models from elsewhere: merges, partial files, trainers' pickles, single components, other families."""

import argparse
import collections
import contextlib
import json
import pathlib
import pickle
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
import safetensors.torch
import torch

from ip2p.base.errors import ModelError
from ip2p.models import families, keys
from ip2p.models.bundle import find_model, load_bundle, open_parts
from ip2p.models.export import export_file, export_folder
from ip2p.models.load import open_model, open_weights

INPUT = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def plain(sd1_dir, tmp_path_factory):
    """The weights of a small SD 1.x editor as other tools write them, without a header."""
    path = tmp_path_factory.mktemp("plain") / "model.safetensors"
    export_file(open_model(sd1_dir), path)
    return safetensors.torch.load_file(path)


@pytest.fixture
def place(sd1_dir, tmp_path):
    """A folder for single files, with a tokenizer."""
    shutil.copytree(sd1_dir / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def ema_copies(state, change):
    return {keys.ema_name(key): change(value) for key, value in state.items() if key.startswith(keys.UNET)}


def perturbed(value):
    return value + 0.01 * value.std(correction=0) * torch.randn_like(value)


def half_blended(value):
    return 0.5 * (value + value.std(correction=0) * torch.randn_like(value))


# --- EMA weights ---


def test_valid_ema_weights_are_used_and_their_distance_is_reported(plain, place, caplog):
    torch.manual_seed(0)
    path = place / "model.safetensors"
    averaged = ema_copies(plain, perturbed)
    safetensors.torch.save_file(plain | averaged, path)
    with caplog.at_level("INFO", logger="ip2p"):
        stored = open_model(path)
    assert stored.averaged and "1.0%" in stored.choice and "are used; they are 1.0% from" in caplog.text
    unet = load_bundle(path).unet
    assert torch.equal(unet.conv_in.weight, averaged[keys.ema_name(INPUT)])


@pytest.mark.parametrize("blocks", ["", "output_blocks"])
def test_stale_ema_weights_of_a_merge_are_not_used(plain, place, blocks):
    """This includes merges of only some blocks."""
    torch.manual_seed(0)
    path = place / "merge.safetensors"
    merged = {
        key: half_blended(value) if value.ndim > 1 and blocks in key else value
        for key, value in plain.items()
    }
    stale = ema_copies(plain, lambda value: value.clone())
    safetensors.torch.save_file(merged | stale, path)
    with pytest.warns(UserWarning, match=r"plain weights are used: the averaged .* away.*another model's"):
        unet = load_bundle(path).unet
    assert torch.equal(unet.conv_in.weight, merged[INPUT])
    forced = load_bundle(path, weights="ema").unet
    assert torch.equal(forced.conv_in.weight, stale[keys.ema_name(INPUT)])


@pytest.mark.parametrize("entry", ["sd_merge_recipe", "modelspec.merged_from"])
def test_ema_weights_of_a_declared_merge_are_not_used_even_if_they_are_close(plain, place, entry):
    torch.manual_seed(0)
    path = place / "merge.safetensors"
    safetensors.torch.save_file(
        plain | ema_copies(plain, perturbed), path, metadata={entry: '{"type": "webui"}'}
    )
    with pytest.warns(UserWarning, match=f"plain weights are used: the header says .* a merge .{entry}"):
        unet = load_bundle(path).unet
    assert torch.equal(unet.conv_in.weight, plain[INPUT])
    assert not torch.equal(load_bundle(path, weights="ema").unet.conv_in.weight, plain[INPUT])


@pytest.mark.parametrize("choice", ["auto", "ema"])
@pytest.mark.parametrize("fault", ["partial", "other shape"])
def test_incomplete_ema_weights_fall_back_to_the_plain_weights(plain, place, fault, choice):
    path = place / "model.safetensors"
    averaged = ema_copies(plain, lambda value: value.clone())
    if fault == "partial":
        averaged = dict(list(averaged.items())[:9])
    else:
        averaged[keys.ema_name(INPUT)] = averaged[keys.ema_name(INPUT)][:, :4].contiguous()
    safetensors.torch.save_file(plain | averaged, path)
    with pytest.warns(UserWarning, match="plain weights are used: .*missing or of another shape, model"):
        unet = load_bundle(path, weights=choice).unet
    assert torch.equal(unet.conv_in.weight, plain[INPUT])


def test_a_file_with_only_ema_unet_weights_is_refused(plain, place):
    path = place / "model.safetensors"
    rest = {key: value for key, value in plain.items() if not key.startswith(keys.UNET)}
    stored_names = {INPUT: plain[INPUT]}  # a UNet is recognized by its plain names
    safetensors.torch.save_file(rest | stored_names | ema_copies(plain, torch.clone), path)
    with pytest.raises(ModelError, match="no model that can be read|lacks"):
        load_bundle(path)


# --- pickles ---


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_of_bin_files_loads_like_the_safetensors_folder(sd1_dir, tmp_path, shards):
    folder = shutil.copytree(sd1_dir, tmp_path / "bins")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        state = safetensors.torch.load_file(folder / part / f"{stem}.safetensors")
        (folder / part / f"{stem}.safetensors").unlink()
        names = list(state)
        for number in range(shards):
            ending = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
            shard = {name: state[name] for name in names[number::shards]}
            torch.save(shard, folder / part / f"{stem}{ending}.bin")
    text = folder / "text_encoder" / "model.safetensors"
    torch.save(safetensors.torch.load_file(text), folder / "text_encoder" / "pytorch_model.bin")
    text.unlink()
    (folder / "unet" / "optimizer.bin").write_bytes(b"no weights")
    ours, theirs = load_bundle(folder), load_bundle(sd1_dir)
    for part in ("unet", "vae", "text_encoder"):
        mine, its = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert all(torch.equal(mine[name], its[name]) for name in its)


@pytest.fixture
def leftovers(monkeypatch):
    """Objects that trainers such as Lightning leave in a checkpoint; tests unload their modules."""
    modules = {}
    for name in ("omegaconf", "lightning", "lightning.pytorch"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        modules[name] = module

    class AttributeDict(dict):
        pass

    class ListConfig(list):
        def __getstate__(self):
            return {"_content": [1, 2], "_metadata": None}

    class Callback:
        def __init__(self):
            self.best, self.path = np.float64(0.5), pathlib.PosixPath("/a/b")

    class Scheduler:
        def __call__(self, step):
            return step

    for kind, module in (
        (AttributeDict, "lightning.pytorch"),
        (ListConfig, "omegaconf"),
        (Callback, "lightning"),
        (Scheduler, "lightning"),
    ):
        kind.__module__, kind.__qualname__ = module, kind.__name__
        setattr(modules[module], kind.__name__, kind)
    counted = collections.defaultdict(list, {"a": [1]})
    yield {
        "hyper_parameters": AttributeDict(lr=1e-4, lr_scheduler=Scheduler()),
        "callbacks": {Callback: Callback(), "Checkpoint{'monitor': None}": {"best": Callback()}},
        "array": np.arange(3.0),
        "scalar": np.float32(1),
        "list": ListConfig([1, 2]),
        "arguments": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("x")),
        "counts": counted,
        "recent": collections.deque([1, 2]),
        "set": {1, 2},
        "kind": complex,
        "slice": slice(1, 2),
    }


@pytest.mark.parametrize("old", [False, True])
def test_trainer_objects_in_a_checkpoint_are_ignored_and_their_modules_not_imported(leftovers, tmp_path, old):
    weights = {"a.weight": torch.randn(3, 4), "a.bias": torch.nn.Parameter(torch.randn(3))}
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 1, "state_dict": weights, **leftovers}, path, _use_new_zipfile_serialization=not old)
    for name in ("omegaconf", "lightning", "lightning.pytorch"):
        del sys.modules[name]
    read = open_weights(path)
    assert set(read.shapes) == set(weights)
    assert all(torch.equal(read.read(name), weights[name]) for name in weights)
    assert "lightning" not in sys.modules and "omegaconf" not in sys.modules


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {"module": {f"_forward_module.{n}": v for n, v in state.items()}}},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    ],
)
def test_the_wrapper_prefixes_of_training_programs_are_removed(plain, place, wrap, ending):
    wrapped = wrap(plain)
    if ending == ".safetensors":
        if not all(isinstance(value, torch.Tensor) for value in wrapped.values()):
            wrapped = {f"module.{name}": value for name, value in plain.items()}
        safetensors.torch.save_file(wrapped, place / "m.safetensors")
    else:
        torch.save(wrapped, place / "m.pt")
    unet = load_bundle(place / f"m{ending}").unet
    assert torch.equal(unet.conv_in.weight, plain[INPUT])


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious_objects(marker):
    import functools
    import os
    import subprocess

    return {
        "system": Bomb(os.system, f"touch {marker}"),
        "popen": Bomb(subprocess.Popen, ["touch", str(marker)]),
        "open": Bomb(open, str(marker), "w"),
        "exec": Bomb(exec, f"open({str(marker)!r}, 'w')"),
        "eval": Bomb(eval, f"open({str(marker)!r}, 'w')"),
        "partial": Bomb(functools.partial(open, str(marker), "w")),
        "path": Bomb(pathlib.Path.touch, pathlib.Path(marker)),
        "numpy": Bomb(np.save, str(marker), 1),
        "torch": Bomb(torch.save, 1, str(marker)),
        "hub": Bomb(torch.hub.load, str(marker.parent), "x"),
        "getattr": Bomb(getattr, pathlib.Path(marker), "touch"),
    }


@pytest.mark.parametrize("kind", list(malicious_objects(pathlib.Path("x"))))
@pytest.mark.parametrize("old", [False, True])
def test_nothing_in_a_malicious_file_is_executed(tmp_path, kind, old):
    marker, path = tmp_path / "made", tmp_path / "model.ckpt"
    value = {"state_dict": {"weight": torch.zeros(2)}, "more": malicious_objects(marker)[kind]}
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    try:
        read = open_weights(path)
    except ModelError as error:
        assert "nothing in it was run" in str(error) or "was not opened" in str(error)
        assert "weights_only" not in str(error) and "\n" not in str(error)
    else:
        assert set(read.shapes) == {"weight"}  # the call became a placeholder
    assert not marker.exists() and not marker.with_suffix(".npy").exists()


def test_a_pickle_cannot_modify_torch_functions(tmp_path):
    before = torch._utils._rebuild_tensor_v2.__dict__.copy()
    body = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00evilK\x01sb."
    path = tmp_path / "model.ckpt"
    path.write_bytes(body)
    with pytest.raises(ModelError):
        open_weights(path)
    assert torch._utils._rebuild_tensor_v2.__dict__ == before


def test_torchscript_programs_and_tar_files_are_refused_with_our_own_message(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        (tmp_path / "sys_info").write_bytes(pickle.dumps({}))
        archive.add(tmp_path / "sys_info", "sys_info")
    for name, what in (("program.pt", "a TorchScript program"), ("old.pth", "a tar file")):
        with pytest.raises(ModelError, match=f"{what}.*was not opened.*safetensors") as error:
            load_bundle(tmp_path / name)
        assert "weights_only" not in str(error.value)


# --- components of models ---


def test_a_file_without_an_autoencoder_loads_with_a_given_one(plain, place, sd1_dir):
    path = place / "model.safetensors"
    safetensors.torch.save_file({k: v for k, v in plain.items() if not k.startswith(keys.VAE)}, path)
    with pytest.raises(ModelError, match="holds no autoencoder. Name one: --vae stabilityai/sd-vae-ft-mse"):
        load_bundle(path)
    for bundle in (load_bundle(path, vae=sd1_dir), load_bundle(path, parts_from=sd1_dir)):
        mine, theirs = bundle.vae.state_dict(), load_bundle(sd1_dir).vae.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert bundle.latent_scale == 0.18215 and torch.equal(bundle.unet.conv_in.weight, plain[INPUT])


@pytest.mark.parametrize("form", ["ldm", "bare", "folder", "diffusers file", "ema"])
@pytest.mark.parametrize("parts", ["folder", "file"])
def test_a_standalone_unet_loads_with_the_components_of_another_model(plain, place, sd1_dir, form, parts):
    unet = {key: value for key, value in plain.items() if key.startswith(keys.UNET)}
    path = place / "unet.safetensors"
    if form == "ldm":
        safetensors.torch.save_file(unet, path)
    elif form == "ema":
        safetensors.torch.save_file(unet | ema_copies(unet, torch.clone), path)
    elif form == "bare":
        safetensors.torch.save_file({k.removeprefix(keys.UNET): v for k, v in unet.items()}, path)
    else:
        shutil.copytree(sd1_dir / "unet", place / "unet")
        path = place / "unet"
        if form == "diffusers file":
            path = place / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match="UNet alone.*--parts-from"):
        load_bundle(path)
    donor = sd1_dir
    if parts == "file":
        donor = place / "donor.safetensors"
        safetensors.torch.save_file(plain, donor)
    bundle, expected = load_bundle(path, parts_from=donor), load_bundle(sd1_dir)
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = getattr(bundle, part).state_dict(), getattr(expected, part).state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), part
    assert bundle.tokenizer("make it")["input_ids"] == expected.tokenizer("make it")["input_ids"]
    export_folder(open_model(path, parts=open_parts(donor)), place / "out")
    assert torch.equal(load_bundle(place / "out").unet.conv_in.weight, plain[INPUT])


def served_editor(path, **settings):
    """The editor that a server loads for a model."""
    from ip2p.serve.app import make_service
    from ip2p.serve.options import ServeConfig

    config = ServeConfig(model=(f"mine={path}",), device="cpu", dtype="fp32", **settings)
    with contextlib.ExitStack() as stack:
        return make_service(config, stack).maker._models["mine"].load()


def test_a_standalone_unet_can_be_served_and_can_generate_pairs(plain, place, sd1_dir):
    from ip2p.synth.pairs import PairMaker

    path = place / "unet.safetensors"
    safetensors.torch.save_file({k: v for k, v in plain.items() if k.startswith(keys.UNET)}, path)
    painter = PairMaker(path, parts_from=sd1_dir, device="cpu", dtype="fp32", steps=1)
    for bundle in (served_editor(path, parts_from=str(sd1_dir)).bundle, painter.editor.bundle):
        assert torch.equal(bundle.unet.conv_in.weight, plain[INPUT])
    with pytest.raises(ModelError, match="UNet alone.*--parts-from"):
        PairMaker(path, device="cpu")


def test_a_file_without_an_autoencoder_can_be_served_with_a_given_one(plain, place, sd1_dir):
    path = place / "model.safetensors"
    safetensors.torch.save_file({k: v for k, v in plain.items() if not k.startswith(keys.VAE)}, path)
    vae = served_editor(path, vae=str(sd1_dir)).bundle.vae
    expected = load_bundle(sd1_dir).vae.state_dict()
    assert all(torch.equal(vae.state_dict()[name], value) for name, value in expected.items())


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize(
    ("channels", "width", "words"),
    [
        (8, 768, "--parts-from stable-diffusion-v1-5/stable-diffusion-v1-5; or make a complete model: "),
        (8, 1024, "--parts-from stabilityai/stable-diffusion-2-1"),
        (8, 2048, "--parts-from stabilityai/stable-diffusion-xl-base-1.0"),
        (4, 1024, "no editor.*ip2p train --base .*--parts-from stabilityai/stable-diffusion-2-1"),
        (9, 768, "an inpainting model, which follows no instructions"),
    ],
)
def test_the_suggested_command_for_a_standalone_unet_fits_its_architecture(
    tmp_path, channels, width, words, form
):
    """A suggested command must not refuse the file."""
    if form == "folder":
        config = {"_class_name": "UNet2DConditionModel", "in_channels": channels}
        (tmp_path / "config.json").write_text(json.dumps(config | {"cross_attention_dim": width}))
        path = tmp_path
    else:
        path = tmp_path / "unet.safetensors"
        text = f"{keys.UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        safetensors.torch.save_file(
            {INPUT: torch.zeros(8, channels, 3, 3), text: torch.zeros(8, width)}, path
        )
    with pytest.raises(ModelError, match=words) as error:
        load_bundle(path)
    assert ("--parts-from" in str(error.value)) == (channels != 9)


def test_the_suggested_training_command_includes_parts_from(plain, place, sd1_dir):
    weight = plain[INPUT][:, :4].contiguous()
    unet = {k: v for k, v in plain.items() if k.startswith(keys.UNET)} | {INPUT: weight}
    safetensors.torch.save_file(unet, place / "unet.safetensors")
    with pytest.raises(ModelError, match=f"ip2p train --base .*unet.safetensors --parts-from {sd1_dir}"):
        load_bundle(place / "unet.safetensors", parts_from=sd1_dir)


def test_a_unet_that_does_not_match_the_other_components_is_refused(plain, place, xl_dir):
    path = place / "unet.safetensors"
    safetensors.torch.save_file({k: v for k, v in plain.items() if k.startswith(keys.UNET)}, path)
    with pytest.raises(ModelError, match="cross_attention_dim.*same kind"):
        load_bundle(path, parts_from=xl_dir)


# --- other families ---


@pytest.mark.parametrize(
    ("channels", "what"), [(9, "inpainting"), (7, "upscaler"), (5, "depth-to-image"), (6, "Use an editor")]
)
def test_unets_with_other_inputs_are_identified_in_the_error(plain, place, channels, what):
    weight = torch.zeros(plain[INPUT].shape[0], channels, 3, 3)
    safetensors.torch.save_file(plain | {INPUT: weight}, place / "other.safetensors")
    with pytest.raises(ModelError, match=what) as error:
        load_bundle(place / "other.safetensors")
    assert f"takes {channels} channels" in str(error.value)
    assert "ip2p train" not in str(error.value)  # it would refuse the file


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("joint_blocks.0.context_block.mlp.fc1.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "Kontext"),
    ],
)
def test_files_of_other_model_families_are_identified_with_tools_that_open_them(tmp_path, key, family):
    safetensors.torch.save_file({key: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"{family}.*Pipeline.*ComfyUI.*ip2p opens SD 1.x"):
        load_bundle(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [
        ("FluxKontextPipeline", "FLUX.1 Kontext"),
        ("FluxPipeline", "FLUX"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("QwenImageEditPipeline", "Qwen-Image"),
    ],
)
def test_folders_of_other_model_families_are_identified_with_their_pipeline(tmp_path, pipeline, family):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (tmp_path / "transformer").mkdir()
    with pytest.raises(ModelError, match=f"This is a {family} model.*Pipeline"):
        load_bundle(tmp_path)
    assert families.of_pipeline("StableDiffusionXLInstructPix2PixPipeline") is None


# --- the hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An offline hub cache: a function that adds a repository to it."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(name, files):
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        for path, source in files.items():
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, snapshot / path)
        return snapshot

    return put


def test_a_repository_with_one_file_in_its_root_resolves_to_that_file(hub, plain, place):
    file = place / "model.safetensors"
    safetensors.torch.save_file(plain, file)
    snapshot = hub("some/cosxl", {"cosxl_edit.safetensors": file})
    assert find_model("some/cosxl") == snapshot / "cosxl_edit.safetensors"
    assert find_model("some/cosxl/cosxl_edit.safetensors") == snapshot / "cosxl_edit.safetensors"
    with pytest.raises(ModelError, match=r"Fetch it: hf download some/cosxl other\.safetensors"):
        find_model("some/cosxl/other.safetensors")


def test_the_editor_among_several_files_is_chosen_or_a_name_is_required(hub, plain, place):
    file = place / "model.safetensors"
    safetensors.torch.save_file(plain, file)
    snapshot = hub("some/two", {"cosxl.safetensors": file, "cosxl_edit.safetensors": file})
    assert find_model("some/two") == snapshot / "cosxl_edit.safetensors"
    hub("some/more", {"a.safetensors": file, "b.safetensors": file})
    with pytest.raises(
        ModelError, match=r"holds a\.safetensors, b\.safetensors. Name one of them: some/more/a"
    ):
        find_model("some/more")


def test_a_repository_of_bin_files_is_found_in_the_cache(hub, sd1_dir, tmp_path):
    folder = shutil.copytree(sd1_dir, tmp_path / "bins")
    for path in list(folder.rglob("*.safetensors")):
        torch.save(safetensors.torch.load_file(path), path.with_suffix(".bin"))
        path.unlink()
    snapshot = hub("some/magicbrush", {name.name: name for name in folder.iterdir()})
    assert find_model("some/magicbrush") == snapshot
    assert load_bundle("some/magicbrush").card.name == "some/magicbrush"


def test_only_the_needed_files_are_downloaded(monkeypatch, plain, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    safetensors.torch.save_file(plain, tmp_path / "cosxl_edit.safetensors")
    requested = []

    def fetch(name, *, local_files_only, allow_patterns, **_):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        requested.append(allow_patterns)
        has_editor = "cosxl_edit.safetensors" in allow_patterns
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        return str(tmp_path if has_editor else empty)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    files = ["README.md", "cosxl.safetensors", "cosxl_edit.safetensors", "vae/x.safetensors"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, **_: files)
    assert find_model("some/cosxl").name == "cosxl_edit.safetensors"
    assert "cosxl_edit.safetensors" in requested[-1] and "cosxl.safetensors" not in requested[-1]


# --- tiny autoencoders ---


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """A random AutoencoderTiny with the latent shape of the small models."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("taesd") / "tiny"
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(folder)
    return folder


def test_a_tiny_autoencoder_replaces_the_full_one_and_equals_diffusers(tiny_vae, sd1_dir):
    from diffusers import AutoencoderTiny

    oracle = AutoencoderTiny.from_pretrained(tiny_vae)
    for name in (tiny_vae, tiny_vae / "diffusion_pytorch_model.safetensors"):
        bundle = load_bundle(sd1_dir, vae=name)
        assert bundle.latent_scale == pytest.approx(0.18215) and bundle.latent_factor == 4
        pictures = torch.rand(1, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            scaled = oracle.encode(pictures).latents
            latents = bundle.vae.encode(pictures).latent_dist.mode()
            torch.testing.assert_close(latents * bundle.latent_scale, scaled)
            torch.testing.assert_close(bundle.vae.decode(latents).sample, oracle.decode(scaled).sample)


def test_a_misspelled_folder_gets_a_suggestion(tiny_vae):
    from ip2p.models.bundle import find_folder

    wrong = tiny_vae.with_name(tiny_vae.name + "x")
    with pytest.raises(ModelError, match=f"no such tiny autoencoder. Did you mean .*{tiny_vae.name}"):
        find_folder(wrong, (), lambda folder: True, what="tiny autoencoder")


@pytest.mark.parametrize("memory", ["high", "low"])
def test_an_edit_works_with_a_tiny_autoencoder(tiny_vae, sd1_dir, memory):
    from PIL import Image

    from ip2p.editing.editor import Editor

    editor = Editor.load(sd1_dir, vae=tiny_vae, device="cpu", memory=memory)
    [result] = editor.edit(Image.new("RGB", (64, 64), "teal"), "make it night", steps=2, size=64, seeds=[1])
    assert result.size == (64, 64)
