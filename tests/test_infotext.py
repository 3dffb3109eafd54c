import re

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.pictures.exif import EXIF, USER_COMMENT
from ip2p.pictures.images import save_image
from ip2p.pictures.infotext import (
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    EditRecord,
    decode_comment,
    format_infotext,
    parse_infotext,
    read_infotext,
)
from ip2p.settings import meta_of

SNOW = EditRecord(
    instruction="make it snow",
    negative="blurry",
    steps=50,
    sampler="euler_ancestral",
    text_cfg=7.5,
    image_cfg=1.5,
    seed=42,
    size=(512, 512),
    model="x",
    version="ip2p 0.1",
).resolved()
TEXT = """make it snow
Negative prompt: blurry
Steps: 50, Sampler: Euler a, CFG scale: 7.5, Image CFG scale: 1.5, Seed: 42, Size: 512x512, Model: x, \
Version: ip2p 0.1"""


def test_the_three_lines_are_in_a1111s_format():
    assert format_infotext(SNOW) == TEXT
    assert parse_infotext(TEXT) == SNOW


def test_an_empty_negative_prompt_has_no_line():
    bare = SNOW.changed(negative="")
    assert "Negative" not in format_infotext(bare)
    assert parse_infotext(format_infotext(bare)) == bare


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40).map(
    lambda text: " ".join(text.split())
)


# Other processes can slow down the generation of inputs.
@how(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    instruction=words.filter(bool),
    negative=words,
    model=words,
    note=words,
    seed=st.integers(0, 2**63 - 1),
    text_cfg=st.floats(0, 100),
    sampler=st.sampled_from(list(SAMPLER_NAMES)),
    schedule=st.sampled_from(list(SCHEDULE_NAMES)),
)
def test_any_settings_are_read_back_as_written(
    instruction, negative, model, note, seed, text_cfg, sampler, schedule
):
    settings = SNOW.changed(
        instruction=instruction,
        negative=negative,
        model=model,
        seed=seed,
        text_cfg=text_cfg,
        sampler=sampler,
        schedule=schedule,
        others={"Mask blur": note},
    )
    assert parse_infotext(format_infotext(settings)) == settings


def test_every_other_setting_is_read_back_and_is_written_only_if_not_the_default():
    settings = SNOW.changed(
        text_cfg_rescale=0.7,
        cfg_interval=(1e-5, 0.9),
        cfg_every=2,
        cache_every=3,
        mask="C:\\masks\\sky, left.png",
        mask_padding=0,
        feather=2.5,
        auto_mask=0.35,
        fit="model",
        background="white",
        revision="main",
        weights="plain",
        vae="stabilityai/sd-vae-ft-mse",
        parts_from="some/base",
        lora=("a.safetensors:0.8", "C:\\b.safetensors"),
        controlnet="canny",
        control_image="edges.png",
        control_scale=0.5,
    )
    assert parse_infotext(format_infotext(settings)) == settings
    fields = EditRecord.model_fields
    changed = {name for name in fields if getattr(SNOW, name) != getattr(settings, name)}
    labeled = {name for name in fields if meta_of(fields[name]).label}
    always = {name for name in labeled if meta_of(fields[name]).written != "changed"}
    assert changed == labeled - always - {"schedule"}  # so that a new field is not forgotten
    assert format_infotext(SNOW) == TEXT


def test_a_parsed_text_is_rewritten_identically_and_can_be_changed():
    text = format_infotext(SNOW.changed(others={"Mask blur": "4"}))
    record = parse_infotext(text)
    assert format_infotext(record) == text
    assert parse_infotext(format_infotext(record.changed(vae="x"))) == record.changed(vae="x")


def test_values_with_commas_colons_and_newlines_are_quoted():
    text = format_infotext(SNOW.changed(model='a, b: "c"\nd'))
    assert 'Model: "a, b: \\"c\\"\\nd"' in text
    assert parse_infotext(text).model == 'a, b: "c"\nd'


def test_a_multiline_instruction_is_joined_into_one_line():
    text = format_infotext(SNOW.changed(instruction="make it\nSteps: 3,\n night"))
    assert text.splitlines()[0] == "make it Steps: 3, night"
    assert parse_infotext(text).steps == 50


def test_the_text_of_a1111_is_parsed():
    text = """make it
night
Negative prompt: blurry,
grey
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: abc, Model: x, \
Image CFG scale: 1.2"""
    found = parse_infotext(text)
    assert (found.instruction, found.negative) == ("make it\nnight", "blurry,\ngrey")
    assert (found.sampler, found.schedule, found.size) == ("dpmpp_2m", "karras", (512, 768))
    assert found.others == {"Model hash": "abc"}


@pytest.mark.parametrize(
    ("theirs", "ours", "written"),
    [
        ("DPM++ 2M, Schedule type: Automatic", ("dpmpp_2m", "karras"), "Karras"),
        ("DPM++ 2M", ("dpmpp_2m", "karras"), "Karras"),
        ("DPM++ 2M, Schedule type: Uniform", ("dpmpp_2m", "linspace"), "Uniform"),
        ("DPM++ 2M, Schedule type: Karras", ("dpmpp_2m", "karras"), "Karras"),
        ("DPM++ 2M, Schedule type: Exponential", ("dpmpp_2m", "exponential"), "Exponential"),
        ("DPM++ 2M Exponential", ("dpmpp_2m", "exponential"), "Exponential"),  # before 1.9
        ("Euler a, Schedule type: Automatic", ("euler_ancestral", "linspace"), None),
        ("Euler a, Schedule type: Uniform", ("euler_ancestral", "linspace"), None),
        ("Euler, Schedule type: Karras", ("euler", "karras"), "Karras"),
        ("Euler Karras", ("euler", "karras"), "Karras"),
        ("Euler, Schedule type: SGM Uniform", ("euler", "trailing"), "SGM Uniform"),
    ],
)
def test_schedules_map_to_a1111s_names_and_back(theirs, ours, written):
    found = parse_infotext(TEXT.replace("Euler a", theirs))
    assert (found.sampler, found.schedule) == ours
    text = format_infotext(found)
    assert parse_infotext(text) == found
    assert re.findall(r"Schedule type: ([\w ]+)", text) == ([] if written is None else [written])


@pytest.mark.parametrize(
    "text", ["", "hello", "hello\nworld", TEXT.replace("Seed: 42, ", ""), TEXT.replace("50", "many")]
)
def test_text_without_settings_is_an_error(text):
    with pytest.raises(InputError, match="settings"):
        parse_infotext(text)


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp"])
@pytest.mark.parametrize("instruction", ["make it snow", "mach es grün, bitte: 雪"])
def test_every_format_stores_the_settings(tmp_path, ending, instruction):
    text = format_infotext(SNOW.changed(instruction=instruction))
    image = Image.new("RGB", (32, 32))
    image.info["parameters"] = text
    path = save_image(image, tmp_path / f"out.{ending}")
    assert read_infotext(path) == text


def test_settings_of_an_earlier_edit_are_replaced(tmp_path):
    image = Image.new("RGB", (32, 32))
    image.info["parameters"] = "old\nSteps: 1"
    first = save_image(image, tmp_path / "first.jpg")
    with Image.open(first) as opened:
        image.info = {"exif": opened.info["exif"], "parameters": TEXT}
    assert read_infotext(save_image(image, tmp_path / "second.jpg")) == TEXT
    png = save_image(image, tmp_path / "second.png")
    assert read_infotext(png) == TEXT
    with Image.open(png) as opened:
        assert USER_COMMENT not in opened.getexif().get_ifd(EXIF)


def test_read_infotext_returns_none_for_a_picture_without_settings(tmp_path):
    path = tmp_path / "plain.png"
    Image.new("RGB", (32, 32)).save(path)
    assert read_infotext(path) is None


def test_a_file_that_is_missing_or_not_a_picture_is_an_error(tmp_path):
    (tmp_path / "page.png").write_text("hello")
    with pytest.raises(InputError, match=r"page\.png cannot be read"):
        read_infotext(tmp_path / "page.png")
    with pytest.raises(InputError, match=r"Did you mean .*page\.png"):
        read_infotext(tmp_path / "pag.png")


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "make it snow".encode("utf-16-be"),
        b"UNICODE\0" + "make it snow".encode("utf-16-le"),
        b"ASCII\0\0\0make it snow",
        b"\0\0\0\0\0\0\0\0make it snow",
        "make it snow",
    ],
)
def test_exif_comments_of_other_programs_are_decoded(comment):
    assert decode_comment(comment) == "make it snow"
