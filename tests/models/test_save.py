import json
import re
import shutil

import pytest
import torch
import yaml
from bases import make_base
from PIL import Image
from safetensors.torch import load_file

from ip2p.base.errors import ModelError
from ip2p.editing.editor import Editor
from ip2p.models import export
from ip2p.models.base import load_base, prediction_of
from ip2p.models.bundle import load_bundle
from ip2p.models.save import Data, edit_scheduler, model_card, save_editor, write_editor

CARD = {"name": "mine", "native_size": 64}


def folder_of(request, tmp_path, name):
    """An editor's folder, or that of a base model made from it."""
    if not name.endswith("base"):
        return request.getfixturevalue(name)
    return make_base(request.getfixturevalue(name.replace("base", "dir")), tmp_path / "base")


def pipeline(folder, kind):
    import diffusers

    xl = "XL" if kind == "sdxl" else ""
    options = {"add_watermarker": False} if xl else {}
    loaded = getattr(diffusers, f"StableDiffusion{xl}InstructPix2PixPipeline").from_pretrained(
        folder, **options
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("name", ["sd1_base", "sd2_base", "xl_base"])
def test_a_saved_editor_opens_here_and_in_diffusers(request, tmp_path, name, page):
    """Oracle: diffusers' edit pipelines load the folder."""
    bundle = load_base(folder_of(request, tmp_path, name))
    with torch.no_grad():
        bundle.unet.conv_in.weight[:, 4:] += 0.1
    save_editor(bundle, tmp_path / "out", dtype=torch.float32, card=CARD, readme="# mine\n")
    editor = Editor.load(tmp_path / "out", device="cpu", dtype="fp32")
    assert (editor.bundle.card.name, editor.bundle.card.native_size) == ("mine", 64)
    assert editor.bundle.zero_empty_text == bundle.zero_empty_text
    assert editor.edit(page, "make it night", steps=2)[0].size == page.size
    theirs = pipeline(tmp_path / "out", bundle.kind)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        network = getattr(bundle, part)
        if network is None:
            continue
        state = network.state_dict()
        for loaded in (getattr(editor.bundle, part), getattr(theirs, part)):
            assert loaded.state_dict().keys() == state.keys()
            assert all(torch.equal(weight, state[key]) for key, weight in loaded.state_dict().items())
    words = "make it night"
    assert theirs.tokenizer(words).input_ids == bundle.tokenizer(words).input_ids
    assert theirs.tokenizer.model_max_length == bundle.tokenizer.model_max_length
    size = {"height": 64, "width": 64} if bundle.kind == "sdxl" else {}
    picture = theirs(words, image=page, num_inference_steps=2, output_type="np", **size).images[0]
    assert picture.shape == (64, 64, 3)
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == theirs.scheduler.config.prediction_type == prediction_of(bundle)
    assert scheduler["prediction_type"] == ("v_prediction" if name == "sd2_base" else "epsilon")
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"


def test_a_given_unet_state_and_dtype_are_saved(tiny_model_dir, tmp_path):
    bundle = load_base(tiny_model_dir)
    average = {name: weight.detach() + 0.25 for name, weight in bundle.unet.state_dict().items()}
    save_editor(bundle, tmp_path / "out", dtype=torch.float16, unet_state=average)
    stored = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], weight.half()) for name, weight in average.items())
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert {weight.dtype for weight in load_file(path).values()} == {torch.float16}
    # A pipeline loaded without a dtype has one dtype.
    loaded = pipeline(tmp_path / "out", "sd")
    assert {loaded.unet.dtype, loaded.text_encoder.dtype} == {torch.float32}


@pytest.mark.parametrize("wrong", ["absent", "more", "shape"])
def test_a_mismatched_unet_state_is_refused_before_anything_is_written(tiny_model_dir, tmp_path, wrong):
    bundle = load_base(tiny_model_dir)
    state = dict(bundle.unet.state_dict())
    if wrong == "absent":
        state.pop("conv_in.bias")
    elif wrong == "more":
        state["to_q.lora_A.weight"] = torch.zeros(1)
    else:
        state["conv_in.weight"] = state["conv_in.weight"][:, :4]
    with pytest.raises(ModelError, match="1 weights are not the UNet's"):
        save_editor(bundle, tmp_path / "out", unet_state=state)
    assert list(tmp_path.iterdir()) == []


def test_no_saved_text_file_contains_a_local_path(tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    for part in ("unet", "vae", "text_encoder"):
        path = copy / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": str(copy)}))
    bundle = load_base(copy)
    save_editor(bundle, tmp_path / "out", card=CARD)
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text()
            assert "/tmp" not in text and str(tmp_path) not in text and "name_or_path" not in text, path


def test_the_saved_card_keeps_the_fields_of_the_base(tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    base_card = {"name": "old", "native_size": 32, "known_psnr": 20.5, "text_cfg": 3.0}
    (copy / "ip2p.json").write_text(json.dumps(base_card))
    (copy / "clip").mkdir()
    (copy / "clip" / "config.json").write_text("{}")
    save_editor(load_base(copy), tmp_path / "mine", card={"native_size": 64, "trained": {"steps": 5}})
    saved = json.loads((tmp_path / "mine" / "ip2p.json").read_text())
    assert saved["trained"] == {"steps": 5}
    assert (saved["name"], saved["native_size"], saved["known_psnr"], saved["text_cfg"]) == (
        "mine",
        64,
        20.5,
        3.0,
    )
    # `ip2p edit --best` uses it for ranking.
    assert (tmp_path / "mine" / "clip" / "config.json").read_text() == "{}"


def test_large_weights_are_saved_in_shards(sd1_dir, tmp_path):
    bundle = load_base(sd1_dir)
    (tmp_path / "curves.png").write_bytes(b"picture")
    files = {"curves.png": tmp_path / "curves.png"}
    save_editor(bundle, tmp_path / "out", dtype=torch.float32, shard=2**20, files=files)
    assert len(list((tmp_path / "out" / "unet").glob("*-of-*.safetensors"))) > 2
    assert (tmp_path / "out" / "curves.png").read_bytes() == b"picture"
    for path in (tmp_path / "out").rglob("*-of-*.safetensors"):
        assert path.stat().st_size < 2**20 + 2**15 or len(load_file(path)) == 1
    for loaded in (load_base(tmp_path / "out"), pipeline(tmp_path / "out", "sd")):
        for part in ("unet", "vae", "text_encoder"):
            state = getattr(bundle, part).state_dict()
            for name, weight in getattr(loaded, part).state_dict().items():
                assert torch.equal(weight, state[name]), name


def test_a_component_that_pipelines_do_not_know_is_saved_with_the_others(
    tiny_model_dir, tiny_clip_dir, tmp_path
):
    from transformers import CLIPModel

    from ip2p.models.clip import Clip

    bundle = load_base(tiny_model_dir)
    clip = CLIPModel.from_pretrained(tiny_clip_dir)
    networks = {"unet": bundle.unet, "vae": bundle.vae, "text_encoder": bundle.text_encoder, "clip": clip}
    noise = {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "v_prediction"}
    tokenizers = {"tokenizer": bundle.tokenizer}
    write_editor(
        tmp_path / "out", networks, tokenizers, noise, dtype=torch.float32, card=CARD, shard=15 * 2**20
    )
    assert load_base(tmp_path / "out").card.name == "mine"
    assert pipeline(tmp_path / "out", "sd").scheduler.config.prediction_type == "v_prediction"
    loaded = Clip.load(tmp_path / "out" / "clip")
    words = ["make it night"]
    torch.testing.assert_close(loaded.texts(words), Clip(clip.eval(), bundle.tokenizer).texts(words))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("failing", ["write_safetensors", "write_text", "_write_json"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failed_write_leaves_the_old_editor_intact(tiny_model_dir, tmp_path, monkeypatch, failing, number):
    bundle = load_base(tiny_model_dir)
    save_editor(bundle, tmp_path / "out", card={"name": "old"})
    old = contents(tmp_path / "out")
    write, calls = getattr(export, failing), []

    def fails(*args, **more):
        calls.append(1)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        write(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(export, failing, fails)
        with pytest.raises(OSError, match="No space"):
            save_editor(bundle, tmp_path / "out", card={"name": "new"})
    assert contents(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    save_editor(bundle, tmp_path / "out", card={"name": "new"})
    assert json.loads((tmp_path / "out" / "ip2p.json").read_text())["name"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_the_old_folder_stays_until_the_new_one_replaces_it(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(export, "_exchange", lambda one, other: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with export.replacing_folder(tmp_path / "model") as temporary:
        (temporary / "new").touch()
        assert (tmp_path / "model" / "old").exists()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_base_scheduler_becomes_euler_ancestral_with_its_own_betas():
    """Oracle: diffusers' schedulers."""
    from diffusers import EulerAncestralDiscreteScheduler, PNDMScheduler

    base = PNDMScheduler(
        **{"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear"},
        **{"skip_prk_steps": True, "steps_offset": 1, "prediction_type": "v_prediction"},
    )
    config = edit_scheduler(json.loads(base.to_json_string()))
    ours = EulerAncestralDiscreteScheduler.from_config(config)
    assert torch.equal(ours.alphas_cumprod, base.alphas_cumprod)
    assert (ours.config.prediction_type, ours.config.timestep_spacing) == ("v_prediction", "linspace")
    assert edit_scheduler(config) == config


# --- the card ----------------------------------------------------------------------------------


def header_of(card):
    _, header, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(header), body


def test_the_card_has_a_valid_hub_header_and_states_unknown_values():
    """Oracle: huggingface_hub's ModelCard."""
    from huggingface_hub import ModelCard

    card = model_card(
        name="mine",
        base="someone/stable-diffusion",
        data=[Data(name="someone/pairs", rows=990, quarantined=10), Data(name="more", license="cc0-1.0")],
        recipe={"lr": 1e-4, "steps": 20, "data": "/home/someone/pictures", "flip": True, "sizes": (64, 32)},
    )
    header, body = header_of(card)
    assert header == {
        "license": "unknown",
        "base_model": "someone/stable-diffusion",
        "datasets": ["someone/pairs"],
        "tags": ["instruct-pix2pix", "image-editing", "ip2p"],
        "pipeline_tag": "image-to-image",
        "library_name": "diffusers",
    }
    assert ModelCard(card).data.to_dict() == header
    assert "| someone/pairs | 990 | 10 | not stated |" in body
    assert "| more | not counted | 0 | cc0-1.0 |" in body
    for line in ("lr | 0.0001", "steps | 20", "data | pictures", "flip | True", "sizes | 64, 32"):
        assert f"| {line} |" in body
    assert "/home" not in card
    for line in ("this model", "its base", "data: someone/pairs"):
        assert f"| {line} | not stated |" in body


def test_curves_are_a_table_with_a_picture():
    card = model_card(
        name="mine",
        base=None,
        data=[],
        recipe={},
        curves=[{"step": 100, "loss": 0.123456789}, {"step": 200, "loss": float("nan"), "clip": 0.21}],
        picture="curves.png",
        license="apache-2.0",
        lora="lora.safetensors",
    )
    header, body = header_of(card)
    assert header["license"] == "apache-2.0" and "base_model" not in header and "lora" in header["tags"]
    assert "| step | loss | clip |\n| --- | --- | --- |\n| 100 | 0.12346 |  |\n| 200 | nan | 0.21 |" in body
    assert "](curves.png)" in body and "--lora lora.safetensors" in body
    assert "from nothing: its UNet began as noise" in body


@pytest.mark.parametrize("name", ["", "some: name", "#1", "- [x] | y"])
def test_special_characters_in_names_do_not_break_the_card(name):
    header, body = header_of(
        model_card(name=name, base=name, data=[Data(name=name)], recipe={"a": name}, license=name or None)
    )
    assert header["license"] == (name or "unknown") and "base_model" not in header
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 5) for line in body.splitlines() if line[:1] == "|")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_example_code_in_the_card_edits_a_picture(request, tmp_path, monkeypatch, page, kind):
    import diffusers

    folder = request.getfixturevalue("xl_dir" if kind == "sdxl" else "tiny_model_dir")
    card = model_card(name=str(folder), base=None, data=[], recipe={}, kind=kind, text_cfg=3, image_cfg=1.2)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert f'ip2p edit photo.jpg "make it snow" --model {folder}' in card
    monkeypatch.chdir(tmp_path)
    page.save("photo.jpg")
    real = diffusers.EulerAncestralDiscreteScheduler.set_timesteps
    few = lambda self, steps, **more: real(self, 2, **more)  # noqa: E731 (100 would take long)
    monkeypatch.setattr(diffusers.EulerAncestralDiscreteScheduler, "set_timesteps", few)
    exec(code, {})
    assert Image.open("snow.png").size == page.size


@pytest.mark.parametrize("kind", ["sd1_dir", "xl_dir"])
def test_saved_tokenizers_can_be_rebuilt_from_vocab_and_merges(request, tmp_path, kind):
    """transformers 4's slow tokenizer needs both; here it is built from only these files."""
    from transformers import CLIPTokenizer

    bundle = load_bundle(request.getfixturevalue(kind))
    save_editor(bundle, tmp_path / "out")
    for name in ("tokenizer", *(["tokenizer_2"] if kind == "xl_dir" else [])):
        folder = tmp_path / "out" / name
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        header, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        assert header == "#version: 0.2"
        rebuilt = CLIPTokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in merges])
        original = getattr(bundle, name)
        for text in ("make it night", "a café at 7:30 — won't it?"):
            assert rebuilt(text).input_ids == original(text).input_ids


def test_an_x0_prediction_editor_gets_a_scheduler_that_diffusers_can_run():
    from diffusers import EulerDiscreteScheduler

    config = edit_scheduler({"_class_name": "PNDMScheduler", "prediction_type": "sample"})
    assert config["_class_name"] == "EulerDiscreteScheduler"
    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(4)
    x0 = torch.full((1, 4, 8, 8), 0.5)
    x = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(x0, t, x).prev_sample
    torch.testing.assert_close(x, x0)
