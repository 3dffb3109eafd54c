"""Settings in A1111's format, as read by ip2p and by two readers, `sd-parsers` and `sd-prompt-reader`."""

import io
import json

import piexif
import piexif.helper
import pytest
from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager
from sd_prompt_reader.image_data_reader import ImageDataReader

from ip2p.pictures.images import save_image
from ip2p.pictures.infotext import SAMPLER_NAMES, EditRecord, format_infotext, parse_infotext, read_infotext

# Instruction, negative prompt, and settings that differ from the defaults.
LINES: list[tuple[str, str, dict]] = [
    ("make it snow", "", {}),
    ("make it snow", "blurry", {"steps": 50, "sampler": "euler_ancestral", "seed": 0}),
    ("red hat, blue coat, green shoes", "text, watermark, jpeg artifacts", {"seed": 2**32 - 1}),
    ('write "hello, world" on the sign', 'the word "sale"', {"model": 'my "best" model'}),
    ("it's the cat's hat", "don't", {"model": "it's"}),
    ("turn it into a poster: bold, loud", "style: photo", {"model": "a: b, c"}),
    ("make it night\nand add a moon", "sun\nclouds, birds", {"sampler": "euler"}),
    ("one\n\ntwo\n  three", "", {"text_cfg": 1.0}),
    ("mach es Winter, größer, süß", "unscharf, häßlich", {"model": "Märchen"}),
    ("变成雪天，加一只猫", "模糊", {"model": "模型-v1.5"}),
    ("雪を降らせて", "ぼやけた", {"seed": 1}),
    ("сделай зиму", "размыто", {"model": "модель, вторая"}),
    ("اجعلها تثلج", "ضبابي", {}),
    ("add a 🦊 and a 👩‍👩‍👧", "🚫", {"model": "fox 🦊"}),
    ("cafe\u0301 au lait", "nai\u0308ve", {}),  # combining accents stay as they are
    ("(very:1.2) [soft] {a|b} <lora:snow:0.8>", "((ugly))", {"text_cfg": 12.5}),
    (r"C:\new\table and a \n that stays", r"back\slash", {"model": r"C:\models\x.safetensors"}),
    ("Steps: 20, Sampler: none, Seed: 3 on a sign", "Seed: 5, Steps: 2", {"seed": 77}),
    ("100% bigger & <b>bold</b> #1; a=b", "50%", {"image_cfg": 1.25}),
    ("tab\tand   many   blanks", "\ttab", {}),
    ("x" * 600, "y, " * 100 + "z", {"steps": 7}),
    ("smaller", "", {"sampler": "dpmpp_2m", "schedule": "karras", "text_cfg_rescale": 0.7}),
    ("draw it", "", {"mask": "my mask, final.png", "feather": 3, "size": (768, 512)}),
    (
        "wider",
        "low quality",
        {"others": {"Lora hashes": "snow: 1a2b, fox: 3c4d", "Model hash": "abcdef1234", "Note": "a\nb"}},
    ),
]
IDS = [f"{k:02}" for k in range(1, len(LINES) + 1)]
ENDINGS = ("png", "jpg", "webp")


def record_of(instruction, negative, more):
    defaults = {"steps": 20, "sampler": "dpmpp_2m", "text_cfg": 7.5, "image_cfg": 1.5, "seed": 42}
    defaults |= {"size": (64, 48), "model": "x", "schedule": "linspace"}
    return EditRecord(instruction=instruction, negative=negative, **{**defaults, **more}).resolved()


def flat(text):
    return " ".join(text.split())


def prompt_reader_can_read(text, ending):
    """Whether `sd-prompt-reader` can read a text; in EXIF, it first assumes the wrong byte order.

    That fails for some letters, in A1111's own files too; we cannot avoid it.
    """
    try:
        return ending == "png" or bool(text.encode("utf-16-be").decode("utf-16-le"))
    except UnicodeDecodeError:
        return False


OPENED = []  # `sd-parsers` caches by a picture's memory address, so none may be freed


def read_with_both_readers(path):
    """What the two readers return: prompt, negative prompt, sampler, seed, steps, text scale."""
    OPENED.append(Image.open(io.BytesIO(path.read_bytes())))
    info = ParserManager().parse(OPENED[-1])
    (sampler,) = info.samplers
    names = ("seed", "steps", "cfg_scale")
    one = (info.full_prompt, info.full_negative_prompt or "", sampler.name)
    one += tuple(sampler.parameters[name] for name in names)
    read = ImageDataReader(str(path))
    if not prompt_reader_can_read(read_infotext(path), path.suffix[1:]):
        return one, one
    assert read.status.name == "READ_SUCCESS" and read.tool == "A1111 webUI"
    two = (read.positive, read.negative, read.parameter["sampler"])
    return one, two + tuple(read.parameter[name] for name in ("seed", "steps", "cfg"))


def expected(record, instruction, negative):
    numbers = (str(record.seed), str(record.steps), f"{record.text_cfg:g}")
    return (instruction, negative, SAMPLER_NAMES[record.sampler], *numbers)


def test_the_24_settings_lines_contain_every_difficult_character():
    assert len(LINES) == 24
    all_text = "".join(format_infotext(record_of(*line)) for line in LINES)
    assert all(sign in all_text for sign in ",:\"'\\雪🦊<{[(é".replace("é", "\u0301"))
    assert any("\n" in line[0] for line in LINES) and any("\n" in line[1] for line in LINES)


def test_sd_prompt_reader_can_read_nearly_all_of_the_lines():
    texts = [format_infotext(record_of(*line)) for line in LINES]
    assert sum(prompt_reader_can_read(text, "jpg") for text in texts) >= 20


@pytest.mark.parametrize("line", LINES, ids=IDS)
def test_our_settings_are_read_by_both_readers_and_by_us(tmp_path, line):
    record = record_of(*line)
    image = Image.new("RGB", (64, 48), "navy")
    image.info["parameters"] = format_infotext(record)
    for ending in ENDINGS:
        path = save_image(image, tmp_path / f"out.{ending}")
        values = expected(record, flat(line[0]), flat(line[1]))
        assert read_with_both_readers(path) == (values, values), ending
        text = read_infotext(path)
        assert text is not None and parse_infotext(text) == record.changed(
            instruction=flat(line[0]), negative=flat(line[1])
        )


def a1111_text(record, instruction, negative):
    """The output of A1111's `create_infotext`: texts as they are, values with , : or a newline as JSON."""

    def quoted(value):
        return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value

    fields = {"Steps": str(record.steps), "Sampler": SAMPLER_NAMES[record.sampler]}
    fields |= {"Schedule type": "Karras" if record.schedule == "karras" else "Uniform"}
    fields |= {"CFG scale": f"{record.text_cfg:g}", "Image CFG scale": f"{record.image_cfg:g}"}
    fields |= {"Seed": str(record.seed), "Size": "{}x{}".format(*record.size)}
    fields |= {"Model hash": "0a1b2c3d4e", "Model": record.model, **record.others, "Version": "v1.10.1"}
    last = ", ".join(f"{name}: {quoted(value)}" for name, value in fields.items())
    return "\n".join([instruction, *([f"Negative prompt: {negative}"] if negative else []), last])


@pytest.mark.parametrize("line", LINES, ids=IDS)
def test_a1111_settings_are_read_by_us_as_by_both_readers(tmp_path, line):
    record = record_of(*line)
    instruction, negative = line[0].strip(), line[1].strip()
    text = a1111_text(record, instruction, negative)
    image = Image.new("RGB", (64, 48), "navy")
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("parameters", text)
    image.save(tmp_path / "a.png", pnginfo=chunk)
    comment = piexif.helper.UserComment.dump(text, encoding="unicode")
    block = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}})
    for ending in ENDINGS[1:]:
        image.save(tmp_path / f"a.{ending}")
        piexif.insert(block, str(tmp_path / f"a.{ending}"))
    for ending in ENDINGS:
        path = tmp_path / f"a.{ending}"
        found = read_infotext(path)
        assert found == text
        ours = parse_infotext(found)
        values = expected(ours, ours.instruction, ours.negative)
        assert read_with_both_readers(path) == (values, values), ending
        assert (ours.instruction, ours.negative) == (instruction, negative)
        for name in ("steps", "sampler", "schedule", "text_cfg", "image_cfg", "seed", "size", "model"):
            assert getattr(ours, name) == getattr(record, name), name
        others = {"Model hash": "0a1b2c3d4e", **record.others}
        assert dict(ours.others) == others and ours.version == "v1.10.1"
