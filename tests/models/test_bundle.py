import json
import pickle
import re
import shutil

import pytest
import safetensors.torch
import torch

from ip2p.base.errors import ModelError
from ip2p.models import bundle
from ip2p.models.bundle import find_model, load_bundle
from ip2p.settings import EditSettings


@pytest.fixture
def copy(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "tiny")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Bomb:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_bundle_holds_the_scales_the_card_and_the_scheduler_config(tiny_model_dir):
    loaded = load_bundle(tiny_model_dir)
    assert (loaded.latent_scale, loaded.latent_factor, loaded.size_multiple) == (0.7, 4, 8)
    assert (loaded.card.name, loaded.card.native_size, loaded.card.known_psnr) == ("tiny", 64, None)
    assert loaded.scheduler_config["beta_schedule"] == "scaled_linear"
    assert not loaded.unet.training
    assert not any(weight.requires_grad for weight in loaded.unet.parameters())


def test_the_card_in_the_folder_overrides_the_defaults(copy):
    (copy / "ip2p.json").write_text(json.dumps({"name": "storybook", "native_size": 128, "known_psnr": 27.5}))
    card = load_bundle(copy).card
    assert (card.name, card.native_size, card.known_psnr) == ("storybook", 128, 27.5)


def test_guidance_scales_default_to_the_papers_unless_the_card_sets_them(copy):
    card = load_bundle(copy).card
    assert (card.text_cfg, card.image_cfg) == (7.5, 1.5)
    (copy / "ip2p.json").write_text(json.dumps({"text_cfg": 3, "image_cfg": 1.2}))
    card = load_bundle(copy).card
    assert (card.text_cfg, card.image_cfg) == (3.0, 1.2)


def test_sampling_settings_default_to_the_papers_unless_the_card_sets_them(copy):
    card = load_bundle(copy).card
    settings = EditSettings(negative="x", steps=None)
    assert settings.resolved(card) == settings.changed(
        steps=20,
        sampler="euler_ancestral",
        schedule="linspace",
        text_cfg=7.5,
        image_cfg=1.5,
        cfg_interval=(0, 1),
    )
    said = {"steps": 12, "sampler": "dpmpp_2m", "schedule": "trailing", "cfg_interval": [0.3, 0.9]}
    (copy / "ip2p.json").write_text(json.dumps(said))
    card = load_bundle(copy).card
    settings = EditSettings(steps=3).resolved(card)
    assert (settings.steps, settings.sampler, settings.schedule) == (3, "dpmpp_2m", "trailing")
    assert settings.cfg_interval == (0.3, 0.9)
    assert EditSettings(cfg_interval=(0, 1)).resolved(card).cfg_interval == (0, 1)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"schedule": "even"},
            "schedule is 'even'; choose one of: linspace, karras, exponential, trailing, lcm",
        ),
        ({"sampler": "magic"}, "sampler is 'magic'; choose one of: euler_ancestral"),
        ({"steps": 0}, "steps is 0; it must be 1 to 1000"),
        ({"steps": "many"}, "cannot be used"),
        ({"text_cfg": "strong"}, "cannot be used"),
    ],
)
def test_a_card_with_invalid_settings_is_refused(copy, said, words):
    (copy / "ip2p.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match=re.escape(words)):
        load_bundle(copy)


def test_sharded_weights_are_read(copy):
    unet = load_bundle(copy).unet
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(copy / "unet", max_shard_size="1MB")
    assert len(list((copy / "unet").glob("*-of-*.safetensors"))) > 1
    for name, weight in load_bundle(copy).unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name])


def test_all_networks_take_the_requested_dtype(tiny_model_dir):
    for dtype in (torch.float16, torch.bfloat16):
        half = load_bundle(tiny_model_dir, dtype=dtype)
        assert (half.unet.dtype, half.text_encoder.dtype, half.vae.dtype) == (dtype,) * 3


def test_a_unet_with_4_input_channels_is_not_an_editor(copy):
    change(copy / "unet" / "config.json", in_channels=4)
    with pytest.raises(
        ModelError, match=r"This UNet takes 4 channels; an editor needs 8\. Train one: ip2p train --base"
    ):
        load_bundle(copy)


def test_a_unet_with_9_input_channels_is_reported_as_an_inpainting_model(copy):
    change(copy / "unet" / "config.json", in_channels=9)
    words = r"takes 9 channels.*inpainting.*StableDiffusionInpaintPipeline"
    with pytest.raises(ModelError, match=words):
        load_bundle(copy)


def test_an_sdxl_folder_loads_two_text_encoders(xl_dir):
    loaded = load_bundle(xl_dir)
    assert (loaded.kind, loaded.latent_scale, loaded.condition_scale) == ("sdxl", 0.13025, 1.0)
    assert loaded.text_encoder_2.config.projection_dim == 32
    assert loaded.tokenizer_2.model_max_length == 77
    assert loaded.zero_empty_text


def test_an_sdxl_folder_needs_both_text_encoders(copy):
    change(copy / "model_index.json", _class_name="StableDiffusionXLInstructPix2PixPipeline")
    with pytest.raises(ModelError, match="lacks text_encoder_2, tokenizer_2"):
        load_bundle(copy)


def test_a_cosxl_folder_scales_the_image_condition(xl_dir, tmp_path):
    folder = shutil.copytree(xl_dir, tmp_path / "cosxl")
    change(folder / "model_index.json", is_cosxl_edit=True, force_zeros_for_empty_prompt=False)
    loaded = load_bundle(folder)
    assert (loaded.condition_scale, loaded.zero_empty_text) == (0.13025, False)


@pytest.mark.parametrize("part", bundle.PARTS)
def test_a_missing_component_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=f"lacks {part}"):
        load_bundle(copy)


def test_a_folder_without_a_model_index_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("ending", [".bin", ".pkl"])
def test_a_pickle_is_not_opened(tmp_path, ending):
    marker = tmp_path / "made"
    path = tmp_path / f"model{ending}"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ModelError, match="pickle.*was not opened") as error:
        load_bundle(path)
    assert error.value.code == 3
    assert not marker.exists()


def test_a_pickle_in_place_of_safetensors_is_not_opened(copy, tmp_path):
    marker = tmp_path / "made"
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ModelError, match="pickle.*was not opened"):
        load_bundle(copy)
    assert not marker.exists()


def test_code_in_the_folder_is_not_run(copy, tmp_path):
    marker = tmp_path / "made"
    (copy / "unet" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    change(copy / "unet" / "config.json", _class_name="Evil", auto_map={"AutoModel": "evil.Evil"})
    load_bundle(copy)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_weights_are_reported_in_one_line(copy, damage):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "noise": b"\xff" * 100, "empty": b""}[damage])
    with pytest.raises(ModelError, match="vae.*cannot be read") as error:
        load_bundle(copy)
    assert "\n" not in str(error.value)


def test_missing_weights_are_an_error_and_not_randomly_initialized(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights.pop("conv_in.bias")
    safetensors.torch.save_file(weights, path)
    with pytest.raises(ModelError, match=r"lacks 1 weights, conv_in\.bias"):
        load_bundle(copy)


def test_invalid_json_is_reported_with_its_file(copy):
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_bundle(copy)


def test_a_misspelled_folder_gets_a_suggestion(copy):
    with pytest.raises(ModelError, match=r"no such model folder\. Did you mean .*tiny\?"):
        find_model(copy.with_name("tinny"))


def test_a_misspelled_model_name_gets_a_suggestion(monkeypatch):
    monkeypatch.setattr(bundle, "packaged_models", lambda: ["storybook"])
    with pytest.raises(ModelError, match="Did you mean storybook"):
        find_model("storybok")


def test_an_unknown_or_empty_model_name_is_refused():
    with pytest.raises(ModelError, match="hub name like timbrooks/instruct-pix2pix"):
        find_model("zzzzzz")
    with pytest.raises(ModelError, match="empty"):
        find_model(" ")


def test_an_uncached_model_offline_gives_the_download_command(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"Fetch it: hf download timbrooks/instruct-pix2pix$"):
        find_model("timbrooks/instruct-pix2pix")


def test_no_network_gives_the_download_command(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(name, *, local_files_only, **_):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"cannot be reached \(ConnectionError\).*hf download some/model"):
        find_model("some/model")


def test_a_cached_model_needs_no_network(monkeypatch, tiny_model_dir):
    import huggingface_hub

    def fetch(name, *, local_files_only, **_):
        assert local_files_only
        return str(tiny_model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_model("some/model") == tiny_model_dir
