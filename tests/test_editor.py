import io
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import ip2p
from ip2p.base.errors import InputError, ModelError, ResourceError
from ip2p.diffusion.samplers import SAMPLERS
from ip2p.editing.editor import Editor
from ip2p.pictures.images import load_image, save_image, to_tensor
from ip2p.pictures.infotext import parse_infotext, read_infotext
from ip2p.settings import EditSettings

FAST = {"steps": 3}


def pixels(image):
    return np.asarray(image).astype(int)


def test_an_edit_returns_one_picture_per_seed_at_the_input_size(tiny_editor):
    picture = Image.new("RGB", (100, 70), "red")
    results = tiny_editor.edit(picture, "make it night", seeds=[1, 2], **FAST)
    assert [(image.mode, image.size) for image in results] == [("RGB", (100, 70))] * 2
    assert (pixels(results[0]) != pixels(results[1])).any()


def test_omitted_guidance_scales_default_to_the_models(tiny_editor):
    def scales(text_cfg, image_cfg):
        settings = tiny_editor.resolved(changes={"text_cfg": text_cfg, "image_cfg": image_cfg})
        return settings.text_cfg, settings.image_cfg

    assert scales(None, None) == (7.5, 1.5)
    assert scales(2.0, None) == (2.0, 1.5)
    assert scales(None, 0.0) == (7.5, 0.0)


TUNED = {"steps": 3, "sampler": "euler", "schedule": "trailing", "text_cfg": 2.5, "image_cfg": 1.25}


def test_an_edit_without_settings_uses_and_records_those_of_the_model_card(tiny_editor, page):
    tuned = Editor(replace(tiny_editor.bundle, card=replace(tiny_editor.bundle.card, **TUNED)))
    [edited] = tuned.edit(page, "make it night", seeds=[4])
    [same] = tiny_editor.edit(page, "make it night", seeds=[4], **TUNED)
    [batched] = tuned.edit_batch([page], "make it night", seeds=[4])
    assert edited.tobytes() == same.tobytes() == batched.tobytes()
    record = parse_infotext(edited.info["parameters"])
    assert {name: getattr(record, name) for name in TUNED} == TUNED
    assert "Schedule type: SGM Uniform" in edited.info["parameters"]


def test_the_same_seed_gives_the_same_picture(tiny_editor, page):
    first, second = (tiny_editor.edit(page, "make it night", seeds=[9], **FAST)[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_k_of_a_batch_matches_the_same_seed_edited_alone(tiny_editor, page, sampler):
    batch = tiny_editor.edit(page, "make it night", seeds=[1, 2, 3], sampler=sampler, batch_size=3, **FAST)
    alone = tiny_editor.edit(page, "make it night", seeds=[2], sampler=sampler, **FAST)
    pairs = tiny_editor.edit(page, "make it night", seeds=[1, 2, 3], sampler=sampler, batch_size=2, **FAST)
    assert abs(pixels(batch[1]) - pixels(alone[0])).max() <= 1
    assert all(abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(batch, pairs, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_a_cpu_one_of_several_images_is_reproduced_exactly(tiny_model_dir, page, dtype):
    editor = Editor.load(tiny_model_dir, device="cpu", dtype=dtype)
    several = editor.edit(page, "make it night", seeds=[1, 2, 3], **FAST)
    again = editor.edit(page, "make it night", seeds=[2], **FAST)
    assert (pixels(several[1]) == pixels(again[0])).all()


def test_every_setting_changes_the_result(tiny_editor, page):
    plain = tiny_editor.edit(page, "make it night", **FAST)[0]
    for change in (
        {"text_cfg": 1.0},
        {"image_cfg": 0.5},
        {"negative": "grey"},
        {"sampler": "euler"},
        {"spacing": "karras"},
        {"spacing": "trailing"},
        {"seeds": [5]},
        {"size": 32},
        {"steps": 4},
        {"text_cfg_rescale": 0.7},
        {"cfg_interval": (0.4, 1.0)},
        {"cfg_every": 2},
        {"cache_every": 2},
    ):
        other = tiny_editor.edit(page, "make it night", **(FAST | change))[0]
        assert (pixels(plain) != pixels(other)).any(), change


def test_an_edit_can_be_reproduced_from_its_file(tiny_editor, tmp_path):
    picture = Image.effect_noise((90, 60), 60).convert("RGB")
    edited = tiny_editor.edit(
        picture,
        "make it night",
        seeds=[4],
        negative="grey",
        image_cfg=1.2,
        sampler="dpmpp_2m",
        spacing="karras",
        **FAST,
    )[0]
    record = parse_infotext(read_infotext(save_image(edited, tmp_path / "night.png")))
    again = tiny_editor.edit(
        picture,
        record.instruction,
        negative=record.negative,
        text_cfg=record.text_cfg,
        image_cfg=record.image_cfg,
        steps=record.steps,
        sampler=record.sampler,
        schedule=record.schedule,
        seeds=[record.seed],
        size=record.size,
    )[0]
    assert again.tobytes() == edited.tobytes()
    assert record.version == f"ip2p {ip2p.__version__}"
    assert record.model == "tiny"


def test_exif_is_kept_and_orientation_is_applied_once(tiny_editor, tmp_path, page):
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "someone"
    page.resize((64, 48)).save(tmp_path / "in.jpg", exif=exif)
    result = tiny_editor.edit(tmp_path / "in.jpg", "make it night", **FAST)[0]
    assert result.size == (48, 64)
    with Image.open(save_image(result, tmp_path / "out.jpg")) as again:
        assert again.getexif()[0x013B] == "someone"
        assert again.getexif().get(0x0112, 1) == 1
    assert load_image(tmp_path / "out.jpg").size == (48, 64)


def test_the_callback_is_called_after_every_step(tiny_editor, page):
    seen = []
    tiny_editor.edit(
        page,
        "make it night",
        seeds=[1, 2],
        steps=3,
        batch_size=2,
        callback=lambda step, steps, x: seen.append((step, steps, x.shape)),
    )
    assert seen == [(step, 3, (2, 4, 16, 16)) for step in (1, 2, 3)]


def test_edit_latents_generates_from_text_without_an_image(tiny_editor):
    from ip2p.base.devices import NoiseStream
    from ip2p.diffusion.schedule import linspace_sigmas

    *_, last = tiny_editor.edit_latents(
        None,
        tiny_editor.encode_text("a cat"),
        tiny_editor.encode_text(""),
        noise=NoiseStream([1, 2], (4, 16, 16)),
        sigmas=linspace_sigmas(tiny_editor.schedule, 2),
    )
    assert last.shape == (2, 4, 16, 16)
    assert not last.requires_grad
    assert torch.isfinite(last).all()


# --- masks and sizes -----------------------------------------------------------------------------


def box_mask(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(("size", "box"), [((64, 64), (20, 10, 50, 60)), ((300, 200), (200, 40, 260, 100))])
def test_outside_the_mask_a_png_equals_the_input_exactly(tiny_editor, tmp_path, size, box):
    picture, mask = Image.effect_noise(size, 60).convert("RGB"), box_mask(size, box)
    mask.save(tmp_path / "mask.png")
    edited = tiny_editor.edit(
        picture, "make it night", mask=tmp_path / "mask.png", mask_padding=10, feather=3, **FAST
    )[0]
    path = save_image(edited, tmp_path / "out.png")
    result, outside = pixels(Image.open(path)), pixels(mask) == 0
    assert result.shape[1::-1] == size
    assert (result[outside] != pixels(picture)[outside]).sum() == 0
    assert (result[~outside] != pixels(picture)[~outside]).mean() > 0.5
    used = edited.info["mask"]
    assert (used.mode, used.size) == ("L", size)
    assert (pixels(used)[outside] == 0).all() and used.getextrema() == (0, 255)
    record = parse_infotext(read_infotext(path))
    assert (record.mask_padding, record.feather) == (10, 3.0)
    again = tiny_editor.edit(
        picture, "make it night", mask=mask, mask_padding=10, feather=3, size=record.size, **FAST
    )[0]
    assert again.tobytes() == edited.tobytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_final_latents_outside_the_mask_equal_the_encoded_picture(tiny_editor, page, sampler):
    seen = []
    mask = box_mask((64, 64), (32, 0, 64, 64))
    tiny_editor.edit(
        page, "make it night", mask=mask, sampler=sampler, callback=lambda *step: seen.append(step[2]), **FAST
    )
    known = tiny_editor.encode_image(to_tensor(page)) * tiny_editor.bundle.latent_scale
    torch.testing.assert_close(seen[-1][..., :8], known[..., :8])
    assert (seen[-1][..., 8:] - known[..., 8:]).abs().mean() > 0.1


def test_a_detected_mask_keeps_the_pixels_outside_and_is_returned(tiny_editor, page):
    plain = tiny_editor.edit(page, "make it night", seeds=[3], **FAST)[0]
    found = tiny_editor.edit(page, "make it night", seeds=[3], auto_mask=0.9, **FAST)[0]
    everything = tiny_editor.edit(page, "make it night", seeds=[3], auto_mask=0.0, **FAST)[0]
    mask = pixels(found.info["mask"])
    assert (pixels(found)[mask == 0] == pixels(page)[mask == 0]).all()
    assert (pixels(found)[mask == 255] == pixels(plain)[mask == 255]).all()
    assert everything.tobytes() == plain.tobytes()
    assert everything.info["mask"].getextrema() == (255, 255)
    assert "mask" not in plain.info
    assert parse_infotext(found.info["parameters"]).auto_mask == 0.9


def test_fit_model_returns_the_models_working_size(tiny_editor):
    picture = Image.effect_noise((300, 200), 60).convert("RGB")
    made = tiny_editor.edit(picture, "make it night", fit="model", **FAST)[0]
    assert made.size == tiny_editor.working_size((300, 200))
    masked = tiny_editor.edit(
        picture, "make it night", fit="model", mask=box_mask((300, 200), (90, 90, 150, 150)), **FAST
    )[0]
    assert masked.size == masked.info["mask"].size == tiny_editor.working_size((124, 124))
    assert parse_infotext(made.info["parameters"]).fit == "model"


def test_both_fits_give_the_same_result_at_the_working_size(tiny_editor, page):
    kinds = [tiny_editor.edit(page, "make it night", fit=fit, **FAST)[0] for fit in ("original", "model")]
    assert kinds[0].tobytes() == kinds[1].tobytes()


def test_a_12_megapixel_photo_keeps_its_size_profile_location_and_detail(tiny_editor, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.5), 3: "E", 4: (13.0, 24.0, 36.0)})
    exif.get_ifd(0x8769).update({0x9003: "2026:11:21 04:00:00", 0xA002: 4000, 0xA003: 3000})
    small = np.random.default_rng(0).integers(30, 220, (750, 1000, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((4000, 3000), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "in.jpg", quality=92, exif=exif, icc_profile=profile)
    upright = load_image(tmp_path / "in.jpg")
    assert upright.size == (3000, 4000)
    mask = box_mask((3000, 4000), (1000, 1500, 1800, 2600))
    made = tiny_editor.edit(tmp_path / "in.jpg", "make it night", mask=mask, steps=1)[0]
    with Image.open(save_image(made, tmp_path / "out.jpg")) as file:
        assert (file.format, file.size) == ("JPEG", (3000, 4000))
        assert file.info["icc_profile"] == profile
        kept = file.getexif()
        assert (kept.get(0x0112, 1), kept[0x010F]) == (1, "a camera")
        assert dict(kept.get_ifd(0x8825)) == {1: "N", 2: (52, 31, 12.5), 3: "E", 4: (13, 24, 36)}
        details = kept.get_ifd(0x8769)
        assert (details[0x9003], details[0xA002], details[0xA003]) == ("2026:11:21 04:00:00", 3000, 4000)
        difference = np.asarray(file).astype(np.int16) - np.asarray(upright)
    outside = np.asarray(mask) == 0
    assert 10 * np.log10(255**2 / np.square(difference[outside], dtype=np.float64).mean()) >= 40
    assert abs(difference[~outside]).mean() > 5


# --- several pictures ----------------------------------------------------------------------------


def noisy(*size):
    return Image.effect_noise(size, 60).convert("RGB")


@pytest.mark.parametrize("settings", [{}, {"auto_mask": 0.5}, {"negative": "grey", "sampler": "dpmpp_2m"}])
def test_each_picture_of_a_batch_matches_its_edit_alone(tiny_editor, page, settings):
    pictures = [page, noisy(64, 64), noisy(200, 100), noisy(70, 70)]
    texts = ["make it night", "a cat", "make it night", "make it night"]
    batch = tiny_editor.edit_batch(pictures, texts, seeds=[4, 5, 6, 7], **FAST, **settings)
    for picture, text, seed, made in zip(pictures, texts, [4, 5, 6, 7], batch, strict=True):
        alone = tiny_editor.edit(picture, text, seeds=[seed], **FAST, **settings)[0]
        assert made.size == picture.size
        assert abs(pixels(made) - pixels(alone)).max() <= 1
        assert made.info["parameters"] == alone.info["parameters"]


def test_pictures_of_the_same_working_size_are_batched_together(tiny_editor, page):
    rows = []
    tiny_editor.edit_batch(
        [page, noisy(64, 64), noisy(200, 100)],
        "make it night",
        seeds=[1, 2, 3],
        callback=lambda step, steps, x: rows.append(len(x)),
        steps=1,
    )
    assert rows == [2, 1]


def test_a_batch_needs_a_seed_and_an_instruction_for_every_picture(tiny_editor, page):
    with pytest.raises(InputError, match="2 pictures, 2 instructions and 1 seeds"):
        tiny_editor.edit_batch([page, page], "make it night", seeds=[1])
    with pytest.raises(InputError, match="instruction is empty"):
        tiny_editor.edit_batch([page, page], ["make it night", " "], seeds=[1, 2])


def test_an_explicit_size_is_used_as_is_and_must_be_a_multiple_of_8(tiny_editor, page):
    assert tiny_editor.working_size((64, 64), (48, 32)) == (48, 32)
    with pytest.raises(InputError, match=r"50x32 .* multiples of 8\. Try 48x32"):
        tiny_editor.edit(page, "make it night", size=(50, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 10**9}, "steps is 1000000000"),
        ({"text_cfg": float("nan")}, "nan"),
        ({"image_cfg": float("inf")}, "inf"),
        ({"sampler": "magic"}, "euler_ancestral, euler, dpmpp_2m"),
        ({"spacing": "magic"}, "linspace, karras"),
        ({"seeds": []}, "no seeds"),
        ({"seeds": [-1]}, "Seed -1"),
        ({"batch_size": 0}, "batch"),
        ({"size": 3}, "size is 3"),
        ({"fit": "magic"}, "original, model"),
        ({"auto_mask": 1.5}, "auto_mask is 1.5"),
        ({"mask": Image.new("L", (64, 64), "white"), "auto_mask": 0.5}, "one of them"),
        ({"mask": Image.new("L", (64, 64))}, "all black"),
        ({"mask": Image.new("L", (32, 64), "white")}, "mask is 32x64 pixels and the picture 64x64"),
        ({"mask": "mask-that-is-missing.png"}, "no such file"),
        ({"mask_padding": -1}, "mask_padding is -1"),
        ({"feather": float("nan")}, "feather is nan"),
        ({"text_cfg_rescale": 2.0}, "rescale is 2"),
        ({"cfg_interval": (0.9, 0.2)}, "interval 0.9 0.2 is empty"),
        ({"control_image": Image.new("RGB", (64, 64))}, "needs a ControlNet"),
    ],
)
def test_invalid_settings_are_errors(tiny_editor, page, change, message):
    with pytest.raises(InputError, match=message):
        tiny_editor.edit(page, "make it night", **change)


@pytest.mark.parametrize("instruction", ["", "  \n"])
def test_an_empty_instruction_is_an_error(tiny_editor, page, instruction):
    with pytest.raises(InputError, match="instruction is empty"):
        tiny_editor.edit(page, instruction)


def test_text_beyond_the_token_limit_is_reported_and_truncated(tiny_editor):
    fits = "night " * 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = tiny_editor.encode_text(fits)
    with pytest.warns(UserWarning, match=r"77 tokens; this part has no effect: 'make it SNOW'"):
        cut = tiny_editor.encode_text(fits + "make it SNOW")
    assert torch.equal(kept, cut)


def test_running_out_of_memory_suggests_a_smaller_size(tiny_editor, page, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny_editor, "encode_image", full)
    with pytest.raises(ResourceError, match="Out of memory at 64x64.*such as 32"):
        tiny_editor.edit(page, "make it night")


def test_a_model_that_overflows_is_an_error_and_not_a_black_picture(tiny_editor, page, monkeypatch):
    monkeypatch.setattr(tiny_editor, "decode", lambda latents: torch.full((1, 3, 64, 64), float("nan")))
    with pytest.raises(ModelError, match="overflow.*dtype fp32"):
        tiny_editor.edit(page, "make it night", **FAST)


def test_a_picture_unlike_the_training_data_gives_one_warning(tiny_model_dir, tmp_path, page):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "tiny")
    (folder / "ip2p.json").write_text(json.dumps({"name": "storybook", "native_size": 32, "known_psnr": 90}))
    editor = Editor.load(folder, device="cpu", dtype="fp32")
    assert editor.working_size((64, 64)) == (32, 32)
    with pytest.warns(UserWarning, match="unlike the training data of storybook.*timbrooks/instruct-pix2pix"):
        editor.edit(page, "make it night", **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.edit(page, "make it night", **FAST)
    (folder / "ip2p.json").write_text(json.dumps({"name": "storybook", "native_size": 32, "known_psnr": 0}))
    near = Editor.load(folder, device="cpu", dtype="fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near.edit(page, "make it night", **FAST)


def test_bf16_stays_close_to_fp32(tiny_model_dir, tiny_editor, page):
    small = Editor.load(tiny_model_dir, device="cpu", dtype="bf16")
    assert small.bundle.unet.dtype == torch.bfloat16
    assert small.bundle.vae.dtype == torch.bfloat16
    exact = tiny_editor.edit(page, "make it night", text_cfg=2.0, image_cfg=1.5, **FAST)[0]
    rough = small.edit(page, "make it night", text_cfg=2.0, image_cfg=1.5, **FAST)[0]
    assert abs(pixels(exact) - pixels(rough)).mean() < 4


def test_ip2p_edit_gives_the_same_picture_on_a_second_call(tiny_model_dir, page):
    first = ip2p.edit(page, "make it night", model=tiny_model_dir, device="cpu", dtype="fp32", **FAST)
    second = ip2p.edit(page, "make it night", model=tiny_model_dir, device="cpu", dtype="fp32", **FAST)
    assert first[0].tobytes() == second[0].tobytes()
    assert ip2p.Editor is Editor


def test_arguments_override_a_settings_object(tiny_editor, page):
    settings = EditSettings(text_cfg=2.0, seed=9, **FAST)
    (made,) = tiny_editor.edit(page, "make it night", settings=settings, image_cfg=1.0)
    found = parse_infotext(made.info["parameters"])
    assert (found.text_cfg, found.image_cfg, found.seed) == (2.0, 1.0, 9)
    assert (
        made.tobytes()
        == tiny_editor.edit(page, "make it night", seeds=[9], text_cfg=2.0, image_cfg=1.0, **FAST)[
            0
        ].tobytes()
    )


def test_a_single_number_for_seeds_is_an_error_that_suggests_a_list(tiny_editor, page):
    with pytest.raises(InputError, match=r"seeds is 1; .* Try seeds=\[1\]"):
        tiny_editor.edit(page, "make it night", seeds=1)


def test_diffusers_argument_names_are_errors_that_name_ours(tiny_editor, page):
    with pytest.raises(InputError, match="guidance_scale is called text_cfg here"):
        tiny_editor.edit(page, "make it night", guidance_scale=7)


def test_an_editor_and_its_results_have_a_descriptive_repr(tiny_editor, page):
    results = tiny_editor.edit(page, "make it night", seeds=[1, 2], **FAST)
    assert repr(results) == "<2 edited pictures: seed 1 (64x64), seed 2 (64x64)>"
    assert Image.open(io.BytesIO(results._repr_png_())).width > 2 * 64
    assert "float32 on cpu" in repr(tiny_editor) and "text_cfg=7.5" in repr(tiny_editor)
