"""`ip2p model info | convert | list`."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from ip2p.cli import main as cli
from ip2p.models import keys
from ip2p.models.export import export_file
from ip2p.models.load import open_model


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run the command line; its exit code, stdout and stderr come back."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capfd.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def file(sd1_dir, tmp_path):
    export_file(open_model(sd1_dir), tmp_path / "editor.safetensors", dtype=torch.float16)
    return tmp_path / "editor.safetensors"


def test_info_of_a_file(run, file):
    code, out, _ = run("model", "info", file)
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["layout"] == "single file, LDM"
    assert rows["architecture"] == "SD 1.x, an editor (input of 8 channels)"
    assert rows["dtype"] == "unet fp16, vae fp16, text_encoder fp16"
    assert (rows["EMA"], rows["missing"], rows["unexpected"]) == ("none", "none", "none")


def test_info_names_what_is_missing_and_what_is_not_expected(run, file, tmp_path):
    state = safetensors.torch.load_file(file)
    state.pop("first_stage_model.decoder.conv_in.bias")
    state |= {"control_model.weight": torch.zeros(1), "betas": torch.zeros(1)}
    twins = {keys.ema_name(k): v for k, v in state.items() if k.startswith(keys.UNET)}
    torch.save({"state_dict": state | twins}, tmp_path / "model.ckpt")
    code, out, _ = run("model", "info", tmp_path / "model.ckpt", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["missing"] == ["first_stage_model.decoder.conv_in.bias"]
    assert said["unexpected"] == ["control_model.weight"]
    assert said["ema"] == len(twins)
    assert (said["editor"], said["channels"], said["tokenizer"]) == (True, 8, False)


@pytest.mark.parametrize(
    ("name", "architecture"), [("sd1_dir", "SD 1.x"), ("sd2_dir", "SD 2.x"), ("xl_dir", "SDXL")]
)
def test_info_of_a_folder(run, request, name, architecture):
    code, out, _ = run("model", "info", request.getfixturevalue(name), "--json")
    said = json.loads(out)
    assert (code, said["architecture"], said["layout"]) == (0, architecture, "folder")
    assert said["missing"] == said["unexpected"] == []
    assert sum(said["parameters"].values()) > 10**6


def test_info_of_a_base_model_names_the_next_step(run, tmp_path):
    from conftest import make_model

    code, out, _ = run("model", "info", make_model(tmp_path / "base", in_channels=4))
    assert code == 0
    assert "not an editor (input of 4 channels)" in out
    assert f"ip2p train --base {tmp_path / 'base'}" in out


def test_convert_goes_both_ways(run, sd1_dir, tmp_path):
    assert run("model", "convert", sd1_dir, "one.safetensors")[:2] == (0, "one.safetensors\n")
    assert run("model", "convert", "one.safetensors", "folder")[:2] == (0, "folder\n")
    assert run("model", "convert", "folder", "two.safetensors", "--dtype", "fp16")[0] == 0
    first = safetensors.torch.load_file(tmp_path / "one.safetensors")
    second = safetensors.torch.load_file(tmp_path / "two.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].half(), second[key]) for key in first)
    code, _, err = run("model", "convert", sd1_dir, "one.safetensors")
    assert code == 2 and "add --overwrite" in err
    assert run("model", "convert", sd1_dir, "one.safetensors", "--overwrite")[0] == 0


def test_convert_refuses_bad_words(run, sd1_dir, file, tmp_path):
    assert run("model", "convert", sd1_dir)[0] == 2
    assert run("model", "info")[0] == 2
    assert run("model", "convert", sd1_dir, "model.ckpt")[0] == 2
    assert run("model", "convert", file, file, "--overwrite")[0] == 2
    assert run("model", "convert", tmp_path / "none.safetensors", "folder")[0] == 3
    path = tmp_path / "bad.ckpt"
    path.write_bytes(b"cposix\nsystem\n(S'touch made'\ntR.")
    code, out, err = run("model", "convert", path, "folder")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "folder").exists()


def test_list_shows_packaged_and_cached_models(run, sd1_dir, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    snapshot = cache / "models--some--editor" / "snapshots" / ("0" * 40)
    shutil.copytree(sd1_dir, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(cache))
    code, out, _ = run("model", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["some/editor"]["where"] == "cache"
    assert rows["some/editor"]["editor"]
    code, out, _ = run("model", "list")
    assert code == 0 and "some/editor" in out
