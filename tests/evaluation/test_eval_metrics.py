"""Metrics match outside implementations on the same inputs: torchmetrics, transformers, brute force."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ip2p.base.errors import InputError, ModelError
from ip2p.evaluation import metrics
from ip2p.evaluation.encoders import ENCODERS, Encoders, find_encoder, load_vit
from ip2p.evaluation.metrics import METRICS, Shot, chosen_metrics, measure_shots
from ip2p.models.clip import Clip
from ip2p.pictures.images import to_pil


@pytest.fixture(scope="module")
def pictures():
    """Two different smooth pictures, fp32 [3, 61, 84] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand((2, 3, 7, 9), generator=generator)
    smooth = F.interpolate(small, (61, 84), mode="bicubic").clamp(0, 1)
    return smooth[0], (smooth[0] * 0.8 + 0.2 * smooth[1]).clamp(0, 1)


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """Folders of a tiny DINO (in the old pickled format), a DINOv2 and a DINO with 8-pixel patches."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    home = tmp_path_factory.mktemp("vits")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    dino = ViTModel(ViTConfig(**small, image_size=32, patch_size=16), add_pooling_layer=False)
    dino.config.save_pretrained(home / "dino")
    old_state = {}
    for name, value in dino.state_dict().items():  # the names of the published file
        name = name.replace("layers.", "encoder.layer.").replace("attention.o_proj", "attention.output.dense")
        for one, other in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            name = name.replace(f"attention.{one}", f"attention.attention.{other}")
        old_state[name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = value
    torch.save(old_state, home / "dino/pytorch_model.bin")
    Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)).save_pretrained(home / "dinov2")
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(
        home / "structure"
    )
    return {"dino": str(home / "dino"), "dinov2": str(home / "dinov2"), "structure": str(home / "structure")}


@pytest.fixture(scope="module")
def encoders(vits, tiny_clip_dir):
    return Encoders({"clip": str(tiny_clip_dir), "clip_b32": str(tiny_clip_dir), **vits})


# --- pixels ---------------------------------------------------------------------------------------


def test_l1_l2_psnr_and_ssim_match_torchmetrics(pictures):
    one, other = pictures
    assert metrics.l1(one, other) == pytest.approx(float((one - other).abs().mean()), abs=1e-6)
    assert metrics.l2(one, other) == pytest.approx(float(F.mse_loss(one, other)), abs=1e-6)
    expected = peak_signal_noise_ratio(one[None], other[None], data_range=1.0)
    assert metrics.psnr(one, other) == pytest.approx(float(expected), abs=1e-5)
    expected = structural_similarity_index_measure(one[None], other[None], data_range=1.0)
    assert metrics.ssim(one, other) == pytest.approx(float(expected), abs=1e-5)
    assert metrics.ssim(one, one) == pytest.approx(1)
    assert metrics.psnr(one, one) == pytest.approx(106, abs=0.1)
    assert math.isnan(metrics.ssim(one[:, :10], other[:, :10])), "smaller than its window"


def test_only_the_pixels_of_a_region_are_averaged(pictures):
    one, other = pictures
    region = torch.zeros(one.shape[1:], dtype=torch.bool)
    region[20:45, 10:50] = True
    noisy = torch.where(region, other, torch.rand(one.shape, generator=torch.Generator().manual_seed(1)))
    cut = (slice(None), slice(20, 45), slice(10, 50))
    for function in (metrics.l1, metrics.l2, metrics.psnr):
        assert function(one, noisy, region) == pytest.approx(function(one[cut], other[cut]), abs=1e-6)
        assert math.isnan(function(one, other, ~torch.ones_like(region)))


def test_ssim_in_a_ragged_region_matches_brute_force_over_full_windows(pictures):
    one, other = pictures
    region = torch.from_numpy(np.random.default_rng(0).random(one.shape[1:]) > 0.002)
    region[[0, -1]] = region[:, [0, -1]] = False  # so that no window is mirrored
    noise = torch.rand(one.shape, generator=torch.Generator().manual_seed(1))
    noisy = torch.where(region, other, noise)
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 4.5).double()
    window = line.outer(line) / line.outer(line).sum()
    values = []
    for y in range(5, one.shape[1] - 5):
        for x in range(5, one.shape[2] - 5):
            cut = (slice(y - 5, y + 6), slice(x - 5, x + 6))
            if not region[cut].all():
                continue
            for a, b in zip(one.double(), other.double(), strict=True):
                a, b = a[cut], b[cut]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                both = (window * (a - ma) * (b - mb)).sum()
                top = (2 * ma * mb + 1e-4) * (2 * both + 9e-4)
                values.append(top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert metrics.ssim(one, other, torch.ones_like(region)) == metrics.ssim(one, other)
    assert math.isnan(metrics.ssim(one, other, torch.zeros_like(region)))
    assert 100 < len(values) < 3 * 51 * 74
    assert metrics.ssim(one, noisy, region) == pytest.approx(float(torch.stack(values).mean()), abs=1e-6)


def test_lpips_without_its_package_names_the_extra_to_install(pictures, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    metrics._lpips.cache_clear()
    with pytest.raises(ModelError, match=r"pip install 'ip2p\[lpips\]'"):
        metrics.lpips(*pictures)


def test_lpips_averages_the_distance_map_over_the_region(pictures, monkeypatch):
    class Net:
        def __call__(self, one, other):
            assert one.min() < 0 and one.shape[0] == 1, "[-1, 1]"
            return (one - other).abs().mean(dim=1, keepdim=True)

    monkeypatch.setattr(metrics, "_lpips", lambda net: Net())
    one, other = pictures
    region = torch.zeros(one.shape[1:], dtype=torch.bool)
    region[:10] = True
    assert metrics.lpips(one, other, region) == pytest.approx(2 * metrics.l1(one, other, region), abs=1e-6)


# --- networks -------------------------------------------------------------------------------------


def test_clip_metrics_match_transformers_with_the_papers_preprocessing(pictures, encoders, tiny_clip_dir):
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(tiny_clip_dir), CLIPTokenizer.from_pretrained(tiny_clip_dir)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        pixels = F.interpolate(torch.stack(pictures), (32, 32), mode="bicubic", align_corners=False)
        tokens = tokenizer(["a page", "a dark page"], padding=True, return_tensors="pt")
        out = model(**tokens, pixel_values=(pixels - mean) / std)
    (a, b), (s, t) = out.image_embeds, out.text_embeds
    shot = Shot(before=pictures[0], output=pictures[1], caption="a page", edited_caption="a dark page")
    names = ("clip_image", "clip_directional", "clip_text")
    (found,) = measure_shots([shot], chosen_metrics(names), encoders)
    assert found["clip_image"] == pytest.approx(float(F.cosine_similarity(a, b, dim=0)), abs=1e-5)
    expected = F.cosine_similarity(b - a, t - s, dim=0)
    assert found["clip_directional"] == pytest.approx(float(expected), abs=1e-5)
    assert found["clip_text"] == pytest.approx(float(F.cosine_similarity(b, t, dim=0)), abs=1e-5)


def test_clip_b32_matches_transformers_with_its_image_processor(pictures, encoders, tiny_clip_dir):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(tiny_clip_dir)
    prepare = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = [to_pil(picture * 2 - 1) for picture in pictures]
    with torch.no_grad():
        pixels = prepare(images, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values=pixels)
    a, b = features if isinstance(features, torch.Tensor) else features.pooler_output
    expected = float(F.cosine_similarity(a, b, dim=0))
    assert metrics.image_similarity_of(*pictures, encoders, "clip_b32") == pytest.approx(expected, abs=1e-5)
    prepared = encoders.prepared("clip_b32", pictures[0])
    assert torch.allclose(prepared, pixels[0], atol=1e-5)


# The sizes crop whole pixels on both sides: MagicBrush's torchvision rounds half pixels differently.
@pytest.mark.parametrize("slot", ["dino", "dinov2"])
def test_dino_matches_the_class_token_of_transformers_after_resize_and_crop(pictures, encoders, vits, slot):
    from transformers import AutoModel, BitImageProcessorPil

    model = AutoModel.from_pretrained(vits[slot])
    side = model.config.image_size
    prepare = BitImageProcessorPil(
        size={"shortest_edge": round(256 * side / 224)},
        crop_size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with torch.no_grad():
        pixels = prepare([to_pil(p * 2 - 1) for p in pictures], return_tensors="pt")["pixel_values"]
        a, b = model(pixels).last_hidden_state[:, 0]
    expected = float(F.cosine_similarity(a, b, dim=0))
    assert metrics.image_similarity_of(*pictures, encoders, slot) == pytest.approx(expected, abs=1e-5)


def test_a_pickled_vit_with_the_published_names_loads_its_weights(vits):
    model = load_vit(vits["dino"])
    stored = torch.load(f"{vits['dino']}/pytorch_model.bin", weights_only=True)
    key = stored["encoder.layer.1.attention.attention.key.weight"]
    assert torch.equal(model.layers[1].attention.k_proj.weight, key)


def test_structure_distance_matches_brute_force_over_the_keys(pictures, encoders, vits):
    from transformers import ViTModel

    model = ViTModel.from_pretrained(vits["structure"], add_pooling_layer=False)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for levels in (1.0, 255.0):
        maps = []
        for picture in pictures:
            scale = min(32 / 61, 32 * 480 / 224 / 84)
            small = F.interpolate(
                picture[None], (int(61 * scale), int(84 * scale)), mode="bilinear", antialias=True
            )
            pixels = (small * levels - mean) / std
            with torch.no_grad():
                out = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
                block = model.layers[-1]
                keys = block.attention.k_proj(block.layernorm_before(out.hidden_states[-2]))[0]
            maps.append([[F.cosine_similarity(k, q, dim=0).item() for q in keys] for k in keys])
        expected = np.mean((np.array(maps[0]) - np.array(maps[1])) ** 2)
        found = metrics.structure_distance(*pictures, encoders, levels=levels)
        assert found == pytest.approx(expected, abs=1e-5) and expected > 1e-6


def test_metrics_of_a_shot_do_not_depend_on_the_other_shots(pictures, encoders):
    one, other = pictures
    names = ("clip_image", "dino_image", "clip_target")
    shots = [Shot(before=one, output=other, target=one), Shot(before=other, output=one, target=one)]
    together = measure_shots(shots, chosen_metrics(names), encoders)
    encoders.forget()
    for shot, found in zip(shots, together, strict=True):
        (alone,) = measure_shots([shot], chosen_metrics(names), encoders)
        assert alone == pytest.approx(found, abs=1e-6)


def test_copying_the_input_has_zero_direction_and_full_similarity(pictures, encoders):
    shot = Shot(before=pictures[0], output=pictures[0], caption="a", edited_caption="b", target=pictures[1])
    names = ("clip_directional", "clip_image", "dino_image")
    (found,) = measure_shots([shot], chosen_metrics(names), encoders)
    assert found["clip_directional"] == pytest.approx(0, abs=1e-4)
    assert found["clip_image"] == pytest.approx(1, abs=1e-6) == found["dino_image"]


def test_metrics_of_missing_inputs_are_nan(pictures, encoders):
    shot = Shot(before=pictures[0], output=pictures[1], caption="same", edited_caption="same")
    available = ("clip_text", "clip_b32_text")
    names = [n for n, m in METRICS.items() if m.needs and not n.startswith("lpips") and n not in available]
    (found,) = measure_shots([shot], chosen_metrics(names), encoders)
    assert len(found) > 20 and all(math.isnan(value) for value in found.values()), found


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ENCODERS)
def test_a_missing_model_is_reported_with_its_download_command(slot, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _not_cached)
    spec = ENCODERS[slot]
    with pytest.raises(ModelError, match=f"hf download {spec.name}") as error:
        find_encoder(slot)
    assert spec.revision is None or f"--revision {spec.revision}" in str(error.value)


def _not_cached(*args, **more):
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("not here")


def test_the_storybook_clip_or_a_folder_can_replace_an_encoder(tiny_clip_dir):
    assert find_encoder("clip", "storybook").name == "clip"
    assert find_encoder("clip", str(tiny_clip_dir)) == tiny_clip_dir
    with pytest.raises(ModelError, match="does not exist; choose another"):
        find_encoder("dino", "nowhere")


def test_a_clip_with_pickled_weights_loads_and_a_malicious_pickle_is_not_executed(tiny_clip_dir, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip_dir, folder)
    (folder / "model.safetensors").unlink()
    torch.save(load_file(tiny_clip_dir / "model.safetensors"), folder / "pytorch_model.bin")
    picture = torch.rand(1, 3, 32, 32)
    ours, stored = Clip.load(folder), Clip.load(tiny_clip_dir)
    weights = stored.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in ours.model.state_dict().items())
    # The weights' place in memory changes the rounding on some CPUs.
    torch.testing.assert_close(ours.images(picture), stored.images(picture), rtol=0, atol=1e-6)

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"logit_scale": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read"):
        Clip.load(folder)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_metric_is_reported_with_the_closest_name():
    with pytest.raises(InputError, match="no metric 'clip_imge'; did you mean clip_image"):
        chosen_metrics(["clip_imge"])
    assert list(chosen_metrics(["sharpness"])) == ["sharpness", "exact_edges"], "and what weighs it"


def test_every_metric_has_a_description_and_a_direction():
    assert all(m.about for m in METRICS.values() if not m.hidden)
    assert METRICS["l1_outside"].higher is False and METRICS["psnr_inside"].higher is False
