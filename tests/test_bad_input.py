"""Every bad input to `ip2p edit`: its message and exit code (2 input, 3 model, 4 resources)."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model
from PIL import Image

from ip2p.cli import main as cli
from ip2p.pictures import images
from ip2p.serve.options import ServeConfig


@pytest.fixture
def here(here: Path) -> Path:
    """`conftest.here` with one good picture, page.png."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 48)).save("page.png")
    return here


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when the model is loaded: bad input must be refused before that."""
    from ip2p.editing.editor import Editor

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(Editor, "load", load)


class Output:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(here: Path, capfd: pytest.CaptureFixture[str]):
    """Run the command line in this process and return its output."""

    def run(*words: object) -> Output:
        capfd.readouterr()
        code = cli.main([str(word) for word in words])
        return Output(code, *capfd.readouterr())

    return run


def is_refused(output: Output, code: int, *parts: str) -> None:
    """Check for the exit code, an empty stdout, and one line on stderr that contains `parts`."""
    assert output.code == code, output.err
    assert output.out == ""
    assert output.err.startswith("ip2p: ") and output.err.count("\n") == 1, output.err
    assert "Traceback" not in output.err
    for part in parts:
        assert part in output.err


def png_with_header(width: int, height: int) -> bytes:
    """A PNG whose header claims `width` and `height`, without pixels that could be decoded to that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


# --- the picture --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
class TestPicture:
    def test_a_missing_file_suggests_the_closest_name(self, run) -> None:
        is_refused(
            run("edit", "pgae.png", "make it night"), 2, "pgae.png", "no such file", "Did you mean page.png?"
        )

    def test_a_missing_folder_is_refused(self, run) -> None:
        is_refused(run("edit", "no/page.png", "make it night"), 2, "no/page.png", "folder no does not exist")

    def test_a_folder_without_pictures_is_refused(self, run, here: Path) -> None:
        (here / "empty").mkdir()
        is_refused(
            run("edit", "empty", "make it night"), 2, "empty matches no pictures", "a folder of pictures"
        )

    def test_an_empty_file_is_refused(self, run, here: Path) -> None:
        (here / "empty.png").write_bytes(b"")
        is_refused(run("edit", "empty.png", "make it night"), 2, "empty.png is empty", "0 bytes")

    def test_a_text_file_named_png_is_refused(self, run, here: Path) -> None:
        (here / "note.png").write_text("not a picture at all\n")
        is_refused(run("edit", "note.png", "make it night"), 2, "note.png contains text", "PNG, JPEG or WebP")

    def test_a_web_page_named_png_is_refused(self, run, here: Path) -> None:
        (here / "page404.png").write_text("<!DOCTYPE html><html><body>404</body></html>")
        is_refused(
            run("edit", "page404.png", "make it night"), 2, "web page (HTML)", "Save the picture itself"
        )

    def test_unknown_bytes_named_png_are_refused(self, run, here: Path) -> None:
        (here / "noise.png").write_bytes(bytes(range(256)) * 4)
        is_refused(run("edit", "noise.png", "make it night"), 2, "not a picture in a known format")

    def test_a_truncated_jpeg_is_refused_and_not_filled_with_gray(self, run, here: Path) -> None:
        file = io.BytesIO()
        Image.open("page.png").save(file, "JPEG")
        (here / "cut.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
        is_refused(
            run("edit", "cut.jpg", "make it night"), 2, "cut.jpg is damaged or truncated", "Download it again"
        )
        assert sorted(os.listdir(here)) == ["cut.jpg", "page.png"]

    def test_too_many_pixels_are_refused_from_the_header_alone(self, run, here: Path) -> None:
        (here / "vast.png").write_bytes(png_with_header(16_000, 10_000))
        output = run("edit", "vast.png", "make it night")
        is_refused(
            output, 2, "vast.png", "160.0 megapixels (16000x10000)", "the limit is 100", "--max-pixels"
        )

    def test_a_decompression_bomb_is_refused(self, run, here: Path) -> None:
        (here / "bomb.png").write_bytes(png_with_header(60_000, 50_000))
        is_refused(
            run("edit", "bomb.png", "a", "--max-pixels", 10**10), 2, "bomb.png is too large", "smaller"
        )

    def test_max_pixels_sets_the_limit(self, run) -> None:
        is_refused(run("edit", "page.png", "a", "--max-pixels", 3000), 2, "64x48", "0.003", "--max-pixels")

    @pytest.mark.parametrize("size", [(1, 1), (200, 15), (15, 64)])
    def test_a_side_under_16_pixels_is_refused(self, run, size: tuple[int, int]) -> None:
        Image.new("RGB", size).save("tiny.png")
        is_refused(run("edit", "tiny.png", "a"), 2, f"{size[0]}x{size[1]}", "at least 16")

    def test_an_aspect_ratio_over_8_is_refused(self, run) -> None:
        Image.new("RGB", (16 * 8 + 1, 16)).save("strip.png")
        is_refused(run("edit", "strip.png", "a"), 2, "129x16", "at most 8 times", "Crop it")

    def test_an_animated_gif_is_refused(self, run) -> None:
        frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
        frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
        is_refused(run("edit", "moving.gif", "a"), 2, "moving.gif has several frames", "Save the one to edit")


class TestUnusualPictures:
    """Unusual but valid pictures are converted and come out upright."""

    def edited(self, run, model: Path, name: str, *more: str) -> tuple[Output, Image.Image]:
        output = run("edit", name, "make it night", "-o", "out.png", "--steps", 1, "--model", model, *more)
        assert output.code == 0, output.err
        return output, Image.open("out.png")

    @pytest.mark.parametrize("kind", ["cmyk", "deep", "grey", "palette", "one_bit"])
    def test_other_color_modes_are_converted_to_rgb(self, run, tiny_model_dir: Path, kind: str) -> None:
        page = Image.open("page.png")
        if kind == "cmyk":
            page.convert("CMYK").save("odd.jpg")
        elif kind == "deep":
            Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)).save("odd.png")
        else:
            page.convert({"grey": "L", "palette": "P", "one_bit": "1"}[kind]).save("odd.png")
        output, result = self.edited(run, tiny_model_dir, "odd.jpg" if kind == "cmyk" else "odd.png")
        assert (result.mode, result.size) == ("RGB", (64, 48))
        assert output.err == ""

    def test_an_exif_rotated_photo_comes_out_upright(self, run, tiny_model_dir: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was rotated by 90 degrees
        Image.open("page.png").save("turned.jpg", exif=exif)
        _, result = self.edited(run, tiny_model_dir, "turned.jpg")
        assert result.size == (48, 64)
        assert result.getexif().get(0x0112, 1) == 1

    def test_transparency_is_kept_or_replaced_by_the_background_with_a_warning(
        self, run, tiny_model_dir: Path
    ) -> None:
        Image.new("RGBA", (64, 64), (255, 0, 0, 90)).save("glass.png")
        _, result = self.edited(run, tiny_model_dir, "glass.png")
        assert result.mode == "RGBA" and result.getchannel("A").getextrema() == (90, 90)
        output, result = self.edited(run, tiny_model_dir, "glass.png", "--background", "white", "--overwrite")
        assert result.mode == "RGB"
        assert (
            "ip2p: warning: glass.png has transparent parts; their background is set to white." in output.err
        )


# --- the instruction and the numbers --------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
class TestOptions:
    @pytest.mark.parametrize("words", [[], [""], ["  \n"]])
    def test_an_empty_instruction_is_refused(self, run, words: list[str]) -> None:
        is_refused(run("edit", "page.png", *words), 2, "the instruction is empty", 'page.png "make it night"')

    def test_a_missing_picture_argument_is_refused(self, run) -> None:
        is_refused(run("edit"), 2, "no picture is given", "ip2p edit page.png")

    @pytest.mark.parametrize("steps", ["0", "-1", "1000000000"])
    def test_steps_out_of_range_are_refused(self, run, steps: str) -> None:
        is_refused(
            run("edit", "page.png", "a", "--steps", steps),
            2,
            f"--steps is {steps}",
            "1 to 1000",
            "--steps 20",
        )

    def test_steps_that_are_not_a_whole_number_are_refused(self, run) -> None:
        is_refused(
            run("edit", "page.png", "a", "--steps", "1e9"),
            2,
            "--steps is 1e9; it must be a whole number from 1 to 1000",
        )

    @pytest.mark.parametrize("flag", ["--text-cfg", "--image-cfg"])
    @pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e6"])
    def test_a_guidance_scale_out_of_range_is_refused(self, run, flag: str, value: str) -> None:
        is_refused(
            run("edit", "page.png", "a", f"{flag}={value}"), 2, f"{flag} is", "from 0 to 100", f"Try {flag}"
        )

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--count", 0),
            ("--seed", -2),
            ("--seed", 2**63),
            ("--batch-size", 0),
            ("--size", 8),
            ("--size", "8x64"),
        ],
    )
    def test_other_numbers_out_of_range_are_refused(self, run, flag: str, value: object) -> None:
        is_refused(
            run("edit", "page.png", "a", f"{flag}={value}"), 2, f"{flag} is", "it must be", f"Try {flag}"
        )

    def test_an_unknown_flag_suggests_the_closest_one(self, run) -> None:
        is_refused(
            run("edit", "page.png", "a", "--stps", "3"), 2, "no option --stps", "did you mean --steps?"
        )

    def test_an_unknown_sampler_lists_the_known_ones(self, run) -> None:
        is_refused(
            run("edit", "page.png", "a", "--sampler", "ddim"), 2, "'ddim'", "euler_ancestral", "dpmpp_2m"
        )

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--text-cfg-rescale=nan"], "--text-cfg-rescale is nan"),
            (["--text-cfg-rescale", "1.5"], "--text-cfg-rescale is 1.5; it must be a number from 0 to 1"),
            (["--cfg-interval", "0.9", "0.2"], "--cfg-interval 0.9 0.2 is empty"),
            (["--cfg-interval", "0.2", "nan"], "--cfg-interval is nan"),
            (["--cfg-interval", "0.2"], "--cfg-interval"),
            (["--auto-mask", "1.5"], "--auto-mask is 1.5"),
            (["--auto-mask", "--mask", "page.png"], "--auto-mask both select the region; give one of them"),
            (["--mask-padding", "-1"], "--mask-padding is -1"),
            (["--feather=inf"], "--feather is inf"),
            (["--show-mask", "m.png"], "add --mask FILE or --auto-mask"),
            (["--auto-mask", "--show-mask", "no/m.png"], "mkdir -p no"),
            (["--fit", "both"], "'both'"),
            (["--weights", "best"], "'best'"),
            (["--memory", "most"], "'most'"),
            (["--control-scale=-1"], "--control-scale is -1"),
            (["--controlnet", "c"], "add --control-image FILE"),
            (["--control-image", "page.png"], "add --controlnet MODEL"),
            (["--controlnet", "c", "--control-image", "pgae.png"], "Did you mean page.png?"),
            (["--lora", ":0.5"], "has no file name"),
            (
                ["--lora", "page.png:nan"],
                "the weight nan must be a number from -10 to 10",
            ),
            (["--lora", "pge.png:0.5"], "pge.png: no such LoRA file. Did you mean page.png?"),
            (["--best", "0"], "--best is 0"),
            (["--best", "2"], "--best 2 is more than --count 1"),
            (["--caption", "a page"], "add --count 8 --best 2"),
            (["--edited-caption", "a page"], "add --caption"),
            (["--then", " "], "the instruction of --then is empty"),
            (["--then", "b", "--count", "2"], "remove --count"),
            (["--from-original"], "--from-original is for chained edits; add --then"),
            (["--animation", "a.gif"], "--animation is for chained edits"),
            (["--then", "b", "--animation", "a.mp4"], "animations must be .gif or .webp"),
            (["--then", "b", "--animation", "no/a.gif"], "mkdir -p no"),
            (["--then", "b", "--frame-ms", "1"], "--frame-ms is 1"),
            (["--jobs", "0"], "--jobs is 0"),
        ],
    )
    def test_invalid_values_and_combinations_of_options_are_refused(
        self, run, words: list[str], said: str
    ) -> None:
        is_refused(run("edit", "page.png", "a", *words), 2, said)

    def test_an_instruction_that_names_a_file_is_refused(self, run) -> None:
        output = run("edit", "page.png", "page.png")
        is_refused(output, 2, "the instruction 'page.png' is a file", "the instruction must come last")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["page.png", "page.png", "a"], "add -o FOLDER"),
            (["*.png", "a"], "add -o FOLDER"),
            (["*.jpg", "a", "-o", "out"], "*.jpg matches no pictures"),
            (["page.png", "pgae.png", "a", "-o", "out"], "Did you mean page.png?"),
            (["*.png", "a", "-o", "page.png"], "cannot create the folder page.png"),
            (["*.png", "a", "-o", "out", "--mask", "page.png"], "--mask is for one picture"),
            (["*.png", "a", "-o", "out", "--then", "b"], "--then is for one picture"),
        ],
    )
    def test_an_invalid_batch_is_refused_and_creates_no_folder(
        self, run, here: Path, words: list[str], said: str
    ) -> None:
        is_refused(run("edit", *words), 2, said)
        assert not (here / "out").exists()

    def test_from_settings_refuses_a_picture_without_settings(self, run) -> None:
        is_refused(run("edit", "page.png", "--from-settings", "page.png"), 2, "page.png contains no settings")


@pytest.mark.usefixtures("no_model")
class TestMask:
    def test_a_mask_of_a_different_size_reports_both_sizes(self, run) -> None:
        Image.new("L", (32, 48), 255).save("mask.png")
        output = run("edit", "page.png", "a", "--mask", "mask.png")
        is_refused(output, 2, "32x48", "64x48", "the same size")

    def test_a_missing_mask_suggests_the_closest_name(self, run) -> None:
        is_refused(run("edit", "page.png", "a", "--mask", "pag.png"), 2, "pag.png", "Did you mean page.png?")

    def test_a_mask_that_is_not_a_picture_is_refused(self, run, here: Path) -> None:
        (here / "mask.png").write_text("white")
        is_refused(run("edit", "page.png", "a", "--mask", "mask.png"), 2, "mask.png contains text")

    def test_an_all_black_mask_is_refused(self, run) -> None:
        Image.new("L", (64, 48)).save("mask.png")
        is_refused(
            run("edit", "page.png", "a", "--mask", "mask.png"),
            2,
            "all black",
            "Paint the region to edit white",
        )


def test_a_too_long_instruction_runs_with_a_warning_that_quotes_the_cut_text(
    run, tiny_model_dir: Path
) -> None:
    words = "make it night " * 60 + "with owls"
    output = run("edit", "page.png", words, "-o", "out.png", "--steps", 1, "--model", tiny_model_dir)
    assert output.code == 0
    assert (
        output.err.startswith("ip2p: warning: ") and "77 tokens" in output.err and output.err.count("\n") == 1
    )
    assert "make it night" in output.err and "with owls'" in output.err


# --- the output -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
class TestOutput:
    def test_a_missing_output_folder_is_refused(self, run) -> None:
        is_refused(
            run("edit", "page.png", "a", "-o", "out/night.png"), 2, "out", "does not exist", "mkdir -p out"
        )

    def test_an_output_folder_that_is_a_file_is_refused(self, run) -> None:
        is_refused(run("edit", "page.png", "a", "-o", "page.png/night.png"), 2, "page.png")

    def test_an_unwritable_output_is_refused(self, run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (here / "night.png").write_bytes(b"mine")
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
        output = run("edit", "page.png", "a", "-o", "night.png", "--overwrite")
        is_refused(output, 2, "night.png", "writ")
        assert (here / "night.png").read_bytes() == b"mine"

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses even root")
    def test_an_output_folder_that_accepts_no_files_is_refused(self, run) -> None:
        is_refused(run("edit", "page.png", "a", "-o", "/proc/night.png"), 2, "/proc", "choose another")

    def test_an_existing_output_is_not_overwritten(self, run, here: Path) -> None:
        (here / "night.png").write_bytes(b"mine")
        is_refused(run("edit", "page.png", "a", "-o", "night.png"), 2, "night.png", "--overwrite")
        assert (here / "night.png").read_bytes() == b"mine"

    def test_one_existing_output_of_several_is_refused(self, run, here: Path) -> None:
        (here / "night-2.png").write_bytes(b"mine")
        is_refused(
            run("edit", "page.png", "a", "-o", "night.png", "--count", 3), 2, "night-2.png", "--overwrite"
        )

    def test_an_unknown_output_extension_is_refused(self, run) -> None:
        is_refused(run("edit", "page.png", "a", "-o", "night.psd"), 2, "night.psd", ".png, .jpg")


def test_overwrite_replaces_an_existing_output(run, here: Path, tiny_model_dir: Path) -> None:
    (here / "night.png").write_bytes(b"old")
    output = run(
        "edit", "page.png", "a", "-o", "night.png", "--overwrite", "--steps", 1, "--model", tiny_model_dir
    )
    assert output.code == 0 and output.out == "night.png\n"
    assert Image.open("night.png").size == (64, 48)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("flag", ["--model", "--vae", "--lora", "--controlnet"])
def test_a_malicious_pickle_executes_nothing(
    run, here: Path, tiny_model_dir: Path, flag: str, ending: str
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {here}/owned",)

    import pickle

    import torch

    torch.save({"state_dict": {"a": torch.zeros(1), "b": Evil()}}, here / f"zipped.{ending}")
    (here / f"plain.{ending}").write_bytes(pickle.dumps(Evil()))
    for name in (f"zipped.{ending}", f"plain.{ending}"):
        words = ["edit", "page.png", "a", flag, name]
        words += [] if flag == "--model" else ["--model", tiny_model_dir]
        words += ["--control-image", "page.png"] if flag == "--controlnet" else []
        is_refused(run(*words), 3, name)
        assert not (here / "owned").exists()


def test_a_malicious_pickle_in_a_model_folder_executes_nothing(run, here: Path, tiny_model_dir: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {here}/owned",)

    import pickle

    folder = Path(shutil.copytree(tiny_model_dir, here / "model"))
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    is_refused(run("edit", "page.png", "a", "--model", "model"), 3, "pickle")
    assert not (here / "owned").exists()


def test_a_four_channel_unet_is_refused_as_an_editor(run, here: Path) -> None:
    make_model(here / "plain", in_channels=4)
    is_refused(
        run("edit", "page.png", "a", "--model", "plain"), 3, "takes 4 channels", "needs 8", "ip2p train"
    )


def test_a_missing_model_folder_suggests_the_closest_name(run, here: Path) -> None:
    (here / "mymodel").mkdir()
    is_refused(run("edit", "page.png", "a", "--model", "./mymodle"), 3, "no such model folder", "mymodel")


def test_an_uncached_model_offline_prints_the_download_command(here: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "hf")}
    words = ["edit", "page.png", "a", "--model", "timbrooks/instruct-pix2pix"]
    process = subprocess.run([sys.executable, "-m", "ip2p", *words], env=env, capture_output=True, text=True)
    is_refused(
        Output(process.returncode, process.stdout, process.stderr),
        3,
        "timbrooks/instruct-pix2pix is not in the cache",
        "hf download timbrooks/instruct-pix2pix",
    )


# --- failures during an edit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", ["MemoryError()", "torch.OutOfMemoryError('CUDA out of memory')", "RuntimeError(ALLOCATOR)"]
)
def test_running_out_of_memory_suggests_a_smaller_size(
    run, here: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    import torch

    from ip2p.editing.editor import Editor

    allocator = (
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    )
    raised = eval(error, {"torch": torch, "ALLOCATOR": allocator})

    def full(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(Editor, "edit", full)
    output = run("edit", "page.png", "a", "-o", "night.png", "--model", tiny_model_dir)
    is_refused(output, 4, "out of memory", "smaller size", "batch size of 1")
    assert sorted(os.listdir(here)) == ["page.png"]


def test_a_full_disk_is_reported_and_leaves_no_file(
    run, tiny_model_dir: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    output = run("edit", "page.png", "a", "-o", "night.png", "--steps", 1, "--model", tiny_model_dir)
    is_refused(output, 4, "o space left on")
    assert sorted(os.listdir(here)) == ["page.png"]


SLOW_WRITER = """
import signal, sys, time
from PIL import Image
from ip2p.cli import main as cli

# Where the tests run in the background, their processes begin with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def slow(self, file, *args, **options):
    file.write(b"half a picture")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

Image.Image.save = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_partially_written_file(
    here: Path, tiny_model_dir: Path, number: int, code: int
) -> None:
    words = ["edit", "page.png", "a", "-o", "night.png", "--steps", "1", "--model", str(tiny_model_dir)]
    command = [sys.executable, "-c", SLOW_WRITER, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith("ip2p: stopped") and err.count("\n") == 1
    assert sorted(os.listdir(here)) == ["page.png"]


def test_an_internal_error_shows_a_traceback_only_with_debug(
    run, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ip2p.editing.editor import Editor

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Editor, "edit", broken)
    words = ["edit", "page.png", "a", "--model", tiny_model_dir]
    is_refused(run(*words), 1, "ZeroDivisionError: oh", "--debug")
    output = run(*words, "--debug")
    assert output.code == 1 and "Traceback" in output.err


def test_only_servers_have_the_small_pixel_limit() -> None:
    assert images.MAX_PIXELS == 100_000_000
    assert ServeConfig().max_pixels == 16_000_000


def test_json_lists_outputs_and_settings(run, tiny_model_dir: Path) -> None:
    output = run(
        "edit", "page.png", "a", "--json", "--count", 2, "--seed", 5, "--steps", 1, "--model", tiny_model_dir
    )
    assert output.code == 0
    report = json.loads(output.out)
    assert [(row["file"], row["seed"]) for row in report["outputs"]] == [
        ("page-edited-1.png", 5),
        ("page-edited-2.png", 6),
    ]
    assert report["settings"]["steps"] == 1
