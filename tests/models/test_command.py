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
    """Run the command line; returns the exit code, stdout and stderr."""
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


def test_info_describes_a_single_file(run, file):
    code, out, _ = run("model", "info", file)
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["layout"] == "single file, LDM"
    assert rows["architecture"] == "SD 1.x, an editor (input of 8 channels)"
    assert rows["dtype"] == "unet fp16, vae fp16, text_encoder fp16"
    assert (rows["EMA"], rows["missing"], rows["unexpected"]) == ("none", "none", "none")


def test_info_lists_missing_and_unexpected_weights(run, file, tmp_path):
    state = safetensors.torch.load_file(file)
    state.pop("first_stage_model.decoder.conv_in.bias")
    state |= {"control_model.weight": torch.zeros(1), "betas": torch.zeros(1)}
    ema_weights = {keys.ema_name(k): v for k, v in state.items() if k.startswith(keys.UNET)}
    torch.save({"state_dict": state | ema_weights}, tmp_path / "model.ckpt")
    code, out, _ = run("model", "info", tmp_path / "model.ckpt", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["missing"] == ["first_stage_model.decoder.conv_in.bias"]
    assert report["unexpected"] == ["control_model.weight"]
    assert report["ema"] == len(ema_weights)
    assert (report["editor"], report["channels"], report["tokenizer"]) == (True, 8, False)


@pytest.mark.parametrize(
    ("name", "architecture"), [("sd1_dir", "SD 1.x"), ("sd2_dir", "SD 2.x"), ("xl_dir", "SDXL")]
)
def test_info_describes_a_folder(run, request, name, architecture):
    code, out, _ = run("model", "info", request.getfixturevalue(name), "--json")
    report = json.loads(out)
    assert (code, report["architecture"], report["layout"]) == (0, architecture, "folder")
    assert report["missing"] == report["unexpected"] == []
    assert sum(report["parameters"].values()) > 10**6


def test_info_on_a_base_model_suggests_ip2p_train(run, tmp_path):
    from conftest import make_model

    code, out, _ = run("model", "info", make_model(tmp_path / "base", in_channels=4))
    assert code == 0
    assert "not an editor (input of 4 channels)" in out
    assert f"ip2p train --base {tmp_path / 'base'}" in out


def test_convert_works_in_both_directions(run, sd1_dir, tmp_path):
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


def test_invalid_arguments_and_unreadable_files_are_refused(run, sd1_dir, file, tmp_path):
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


def test_list_shows_cached_models(run, sd1_dir, tmp_path, monkeypatch):
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


def test_info_reports_whether_ema_or_plain_weights_are_used_and_why(run, file, tmp_path):
    state = safetensors.torch.load_file(file)
    torch.manual_seed(0)
    for name, change, words in (
        ("average", lambda value: value, "the averaged weights, 0.0% from the plain ones"),
        ("merge", torch.randn_like, "the plain weights: the averaged weights (EMA) are 1"),
    ):
        ema_weights = {
            keys.ema_name(k): change(v.float()) for k, v in state.items() if k.startswith(keys.UNET)
        }
        safetensors.torch.save_file(state | ema_weights, tmp_path / f"{name}.safetensors")
        code, out, _ = run("model", "info", tmp_path / f"{name}.safetensors")
        assert code == 0 and f"{len(ema_weights)} averaged weights; used: {words}" in out


def test_missing_components_are_reported_and_taken_from_parts_from(run, file, sd1_dir, tmp_path):
    state = safetensors.torch.load_file(file)
    alone = {key: value for key, value in state.items() if key.startswith(keys.UNET)}
    safetensors.torch.save_file(alone, tmp_path / "unet.safetensors")
    code, _, err = run("model", "info", "unet.safetensors")
    assert code == 3 and "--parts-from" in err
    code, out, _ = run("model", "info", "unet.safetensors", "--parts-from", sd1_dir, "--json")
    report = json.loads(out)
    assert code == 0 and report["editor"] and report["missing"] == report["unexpected"] == []
    words = ("model", "convert", "unet.safetensors", "whole.safetensors", "--parts-from", sd1_dir)
    assert run(*words)[0] == 0
    assert json.loads(run("model", "info", "whole.safetensors", "--json")[1])["missing"] == []
    bare = {key: value for key, value in state.items() if not key.startswith(keys.VAE)}
    safetensors.torch.save_file(bare, tmp_path / "bare.safetensors")
    assert json.loads(run("model", "info", "bare.safetensors", "--json")[1])["missing"] == ["vae"]
    assert run("model", "convert", "bare.safetensors", "complete", "--parts-from", sd1_dir)[0] == 0
    assert json.loads(run("model", "info", "complete", "--json")[1])["missing"] == []


def test_info_on_an_inpainting_model_does_not_suggest_training(run, file, tmp_path):
    state = safetensors.torch.load_file(file)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.zeros(state[first].shape[0], 9, 3, 3)
    safetensors.torch.save_file(state, tmp_path / "inpaint.safetensors")
    code, out, _ = run("model", "info", "inpaint.safetensors")
    assert code == 0 and "an inpainting model" in out and "ip2p train" not in out


def test_convert_renames_a_lora_to_kohya_names(run, tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    safetensors.torch.save_file(state, tmp_path / "lora.safetensors")
    code, out, _ = run("model", "convert", "lora.safetensors", "out.safetensors", "--names", "kohya")
    assert (code, out) == (0, "out.safetensors\n")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert set(found) == {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.{role}"
        for role in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    code, _, err = run("model", "convert", "lora.safetensors", "folder", "--names", "kohya")
    assert code == 2 and "ends in .safetensors" in err


def test_edit_takes_distilled_samplers_a_random_seed_and_flags_over_a_files_settings(run, sd1_dir, tmp_path):
    from PIL import Image, PngImagePlugin

    from ip2p.pictures.infotext import parse_infotext, read_infotext

    Image.new("RGB", (64, 64), "teal").save(tmp_path / "page.png")
    words = ("--model", sd1_dir, "--steps", "2", "--seed", "-1", "--size", "64")
    seeds = set()
    for sampler, label in (("lcm", "LCM"), ("tcd", "TCD")):
        assert (
            run("edit", "page.png", "make it night", *words, "--sampler", sampler, "-o", f"{sampler}.png")[0]
            == 0
        )
        text = read_infotext(tmp_path / f"{sampler}.png")
        assert f"Sampler: {label}" in text and "Schedule type: LCM" in text and "Seed: -1" not in text
        seeds.add(parse_infotext(text).seed)
    assert len(seeds) == 2 and min(seeds) >= 0
    # A file from another tool, with a sampler that is unknown here.
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "make it snow\nSteps: 2, Sampler: UniPC, CFG scale: 6, Seed: 3, Size: 64x64")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png", pnginfo=info)
    again = ("edit", "page.png", "--from-settings", "other.png", "--model", sd1_dir, "-o", "again.png")
    code, _, err = run(*again)
    assert code == 2 and "other.png" in err
    assert run(*again, "--sampler", "euler")[0] == 0
    settings = parse_infotext(read_infotext(tmp_path / "again.png"))
    assert (settings.instruction, settings.sampler, settings.seed, settings.text_cfg) == (
        "make it snow",
        "euler",
        3,
        6,
    )
