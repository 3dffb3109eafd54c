"""The command line as a whole: help, where settings come from, and output names."""

from __future__ import annotations

import inspect
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_controlnet
from PIL import Image

from ip2p import __version__
from ip2p.base.errors import InputError
from ip2p.cli import edit as command
from ip2p.cli import main as cli
from ip2p.cli.edit import EditConfig
from ip2p.cli.options import read_outer
from ip2p.cli.storybook import DrawConfig
from ip2p.editing import advice
from ip2p.pictures import infotext
from ip2p.pictures.images import save_image
from ip2p.settings import meta_of, parse_lora, run_json


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("IP2P_")]:
        monkeypatch.delenv(name)
    return tmp_path


def ip2p(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ip2p", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


# --- help ---------------------------------------------------------------------------------------


def test_help_takes_less_than_a_second() -> None:
    ip2p("--help")  # the first call may have to compile
    before = os.times()
    result = ip2p("--help")
    after = os.times()
    # CPU time, which other processes do not increase.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert result.returncode == 0 and result.stderr == ""
    assert all(verb in result.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("words", [["--help"], ["edit", "--help"], ["storybook", "score", "-h"], ["edit"]])
def test_help_and_refusals_do_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys; from ip2p.cli import main as cli; cli.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'skia', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["storybook"], ["storybook", "--help"]])
def test_help_lists_the_verbs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "storybook score" in out
    assert ("edit a picture" in out) == ("storybook" not in words)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ip2p {__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["edti"], "did you mean ip2p edit?"),
        (["storybook", "drw"], "did you mean ip2p storybook draw?"),
        (["xyzzy"], "--help"),
        (["eval"], "did you mean ip2p evaluate?"),
        (["score"], "did you mean ip2p evaluate?"),
        (["benchmark"], "did you mean ip2p evaluate?"),
    ],
)
def test_an_unknown_verb_is_refused_with_a_suggestion(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_config_a_function_and_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = cli.config_class(verb)
    run = cli.imported(cli.VERBS[verb][1])
    assert list(inspect.signature(run).parameters) == ["config"]
    assert cli.main([*verb.split(), "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"usage: ip2p {verb}" in out
    for name, field in config.model_fields.items():
        meta = meta_of(field)
        flag = f"--{(meta.name or name).replace('_', '-')}"
        assert meta.hidden or (meta.metavar in out if meta.positional else f"{flag} " in f"{out} "), name


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_setting_has_a_help_text(verb: str) -> None:
    for name, field in cli.config_class(verb).model_fields.items():
        assert field.description, f"{verb}: {name} has no help text"


def test_the_help_of_edit_fits_100_lines_of_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["edit", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "Common options:" and titles[-1] == "Other options:"


def test_there_are_at_most_120_options() -> None:
    shown = set()
    for verb in cli.VERBS:
        for name, field in cli.config_class(verb).model_fields.items():
            meta = meta_of(field)
            if not meta.hidden and not meta.positional:
                shown.add(meta.name or name)
    assert len(shown) <= 120, len(shown)


def test_options_hidden_from_the_help_are_still_accepted() -> None:
    assert cli.parse("train", ["--beta1", "0.5"]).beta1 == 0.5
    assert cli.parse("edit", ["p", "i", "--schedule", "karras"]).schedule == "karras"


def test_the_cli_page_of_the_docs_is_up_to_date() -> None:
    tool = Path(__file__).parent.parent / "scripts" / "make_cli_docs.py"
    result = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- settings -----------------------------------------------------------------------------------


def test_flags_override_variables_which_override_the_file_and_defaults(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / "ip2p.toml").write_text("[edit]\nsteps = 11\nimage-cfg = 1.1\nseed = 3\n")
    monkeypatch.setenv("IP2P_STEPS", "12")
    monkeypatch.setenv("IP2P_IMAGE_CFG", "1.2")
    config = cli.parse("edit", ["page.png", "make it night", "--steps", "13"])
    assert (config.steps, config.image_cfg, config.seed, config.text_cfg) == (13, 1.2, 3, None)
    assert (config.image, config.instruction) == ("page.png", "make it night")


def test_a_named_settings_file_and_its_nested_tables_are_read(empty_folder: Path) -> None:
    (empty_folder / "mine.toml").write_text('[storybook.draw]\ncount = 5\nout = "pages"\n')
    config = cli.parse("storybook draw", ["--config", "mine.toml"])
    assert (config.count, config.out) == (5, Path("pages"))
    assert cli.parse("storybook draw", ["--config=mine.toml", "--count", "6"]).count == 6
    assert read_outer(DrawConfig, "storybook draw", env={"IP2P_CONFIG": "mine.toml"}).count == 5


def test_variables_accept_every_type() -> None:
    env = {
        "IP2P_OVERWRITE": "yes",
        "IP2P_SIZE": "576x384",
        "IP2P_TEXT_CFG": "3",
        "IP2P_SAMPLER": "euler",
        "IP2P_OUT": "a/b.png",
        "IP2P_NEGATIVE": "",
    }
    config = read_outer(EditConfig, "edit", env=env)
    assert (config.overwrite, config.size, config.text_cfg) == (True, (576, 384), 3.0)
    assert (config.sampler, config.out, config.negative) == ("euler", Path("a/b.png"), "")
    assert read_outer(EditConfig, "edit", env={"IP2P_SIZE": "256"}).size == 256


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("IP2P_STEPS", "many", "IP2P_STEPS is 'many'; it must be a whole number"),
        ("IP2P_TEXT_CFG", "x", "it must be a number"),
        ("IP2P_OVERWRITE", "maybe", "it must be true or false"),
        ("IP2P_SAMPLER", "ddim", "choose one of: euler_ancestral"),
        ("IP2P_SIZE", "1x2x3", "576x384"),
    ],
)
def test_a_bad_variable_is_refused(variable: str, value: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_outer(EditConfig, "edit", env={variable: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[edit]\nstpes = 3\n", "did you mean steps?"),
        ("[edit]\nsteps = 'x'\n", "steps in ip2p.toml is 'x'"),
        ("[edit\n", "is not TOML"),
        ("edit = 3\n", r"write \[edit\] above it"),
        ("[storybook]\ndraw = 1\n[edit]\nzzz = 1\n", "has no such setting; known: instruction"),
    ],
)
def test_a_bad_settings_file_is_refused(empty_folder: Path, text: str, said: str) -> None:
    (empty_folder / "ip2p.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_outer(EditConfig, "edit", env={})


def test_a_missing_settings_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["edit", "a.png", "b", "--config", "no.toml"]) == 2
    assert "cannot read the settings file no.toml" in capsys.readouterr().err


def test_size_is_one_side_or_width_and_height() -> None:
    assert cli.parse("edit", ["a", "b", "--size", "256"]).size == 256
    assert cli.parse("edit", ["--size", "576x384", "a", "b"]).size == (576, 384)
    assert cli.parse("edit", ["a", "b"]).size is None


def test_run_json_contains_the_version_and_settings() -> None:
    report = json.loads(run_json(DrawConfig(out=Path("x"), count=3), seconds=1.5))
    assert report["ip2p"] == __version__ and report["seconds"] == 1.5
    assert report["settings"]["out"] == "x" and report["settings"]["count"] == 3


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a:b/style.safetensors:-1", "a:b/style.safetensors", -1.0),
        ("C:\\loras\\style.safetensors", "C:\\loras\\style.safetensors", 1.0),
        ("C:\\loras\\style.safetensors:2e-1", "C:\\loras\\style.safetensors", 0.2),
        ("odd:", "odd:", 1.0),
    ],
)
def test_a_lora_is_a_file_with_an_optional_weight(text: str, file: str, weight: float) -> None:
    assert parse_lora(text) == (Path(file), weight)


def test_repeated_flags_keep_their_order_and_override_the_file(empty_folder: Path) -> None:
    (empty_folder / "ip2p.toml").write_text('[edit]\nlora = ["a", "b:2"]\nthen = "make it day"\n')
    assert cli.parse("edit", ["p", "i"]).lora == ("a", "b:2")
    assert cli.parse("edit", ["p", "i"]).then == ("make it day",)
    config = cli.parse("edit", ["--then", "x", "p", "i", "--lora", "c:1", "--then", "y z", "--lora=d"])
    assert (config.lora, config.then) == (("c:1", "d"), ("x", "y z"))
    assert (config.image, config.instruction) == ("p", "i")


def test_variables_accept_lists_and_pairs() -> None:
    env = {"IP2P_LORA": "C:\\a:0.5", "IP2P_THEN": '["x", "y, z"]', "IP2P_CFG_INTERVAL": "0.2 0.9"}
    config = read_outer(EditConfig, "edit", env=env)
    assert (config.lora, config.then, config.cfg_interval) == (("C:\\a:0.5",), ("x", "y, z"), (0.2, 0.9))
    for bad in ("0.2", "0.2 x", "[1]"):
        with pytest.raises(InputError, match="IP2P_CFG_INTERVAL"):
            read_outer(EditConfig, "edit", env={"IP2P_CFG_INTERVAL": bad})


@pytest.mark.parametrize(
    ("words", "threshold"),
    [
        (["p", "i"], None),
        (["p", "i", "--auto-mask"], 0.5),
        (["--auto-mask", "p", "i"], 0.5),
        (["p", "--auto-mask", "--steps", "3", "i"], 0.5),
        (["p", "i", "--auto-mask", "0.3"], 0.3),
        (["p", "i", "--auto-mask=0.3"], 0.3),
    ],
)
def test_auto_mask_has_an_optional_threshold(words: list[str], threshold: float | None) -> None:
    config = cli.parse("edit", words)
    assert (config.auto_mask, config.image, config.instruction) == (threshold, "p", "i")


def test_any_number_of_pictures_may_precede_the_instruction() -> None:
    words = ["a.png", "b.png", "--steps", "3", "c", "--json", "--cfg-interval", "0", "0.5", "-o", "out"]
    config = cli.parse("edit", [*words, "make it night"])
    assert (config.image, config.more, config.instruction) == ("a.png", ("b.png", "c"), "make it night")
    assert (config.out, config.print_json, config.cfg_interval) == (Path("out"), True, (0.0, 0.5))
    assert cli.parse("edit", ["--then=x", "a.png", "--seed=3", "--", "-make it night"]).then == ("x",)
    assert cli.parse("edit", ["a.png", "make it night"]).more == ()


def test_every_setting_of_an_edit_is_read_back_from_its_picture(page: Image.Image) -> None:
    words = ["p", "make it: night", "--seed", "3", "--steps", "4", "--text-cfg", "2", "--image-cfg", "1.1"]
    words += ["--sampler", "euler", "--schedule", "karras", "--negative", "x", "--size", "64x32"]
    words += ["--text-cfg-rescale", "0.7", "--cfg-interval", "0.2", "0.9", "--fit", "model"]
    words += ["--mask", "m.png", "--mask-padding", "5", "--feather", "2.5"]
    words += ["--lora", "a.safetensors:0.5", "--lora", "b.safetensors", "--vae", "v", "--weights", "plain"]
    words += ["--revision", "main", "--controlnet", "c", "--control-image", "e.png", "--control-scale", "0.4"]
    written = cli.parse("edit", words)
    record = infotext.EditRecord(**{name: getattr(written, name) for name in infotext.labeled_settings()})
    page = page.copy()
    page.info["parameters"] = infotext.format_infotext(record)
    save_image(page, "made.png")
    read = cli.parse("edit", ["p", "--from-settings", "made.png"])
    assert read == written.changed(from_settings=Path("made.png"))
    auto = record.changed(mask=None, auto_mask=0.35)
    page.info["parameters"] = infotext.format_infotext(auto)
    save_image(page, "auto.png")
    assert cli.parse("edit", ["p", "--from-settings", "auto.png"]).auto_mask == 0.35


def test_the_examples_match_the_docs_page_and_are_valid_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["edit", "--examples"]) == 0
    out = capsys.readouterr().out
    assert out == advice.TEXT and "turn the … into a …" in out
    text = (Path(__file__).parent.parent / "docs" / "advice.md").read_text(encoding="utf-8")
    assert text == advice.page()
    assert [line for line in text.splitlines() if not line.startswith("![")][:10] == out.splitlines()[:10]
    # Every advised command is valid.
    for line in out.splitlines():
        if line.startswith("    ip2p "):
            verb, *words = shlex.split(line.strip())[1:]
            cli.parse(verb, words).check()


# --- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (EditConfig(image="a/page.jpg"), ["a/page-edited.jpg"]),
        (EditConfig(image="page.gif"), ["page-edited.png"]),
        (EditConfig(image="page.png", out=Path("night.webp")), ["night.webp"]),
        (EditConfig(image="page.png", out=Path("n.png"), count=2), ["n-1.png", "n-2.png"]),
        (EditConfig(image="page.png", count=2), ["page-edited-1.png", "page-edited-2.png"]),
        (EditConfig(image="a/page.png", out=Path(".")), ["page-edited.png"]),
    ],
)
def test_output_names_follow_from_the_input_and_the_options(config: EditConfig, paths: list[str]) -> None:
    assert command.output_paths(config) == [Path(path) for path in paths]


def edit(model: Path, *words: object) -> int:
    return cli.main(["edit", "page.png", *map(str, words), "--model", str(model), "--dtype", "fp32"])


def test_image_k_of_several_matches_the_same_seed_edited_alone(
    page: Image.Image, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.save("page.png")
    many = ("make it night", "--steps", 3, "--count", 3, "--seed", 7)
    assert edit(tiny_model_dir, *many, "-o", "night.png", "--batch-size", 2) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["night-1.png", "night-2.png", "night-3.png"]
    assert "\x1b" not in captured.err and "%" not in captured.err  # no progress without a terminal
    assert edit(tiny_model_dir, "make it night", "--steps", 3, "--seed", 8, "-o", "alone.png") == 0
    first, second, alone = (
        np.asarray(Image.open(f"{name}.png"), int) for name in ("night-1", "night-2", "alone")
    )
    # Sums may round differently in a batch: one level of 255 counts as the same picture.
    assert abs(alone - second).max() <= 1
    assert abs(first - second).max() > 10


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_can_be_reproduced_from_its_settings(
    page: Image.Image, tiny_model_dir: Path, ending: str
) -> None:
    page.resize((96, 64)).save("page.png")
    words = ["make it night, with stars: many", "--steps", 3, "--seed", 9, "--sampler", "dpmpp_2m"]
    words += [
        "--schedule",
        "karras",
        "--text-cfg",
        5,
        "--image-cfg",
        1.25,
        "--negative",
        "blur, rain",
        "--size",
        48,
    ]
    assert edit(tiny_model_dir, *words, "-o", f"night.{ending}") == 0
    assert edit(tiny_model_dir, "--from-settings", f"night.{ending}", "-o", f"again.{ending}") == 0
    assert Path(f"night.{ending}").read_bytes() == Path(f"again.{ending}").read_bytes()


def test_lora_mask_controlnet_and_guidance_settings_combine_and_are_reproducible(
    page: Image.Image, tiny_model_dir: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    page.resize((96, 64)).save("page.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[10:50, 20:60] = 255
    Image.fromarray(mask).save("mask.png")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lora_down": torch.eye(32)[:2], "lora_up": 9 * torch.eye(32)[:, :2]}
    save_file({f"{name}.{part}.weight": value for part, value in factors.items()}, "style.safetensors")
    make_controlnet().save_pretrained("control")
    words = ["make it night", "--steps", 3, "--lora", "style.safetensors:0.7", "--mask", "mask.png"]
    words += ["--controlnet", "control", "--control-image", "page.png", "--control-scale", 0.5]
    words += ["--text-cfg-rescale", 0.5, "--cfg-interval", 0.1, 0.9, "--feather", 3]
    assert edit(tiny_model_dir, *words, "-o", "night.png", "--show-mask", "shown.png") == 0
    before, after = (np.asarray(Image.open(name).convert("RGB")) for name in ("page.png", "night.png"))
    assert (before == after)[mask == 0].all() and (before != after)[30, 40].any()
    shown = np.asarray(Image.open("shown.png"))
    assert shown.shape[:2] == mask.shape and not shown[mask == 0].any() and shown[30, 40].all()
    assert edit(tiny_model_dir, "--from-settings", "night.png", "-o", "again.png") == 0
    assert Path("night.png").read_bytes() == Path("again.png").read_bytes()
    # Each setting has an effect: without it, the picture differs.
    for flag, value in (("--lora", "style.safetensors:0"), ("--control-scale", 0), ("--text-cfg-rescale", 0)):
        words = ["--from-settings", "night.png", "-o", "other.png", "--overwrite", flag, value]
        assert edit(tiny_model_dir, *words) == 0
        assert (np.asarray(Image.open("other.png")) != after).any()


def test_the_detected_region_is_saved_for_each_result(page: Image.Image, tiny_model_dir: Path) -> None:
    page.save("page.png")
    words = ["make it night", "--steps", 1, "--count", 2, "--auto-mask", "--show-mask", "region.png"]
    assert edit(tiny_model_dir, *words) == 0
    for k in (1, 2):
        assert Image.open(f"region-{k}.png").size == page.size
        text = infotext.read_infotext(Path(f"page-edited-{k}.png"))
        assert text is not None and "Auto mask: 0.5" in text


def test_a_flag_overrides_the_settings_of_a_picture(page: Image.Image, tiny_model_dir: Path) -> None:
    page.save("page.png")
    assert edit(tiny_model_dir, "make it night", "--steps", 2, "--seed", 4, "-o", "night.png") == 0
    config = cli.parse("edit", ["page.png", "--from-settings", "night.png", "--seed", "5"])
    assert (config.instruction, config.steps, config.seed) == ("make it night", 2, 5)
    assert config.model == tiny_model_dir.name


# --- the storybook's verbs ------------------------------------------------------------------------


def test_draw_writes_pages_pairs_captions_and_a_sheet(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "storybook draw --count 3 --seed 5 --size 64 -o pages"
    words += " --pairs pairs.parquet --captions captions.txt --sheet sheet.png"
    assert cli.main(words.split()) == 0
    assert capsys.readouterr().out.split() == ["pages", "pairs.parquet", "captions.txt", "sheet.png"]
    assert sorted(os.listdir("pages")) == ["000000.png", "000001.png", "000002.png", "run.json"]
    assert json.loads(Path("pages/run.json").read_text())["settings"]["seed"] == 5
    assert Image.open("pages/000000.png").size == (64, 64)
    assert len(set(Path("captions.txt").read_text().splitlines())) == 3
    assert Image.open("sheet.png").size[0] > 3 * 100

    import pyarrow.parquet as pq

    table = pq.read_table("pairs.parquet")
    columns = ["original_image", "original_prompt", "edit_prompt", "edited_prompt", "edited_image"]
    assert (table.column_names, table.num_rows) == (columns, 3)
    first = Image.open(io.BytesIO(table["original_image"][0]["bytes"].as_py()))
    assert first.tobytes() == Image.open("pages/000000.png").tobytes()  # row k edits page k


def test_page_k_does_not_depend_on_the_count() -> None:
    for count in (1, 3):
        words = ["storybook", "draw", "--count", str(count), "--size", "48", "-o", f"pages{count}"]
        assert cli.main(words) == 0
    assert Path("pages1/000000.png").read_bytes() == Path("pages3/000000.png").read_bytes()
    assert Path("pages3/000000.png").read_bytes() != Path("pages3/000001.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no output is given"),
        (["-o", "pages", "--size", "8"], "--size is 8; it must be 32 to 1024"),
        (["-o", "pages", "--count", "0"], "--count is 0"),
        (["-o", "pages"], "pages already contains pictures; add --overwrite"),
        (["--captions", "no/captions.txt"], "mkdir -p no"),
        (["--sheet", "pages"], "is a folder"),
        (["-o", "pages/1.png"], "cannot create the folder pages/1.png"),
    ],
)
def test_draw_refuses_invalid_options_and_writes_nothing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pages").mkdir()
    Path("pages/1.png").write_bytes(b"mine")
    assert cli.main(["storybook", "draw", *words]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir("pages") == ["1.png"]


def test_build_passes_its_settings_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ip2p.training.storybook import build

    called: dict[str, object] = {}
    monkeypatch.setattr(build, "build_model", lambda *args, **settings: called.update(settings, args=args))
    words = [
        "--preset",
        "cpu",
        "-o",
        "runs/a",
        "--seconds",
        "5",
        "--stage",
        "unet",
        "--steps",
        "2",
        "--minutes",
        "9",
    ]
    assert cli.main(["storybook", "build", *words]) == 0
    assert called["args"] == ("cpu", Path("runs/a"))
    assert (called["seconds"], called["stage"], called["steps"], called["minutes"]) == (5.0, "unet", 2, 9.0)
    assert called["bundle"] == Path("runs/a/bundle")
    assert capsys.readouterr().out == "runs/a/bundle\n"
    assert json.loads(Path("runs/a/run.json").read_text())["settings"]["preset"] == "cpu"


@pytest.mark.parametrize(
    "words", [["--seconds", "nan"], ["--minutes", "-1"], ["--steps", "0"], ["--preset", "tpu"]]
)
def test_build_refuses_invalid_options_and_writes_nothing(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["storybook", "build", "-o", "runs", *words]) == 2
    assert words[0] in capsys.readouterr().err
    assert not Path("runs").exists()


# --- other behavior ------------------------------------------------------------------------------


def test_a_closed_output_pipe_ends_the_command_silently() -> None:
    code = "import sys; from ip2p.cli import main; sys.exit(main.main(['edit', '--examples']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_chain_steps_and_best_results_have_different_file_names() -> None:
    chain = command.output_paths(EditConfig(image="page.png", then=("make it snow",)), 2)
    best = command.output_paths(EditConfig(image="page.png", count=4, best=2), 2)
    assert not set(chain) & set(best)
    with pytest.raises(InputError, match="remove --best"):
        EditConfig(image="page.png", then=("make it snow",), best=1).check()


def test_grid_and_edit_have_the_same_fit_option() -> None:
    words = ["page.png", "make it night", "--fit", "model"]
    assert cli.parse("grid", words).fit == cli.parse("edit", words).fit == "model"
    assert cli.parse("grid", words[:2]).fit == cli.parse("edit", words[:2]).fit == "original"


def test_model_list_includes_the_models_of_the_folder(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["model", "list", str(tiny_model_dir.parent), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert tiny_model_dir.name in [row["name"] for row in rows if row["where"] == "here"]


def test_no_progress_bar_is_shown_for_zero_items(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from ip2p.base.terminal import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("editing", 0) as advance:
        advance()
    assert capfd.readouterr().err == ""


def test_progress_without_a_terminal_is_a_line_per_minute(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from types import SimpleNamespace

    from ip2p.base import terminal

    now = [0.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with terminal.progress("scoring", 1200, "edits") as advance:
        for _ in range(600):
            now[0] += 0.25
            advance()
    assert capfd.readouterr().err.splitlines() == [
        "ip2p: scoring: 240 of 1,200, 4 edits/s, 4:00 left",
        "ip2p: scoring: 480 of 1,200, 4 edits/s, 3:00 left",
    ]


def test_training_estimates_the_time_left() -> None:
    from ip2p.training.loop import time_left

    assert time_left(40, None, 0) == ", about 40 s left"
    assert time_left(1200, None, 0) == ", about 20 min left"
    assert time_left(10**6, minutes=10, spent=300) == ", about 5 min left"
    assert time_left(0, None, 0) == ""


def test_a_new_setting_is_on_the_command_line_and_in_the_help() -> None:
    from ip2p.cli.options import read_options, write_help
    from ip2p.settings import setting

    class Sharpened(EditConfig):
        sharpness: float = setting(1.0, "how sharp the result is", ge=0, le=10, group="Mask")

    config = read_options(Sharpened, "edit", ["p", "i", "--sharpness", "3"], env={"IP2P_STEPS": "4"})
    assert (config.sharpness, config.steps) == (3.0, 4)
    assert "--sharpness NUMBER" in write_help(Sharpened, "edit")
    with pytest.raises(InputError, match="^--sharpness is 11; it must be a number from 0 to 10"):
        read_options(Sharpened, "edit", ["p", "i", "--sharpness", "11"])
