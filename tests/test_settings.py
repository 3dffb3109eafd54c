import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from ip2p.base.errors import InputError
from ip2p.editing.chain import edit_chain
from ip2p.editing.grid import Axis, draw_grid
from ip2p.pictures.infotext import EditRecord, format_infotext, parse_infotext
from ip2p.settings import (
    AUTO_MASK,
    COMMAND_LINE,
    EditSettings,
    ModelSettings,
    Settings,
    interface_body,
    meta_of,
    numeric_settings,
    setting,
    settings_from_body,
    voice_of,
)
from ip2p.synth.settings import SynthPairsConfig


class Sharpened(EditSettings):
    """A new setting needs only this field."""

    sharpness: float | None = setting(
        None,
        "how sharp the result is",
        ge=0,
        le=10,
        fallback=1.0,
        group="Guidance",
        label="Sharpness",
        names={"a1111": "sharpen"},
    )


class Body(Settings):
    """An edit."""

    image: str = setting(help="the picture")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"steps is 0; it must be 1 to 1000\. Try steps=20\."),
        ({"steps": "x"}, r"steps is 'x'; it must be a whole number from 1 to 1000\."),
        ({"steps": 1.5}, r"steps is 1\.5; it must be a whole number"),
        ({"text_cfg": 500}, r"text_cfg is 500; it must be a number from 0 to 100\. Try text_cfg=7\.5\."),
        ({"text_cfg": math.nan}, r"text_cfg is nan; it must be a number from 0 to 100"),
        ({"sampler": "ddim"}, r"sampler is 'ddim'; choose one of: euler_ancestral, euler, dpmpp_2m"),
        ({"size": "big"}, r"size is 'big'; write a side, or width and height as 576x384"),
        ({"size": (64, 5000)}, r"size is \(64, 5000\); it must be 16 to 4096"),
        ({"cfg_interval": (0, 2)}, r"cfg_interval is 2; it must be 2 numbers from 0 to 1"),
        ({"cfg_interval": "0.5"}, r"cfg_interval is .*; it must be 2 numbers"),
        ({"cfg_interval": (0.9, 0.1)}, r"cfg_interval 0\.9 0\.1 is empty"),
        ({"negative": 3}, r"negative is 3; it must be text"),
        ({"mask": "sky.png", "auto_mask": 0.5}, r"mask and auto_mask both select the region"),
        ({"guidance_scale": 7}, r"guidance_scale is called text_cfg here"),
        ({"image_guidance_scale": 7}, r"image_guidance_scale is called image_cfg here"),
        ({"num_inference_steps": 7}, r"num_inference_steps is called steps here"),
        ({"stepz": 7}, r"'stepz' is not a setting; did you mean steps\?"),
    ],
)
def test_an_invalid_value_is_one_line_with_the_limit_and_the_next_step(values, message):
    with pytest.raises(InputError, match=message) as caught:
        EditSettings(**values)
    assert "\n" not in str(caught.value)


def test_messages_name_a_setting_as_the_caller_writes_it():
    with pytest.raises(InputError, match=r"^--text-cfg is -1; .* Try --text-cfg 7\.5\.$"):
        EditSettings.read({"text_cfg": -1}, COMMAND_LINE)
    with pytest.raises(InputError, match=r"^guidance_scale is -1; ") as caught:
        EditSettings.read({"text_cfg": -1}, voice_of("openai"))
    assert caught.value.field == "text_cfg"


def test_none_resolves_to_the_model_cards_value_or_the_default():
    class Card:
        text_cfg, image_cfg = 3.0, None

    resolved = EditSettings(image_cfg=None, steps=7).resolved(Card())
    assert (resolved.text_cfg, resolved.image_cfg, resolved.steps) == (3.0, 1.5, 7)
    assert (resolved.sampler, resolved.schedule) == ("euler_ancestral", "linspace")
    assert EditSettings().resolved().text_cfg == 7.5


def test_settings_are_read_from_text_and_from_numpy():
    words = {"steps": "7", "size": "576x384", "cfg_interval": "0.2 0.9", "text_cfg": "3"}
    found = EditSettings.read(words)
    assert (found.steps, found.size, found.cfg_interval, found.text_cfg) == (7, (576, 384), (0.2, 0.9), 3.0)
    assert EditSettings(steps=np.int64(7), text_cfg=np.float32(0.5)).steps == 7


def test_a_path_is_accepted_where_text_is_expected():
    found = ModelSettings.read({"model": Path("some/folder"), "vae": Path("vae.safetensors")})
    assert (found.model, found.vae) == (str(Path("some/folder")), "vae.safetensors")
    with pytest.raises(InputError, match="steps is .*; it must be"):
        EditSettings.read({"steps": Path("10")})


def test_auto_mask_true_is_the_default_threshold():
    assert EditSettings(auto_mask=True).auto_mask == AUTO_MASK == 0.5
    assert EditSettings(auto_mask=False).auto_mask is None


def test_a_former_name_of_a_setting_is_still_accepted():
    assert EditSettings(spacing="karras").schedule == "karras"
    assert EditSettings().changed(spacing="karras").schedule == "karras"


def test_a_path_may_name_a_model():
    assert SynthPairsConfig.read({"parts_from": Path("a") / "b"}).parts_from == str(Path("a") / "b")


def test_every_setting_has_a_help_text_and_a_group():
    for kind in (EditSettings, ModelSettings):
        for name, found in kind.model_fields.items():
            assert found.description, name
            assert meta_of(found).group != "Other options", name


def test_part_returns_the_settings_of_one_class():
    class Both(EditSettings, ModelSettings):
        pass

    both = Both(steps=3, model="x")
    assert both.part(EditSettings) == EditSettings(steps=3)
    assert both.part(ModelSettings) == ModelSettings(model="x")


# --- a new field exists everywhere ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("interface", "name"), [(None, "sharpness"), ("openai", "sharpness"), ("a1111", "sharpen")]
)
def test_a_new_setting_is_in_the_body_and_the_schema_of_each_interface(interface, name):
    kind = interface_body(Body, interface, settings=Sharpened)
    shown = kind.model_json_schema()["properties"][name]
    assert shown["description"] == "how sharp the result is"
    assert {"type": "number", "minimum": 0, "maximum": 10} in shown["anyOf"]
    body = kind.model_validate({"image": "page", name: 3})
    assert settings_from_body(body, interface, settings=Sharpened).sharpness == 3
    with pytest.raises(InputError, match=f"^{name} is 11; it must be a number from 0 to 10"):
        kind.model_validate({"image": "page", name: 11})


def test_a_new_numeric_setting_is_a_grid_axis():
    assert "sharpness" in numeric_settings(Sharpened)


def test_a_new_setting_is_written_to_and_read_from_the_infotext():
    class SharpRecord(EditRecord, Sharpened):
        pass

    record = SharpRecord(instruction="make it snow", sharpness=2.5, size=(64, 64)).resolved()
    text = format_infotext(record)
    assert "Sharpness: 2.5" in text
    assert parse_infotext(text, SharpRecord) == record


def test_the_generated_argument_types_are_up_to_date():
    tool = runpy.run_path(str(Path(__file__).parents[1] / "scripts/make_arguments.py"))
    for path, classes in tool["FILES"].items():
        assert path.read_text(encoding="utf-8") == tool["write_arguments"](classes), path
    sharpened = tool["EDIT"]._replace(kind=Sharpened)
    assert "    sharpness: float | None\n" in tool["write_arguments"]([sharpened])


def test_the_editor_grids_chains_and_batches_accept_a_new_setting(tiny_editor, page):
    settings = Sharpened(sharpness=2.0, steps=1, size=32)
    assert tiny_editor.resolved(settings, "make it night").sharpness == 2.0
    (made,) = tiny_editor.edit(page, "make it night", settings=settings)
    (also,) = tiny_editor.edit_batch([page], "make it night", seeds=[0], settings=settings)
    assert made.tobytes() == also.tobytes()
    (step,) = edit_chain(tiny_editor, page, ["make it night"], settings=settings)
    assert step.image.tobytes() == made.tobytes()
    axes = [Axis(setting="sharpness", values=(1.0, 2.0)), Axis(setting="seed", values=(0, 1))]
    assert draw_grid(
        tiny_editor, page, "make it night", columns=axes[0], rows=axes[1], settings=settings
    ).size > (64, 64)
