"""An editor with 16 latent and 32 UNet channels does everything that one with 4 and 8 does."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import make_model, make_sd_model

from ip2p.base.devices import NoiseStream
from ip2p.base.errors import ModelError
from ip2p.cli import main as cli
from ip2p.diffusion.schedule import linspace_sigmas
from ip2p.editing.editor import Editor
from ip2p.models.bundle import load_bundle
from ip2p.models.export import export_file
from ip2p.models.load import open_model
from ip2p.models.save import save_editor
from ip2p.pictures.images import to_tensor
from ip2p.settings import EditSettings
from ip2p.synth.pairs import PairMaker
from ip2p.synth.records import Candidate, Triple

STEPS, SEED = 4, 3


@pytest.fixture(scope="module")
def editor_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "deep", latent_channels=16)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "base", latent_channels=16, in_channels=16)


@pytest.fixture(scope="module")
def editor(editor_dir):
    return Editor.load(editor_dir, device="cpu", dtype="fp32")


def edited(editor: Editor, page, **settings):
    return editor.edit(page, "make it night", seeds=[SEED], steps=STEPS, **settings)[0]


def test_an_edit_equals_diffusers(editor, editor_dir, tmp_path, page):
    """Oracle: diffusers' pipeline, on the folder and on a saved copy."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    save_editor(load_bundle(editor_dir), tmp_path / "saved", dtype=torch.float32)
    image = editor.encode_image(to_tensor(page))
    assert image.shape == (1, 16, 16, 16)
    *_, ours = editor.edit_latents(
        image,
        editor.encode_text("make it night"),
        editor.encode_text(""),
        noise=NoiseStream([SEED], image.shape[1:]),
        settings=EditSettings(text_cfg=7.5, image_cfg=1.5, sampler="euler_ancestral"),
        sigmas=linspace_sigmas(editor.schedule, STEPS),
    )
    for folder in (editor_dir, tmp_path / "saved"):
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            "make it night",
            image=page,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_masks_and_non_square_sizes_work(editor, page):
    assert edited(editor, page.resize((96, 64))).size == (96, 64)
    assert edited(editor, page, auto_mask=0.5).info["mask"].size == page.size


def test_a_round_trip_through_a_single_file_is_exact(editor, editor_dir, tmp_path, page, capsys):
    file, back = tmp_path / "model.safetensors", tmp_path / "back"
    assert cli.main(["model", "convert", str(editor_dir), str(file)]) == 0
    assert cli.main(["model", "convert", str(file), str(back)]) == 0
    for path in editor_dir.rglob("*.safetensors"):
        ours = safetensors.torch.load_file(back / path.relative_to(editor_dir))
        theirs = safetensors.torch.load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    expected = edited(editor, page).tobytes()
    for model in (file, back):
        assert edited(Editor.load(model, device="cpu", dtype="fp32"), page).tobytes() == expected
    capsys.readouterr()
    assert cli.main(["model", "info", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["editor"], report["channels"]) == (True, 32)


def test_a_file_without_our_header_is_identified_by_its_shapes(tmp_path):
    folder = make_sd_model(tmp_path / "sd", latent_channels=16)
    export_file(open_model(folder), tmp_path / "model.safetensors")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    stored = open_model(tmp_path / "model.safetensors")
    assert stored.channels == (32, 32)
    bundle = load_bundle(tmp_path / "model.safetensors")
    assert (bundle.unet.config.out_channels, bundle.vae.config.latent_channels) == (16, 16)


def test_a_text_to_image_model_with_16_channels_is_not_an_editor(base_dir):
    with pytest.raises(ModelError, match=r"takes 16 channels; an editor needs 32\. Train one: ip2p train"):
        load_bundle(base_dir)


def test_a_unet_with_8_input_channels_does_not_fit_16_channel_latents(editor_dir, tmp_path):
    folder = shutil.copytree(editor_dir, tmp_path / "copy")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 8}))
    with pytest.raises(ModelError, match=r"takes 8 channels; an editor needs 32"):
        load_bundle(folder)


def test_a_text_to_image_model_can_be_trained_into_an_editor(base_dir, tmp_path, page):
    words = ["--data", "storybook", "--base", base_dir, "--output", tmp_path / "out", "--steps", 1]
    words += ["--batch", 2, "--size", 64, "--workers", 0, "--validate-every", 0, "--track", "none"]
    words += ["--device", "cpu", "--precision", "fp32", "--cache", tmp_path / "cache"]
    assert cli.main(["train", *map(str, words)]) == 0
    stored = open_model(tmp_path / "out")
    assert stored.channels == (32, 32)
    assert edited(Editor.load(tmp_path / "out", device="cpu", dtype="fp32"), page).size == page.size


@pytest.mark.parametrize("name", ["editor_dir", "base_dir"])
def test_the_pair_maker_generates_pairs(name, request):
    triple = Triple(id="1", caption="a cat", instruction="make it night", edited_caption="a cat at night")
    maker = PairMaker(request.getfixturevalue(name), steps=2, device="cpu", dtype="fp32", batch_size=1)
    [pair] = maker([Candidate(triple=triple, number=0, seed=1, p=0.5, scale=3.0)])
    assert pair.fate == "made" and pair.latents.shape == (2, 16, 16, 16)
