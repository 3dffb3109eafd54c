"""One frozen flat dataclass a verb: it is the command line, its help, and the `run.json` beside an output.

A setting comes from the flag, else from an `IP2P_*` variable (`IP2P_STEPS=30`), else from the settings
file (`ip2p.toml` in the working folder, or `--config FILE`), else from the default written here.
The checks of ranges live here too, so that a bad number is told before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from ip2p import __version__
from ip2p.base.errors import InputError

Config = TypeVar("Config")

DType = Literal["auto", "fp32", "bf16", "fp16"]
SamplerName = Literal["euler_ancestral", "euler", "dpmpp_2m"]
Split = Literal["train", "test", "unseen_phrasings", "unseen_combinations", "paraphrases"]
Spacing = Literal["linspace", "karras", "trailing"]
Weights = Literal["ema", "plain"]
MemoryUse = Literal["auto", "low", "high"]
Fit = Literal["original", "model"]
Mark = Literal["iptc", "visible", "none"]
Language = Literal["english", "latin", "any"]
Way = Literal["completion", "chat"]
Attention = Literal["self", "replace", "refine", "self+replace", "self+refine"]
Preset = Literal["auto", "paper", "code", "storybook"]
LayoutName = Literal["parquet", "magicbrush", "original", "shards", "folders"]
# What the help shows in place of a type; nothing in place of a default of None.
Image = Annotated[str, arg(metavar="IMAGE", help_behavior_hint="")]
Target = Annotated[str, arg(metavar="TARGET", help_behavior_hint="")]
Images = Annotated[tuple[str, ...], arg(metavar="[IMAGE ...]", help_behavior_hint="")]
Words = Annotated[str, arg(metavar="INSTRUCTION", help_behavior_hint="")]
ModelPath = Annotated[str, arg(metavar="MODEL", help_behavior_hint="")]
Out = Annotated[Path | None, arg(aliases=["-o"], metavar="PATH", help_behavior_hint="")]
DataPath = Annotated[str, arg(metavar="DATA", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
Int = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
Model = Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")]
Float = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Threshold = Annotated[float | None, arg(metavar="[THRESHOLD]", help_behavior_hint="")]
Interval = Annotated[tuple[float, float], arg(metavar="LOW HIGH")]
SomeInterval = Annotated[tuple[float, float] | None, arg(metavar="LOW HIGH", help_behavior_hint="")]
Captions = Annotated[str, arg(metavar="CAPTIONS", help_behavior_hint="")]
Triples = Annotated[str, arg(metavar="TRIPLES", help_behavior_hint="")]
Prices = Annotated[tuple[float, float], arg(metavar="READ WRITTEN")]
SomeSampler = Annotated[SamplerName | None, arg(metavar="SAMPLER", help_behavior_hint="")]
SomeSpacing = Annotated[Spacing | None, arg(metavar="SPACING", help_behavior_hint="")]
SomeAttention = Annotated[Attention | None, arg(metavar="ATTENTION", help_behavior_hint="")]
Address = Annotated[str | None, arg(metavar="[ADDRESS]", help_behavior_hint="")]
# Settings that may be given several times; a flag of the command line replaces those of the file.
Loras = UseAppendAction[Annotated[tuple[str, ...], arg(metavar="FILE:WEIGHT", help_behavior_hint="")]]
Axis = Annotated[str, arg(metavar="SETTING[=VALUES]")]
Thens = UseAppendAction[Annotated[tuple[str, ...], arg(metavar="INSTRUCTION", help_behavior_hint="")]]
Models = UseAppendAction[Annotated[tuple[str, ...], arg(metavar="[NAME=]MODEL", help_behavior_hint="")]]
Splits = UseAppendAction[Annotated[tuple[str, ...], arg(metavar="SPLIT", help_behavior_hint="")]]
Names = UseAppendAction[Annotated[tuple[str, ...], arg(metavar="NAME", help_behavior_hint="")]]

MAX_STEPS = 1000  # as many as the noise levels that a model is trained on
MAX_SCALE = 100.0
MAX_COUNT = 1000
MAX_SEED = 2**63 - 1
MIN_SIZE, MAX_SIZE = 16, 4096
MAX_PIXELS = 16_000_000  # of a picture to read; about 200 MB while it is decoded
MIN_KEY = 16  # characters of a server's key: what guessing cannot find
AUTO_MASK = 0.5  # the threshold of a bare --auto-mask
CONFIG_FILE = "ip2p.toml"

# --- the verbs ----------------------------------------------------------------------------------


def parse_size(text: str) -> int | tuple[int, int]:
    """256 → 256, 576x384 → (576, 384); ValueError for anything else."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError("write a side, or width and height as 576x384")
    return (sides[0], sides[1]) if len(sides) == 2 else sides[0]


SideOrSides = int | tuple[int, int]
_SIZE = PrimitiveConstructorSpec[SideOrSides | None](
    nargs=1,
    metavar="SIDE|WxH",
    instance_from_str=lambda words: parse_size(words[0]),
    is_instance=lambda value: value is None or isinstance(value, int | tuple),
    str_from_instance=lambda value: ["" if value is None else str(value)],
)
Size = Annotated[SideOrSides | None, _SIZE, arg(help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Edit a picture with an instruction: ip2p edit page.png "make it night" -o night.png"""

    image: Positional[Image] = ""  # the picture to edit; or a folder, or a glob, of pictures
    more: Positional[Images] = ()  # more pictures, folders or globs
    instruction: Positional[Words] = ""  # what to change, in words
    out: Out = None  # file or folder; default: IMAGE-edited beside it; a folder for many pictures
    count: int = 1  # how many results; more than one are named out-1, out-2, …
    seed: int = 0  # the first result's seed; the next ones count up
    model: str = "storybook"  # storybook, a hub id, a diffusers folder, a .safetensors or .ckpt file
    revision: Text = None  # branch, tag or commit of a model of the hub
    weights: Weights = "ema"  # of a file that holds both: the averaged ones or the last ones
    vae: Model = None  # another autoencoder: a folder, a hub id, or a file
    lora: Loras = ()  # add a LoRA file with a weight, 1 if none is given; may be repeated
    controlnet: Model = None  # a ControlNet for Stable Diffusion 1.x: a folder or a hub id
    control_image: File = None  # the picture that the ControlNet reads: edges, a depth map, …
    control_scale: float = 1.0  # how strongly the ControlNet acts
    steps: Int = None  # sampling steps; default: the model's own, else 20
    sampler: SomeSampler = None  # euler_ancestral, euler, dpmpp_2m; default: the model's own, else the first
    spacing: SomeSpacing = None  # linspace, karras or trailing; default: the model's own, else linspace
    text_cfg: Float = None  # how strongly to follow the instruction; default: the model's own, else 7.5
    image_cfg: Float = None  # how strongly to keep the input picture; default: the model's own, else 1.5
    text_cfg_rescale: float = 0.0  # 0 to 1: take back the contrast that high scales add
    cfg_interval: Interval = (0.0, 1.0)  # guide only between these shares of the noise; 1 is the noisiest
    negative: str = ""  # what to stay away from
    mask: File = None  # picture of the input's size: white is edited, black stays to the byte
    mask_padding: int = 32  # pixels around the mask's white that the model sees too
    feather: Float = None  # pixels over which the edit fades inside the mask; default: by the mask's size
    auto_mask: Threshold = None  # let the model find the region; a lower threshold takes more (alone: 0.5)
    show_mask: File = None  # write the region that was edited as a picture
    size: Size = None  # at which the model works, in pixels; default: near what it was trained at
    fit: Fit = "original"  # original: carry the change to the photo's own pixels; model: stay at --size
    best: Int = None  # of --count results keep so many, ranked by CLIP
    clip: Model = None  # the CLIP that ranks and tells drift: a folder or a hub id; default: the model's own
    caption: Text = None  # for --best: what the picture shows
    edited_caption: Text = None  # for --best: what it shall show; default: the instruction itself
    then: Thens = ()  # edit the result again with this instruction; may be repeated
    from_original: bool = False  # with --then: begin each step anew, with the instructions so far joined
    animation: File = None  # with --then: the steps as a .gif or .webp that moves
    frame_ms: int = 1000  # how long the animation shows a step, in milliseconds
    jobs: int = 2  # threads that read and write the files of many pictures
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    dtype: DType = "auto"  # auto takes half precision where the device has it fast
    memory: MemoryUse = "auto"  # low is slower and needs least; high never saves; auto looks at the device
    batch_size: Int = None  # results made at once; default: 1 on a CPU, 4 elsewhere
    from_settings: File = None  # take the settings (and the instruction) from this edited file
    max_pixels: int = MAX_PIXELS  # refuse a larger picture before decoding it
    overwrite: bool = False  # replace an output that is there already
    json: bool = False  # print the outputs and their settings as JSON
    examples: bool = False  # print instructions that work and advice on the scales
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        check_guidance(self.steps, self.text_cfg, self.image_cfg)
        check_more_guidance(self.text_cfg_rescale, self.cfg_interval)
        check_int("--count", self.count, 1, MAX_COUNT, "--count 4")
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")
        if self.batch_size is not None:
            check_int("--batch-size", self.batch_size, 1, MAX_COUNT, "--batch-size 4")
        check_int("--max-pixels", self.max_pixels, 1, 2**40, f"--max-pixels {MAX_PIXELS}")
        check_size(self.size)
        check_masking(self.mask, self.auto_mask, self.mask_padding, self.feather)
        if self.show_mask and not self.mask and self.auto_mask is None:
            raise InputError("--show-mask has no mask to show; add --mask FILE or --auto-mask.")
        check_float("--control-scale", self.control_scale, 0, MAX_SCALE, "--control-scale 1")
        if (self.controlnet is None) != (self.control_image is None):
            lacks = "--control-image FILE" if self.controlnet else "--controlnet MODEL"
            raise InputError(f"a ControlNet needs a model and a picture to read; add {lacks}.")
        for text in self.lora:
            parse_lora(text)
        if self.best is not None:
            check_int("--best", self.best, 1, MAX_COUNT, "--count 8 --best 2")
            if self.best > self.count:
                raise InputError(
                    f"--best {self.best} is more than --count {self.count}. Try --count {4 * self.best}."
                )
        if self.edited_caption is not None and self.caption is None:
            raise InputError(
                "--edited-caption says where to go; add --caption to say what the picture shows."
            )
        if self.caption is not None and self.best is None:
            raise InputError("--caption helps to rank results; add --count 8 --best 2.")
        if any(not words.strip() for words in self.then):
            raise InputError('an instruction after --then is empty; write: --then "make it snow"')
        if self.then and self.count > 1:
            raise InputError("--then goes on from one result; leave --count away.")
        if self.then and self.mask and self.fit == "model":
            raise InputError(
                "--fit model cuts the picture to the mask, which --then needs again; leave it away."
            )
        if (self.from_original or self.animation) and not self.then:
            flag = "--from-original" if self.from_original else "--animation"
            raise InputError(f'{flag} is for edits in a row; add --then "make it snow".')
        if self.animation and self.animation.suffix.lower() not in (".gif", ".webp"):
            raise InputError(f"{self.animation}: animations are written as .gif or .webp. Change the ending.")
        check_int("--frame-ms", self.frame_ms, 20, 60_000, "--frame-ms 1000")
        check_int("--jobs", self.jobs, 1, 64, "--jobs 2")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Draw the results over two settings as one picture: ip2p grid page.png "make it night" -o grid.png"""

    image: Positional[Image] = ""  # the picture to edit
    instruction: Positional[Words] = ""  # what to change, in words
    out: Out = None  # the grid's file; default: IMAGE-grid beside the picture
    columns: Axis = "text-cfg"  # text-cfg, image-cfg, seed or steps; with values: text-cfg=3,5,7.5
    rows: Axis = "image-cfg"  # as --columns, another setting
    cell: int = 256  # longer side of a picture in the grid, in pixels
    seed: int = 0  # where the grid does not vary it
    model: str = "storybook"  # storybook, a hub id, a diffusers folder, a .safetensors or .ckpt file
    revision: Text = None  # branch, tag or commit of a model of the hub
    weights: Weights = "ema"  # of a file that holds both: the averaged ones or the last ones
    vae: Model = None  # another autoencoder: a folder, a hub id, or a file
    lora: Loras = ()  # add a LoRA file with a weight, 1 if none is given; may be repeated
    steps: Int = None  # where the grid does not vary them; default: the model's own, else 20
    sampler: SomeSampler = None  # euler_ancestral, euler, dpmpp_2m; default: the model's own, else the first
    spacing: SomeSpacing = None  # linspace, karras or trailing; default: the model's own, else linspace
    text_cfg: Float = None  # where the grid does not vary it; default: the model's own, else 7.5
    image_cfg: Float = None  # where the grid does not vary it; default: the model's own, else 1.5
    text_cfg_rescale: float = 0.0  # 0 to 1: take back the contrast that high scales add
    cfg_interval: Interval = (0.0, 1.0)  # guide only between these shares of the noise; 1 is the noisiest
    negative: str = ""  # what to stay away from
    auto_mask: Threshold = None  # let the model find the region; a lower threshold takes more (alone: 0.5)
    size: Size = None  # at which the model works, in pixels; default: near what it was trained at
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    dtype: DType = "auto"  # auto takes half precision where the device has it fast
    memory: MemoryUse = "auto"  # low is slower and needs least; high never saves; auto looks at the device
    max_pixels: int = MAX_PIXELS  # refuse a larger picture before decoding it
    overwrite: bool = False  # replace an output that is there already
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        check_guidance(self.steps, self.text_cfg, self.image_cfg)
        check_more_guidance(self.text_cfg_rescale, self.cfg_interval)
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")
        check_int("--cell", self.cell, 32, 2048, "--cell 256")
        check_int("--max-pixels", self.max_pixels, 1, 2**40, f"--max-pixels {MAX_PIXELS}")
        check_size(self.size)
        check_masking(None, self.auto_mask, 32, None)
        for text in self.lora:
            parse_lora(text)
        columns, rows = parse_axis("--columns", self.columns), parse_axis("--rows", self.rows)
        if columns[0] == rows[0]:
            raise InputError(f"--columns and --rows are both {rows[0]}; choose another, as in: --rows seed")
        if len(columns[1] or ()) * len(rows[1] or ()) > MAX_COUNT:
            raise InputError(
                f"a grid has at most {MAX_COUNT} pictures; give --columns and --rows fewer values."
            )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve edits over HTTP, with a page in the browser: ip2p serve --port 7860"""

    host: str = "127.0.0.1"  # address to listen at; other machines reach 0.0.0.0, and only with a key
    port: int = 7860  # of TCP
    model: Models = ("storybook",)  # what is served, the default first; may be repeated (storybook alone)
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    dtype: DType = "auto"  # auto takes half precision where the device has it fast
    memory: MemoryUse = "auto"  # low is slower and needs least; high never saves; auto looks at the device
    api_key_file: File = None  # keys that callers must have, one a line; or one in IP2P_API_KEY
    public: bool = False  # let other machines in without a key
    allow_host: Names = ()  # a further name in the address by which callers may come; may be repeated
    allow_origin: Names = ()  # a page elsewhere that may post and read, as https://a.example; may be repeated
    max_pixels: int = MAX_PIXELS  # refuse a larger picture before decoding it
    max_steps: int = 150  # refuse more sampling steps
    max_count: int = 8  # refuse more results a request
    max_words: int = 2000  # refuse a longer instruction, in characters
    max_mb: int = 64  # refuse a larger request, in megabytes
    queue: int = 64  # requests that may wait; more are told when to come again
    per_client: int = 16  # requests of one caller that may wait or run
    join: Int = None  # pictures that go through the network together; default: 4 on a CPU, else 8
    keep_seconds: float = 600.0  # how long results can be fetched
    store: Folder = None  # folder for them; default: one that goes when the server ends
    store_mb: int = 1024  # most that lies there; the oldest go first
    urls: bool = False  # fetch pictures that a request names by http(s), from public addresses alone
    safety: Model = None  # a picture classifier that refuses unsafe results: a folder or a hub id
    mark: Mark = "iptc"  # what tells that a result was edited: IPTC's tag in the file, words too, or nothing
    drain_seconds: float = 30.0  # after SIGTERM or Ctrl-C: how long what runs may take to finish
    ray: Address = None  # on a Ray cluster: at this address, else at RAY_ADDRESS, else one on this machine
    replicas: Int = None  # processes there, each with the models; default: one a GPU of the cluster, else one
    replica_gpus: Float = None  # of each; default: one if the cluster has any
    replica_cpus: int = 1  # of each, and so its threads on a CPU
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, or that would let anybody in unasked."""
        check_int("--port", self.port, 0, 65535, "--port 7860")
        self.models()
        if not is_loopback(self.host) and not self.public and not self.api_keys():
            raise InputError(
                f"--host {self.host} lets other machines in. Ask them for a key (set IP2P_API_KEY, or "
                "--api-key-file FILE), or say --public."
            )
        for name in self.allow_host:
            if not name or set(name) & set("/@ ") or (":" in name and not is_address(name)):
                raise InputError(
                    f"--allow-host {name!r} is not a name alone. Try --allow-host pictures.example.org."
                )
        for origin in self.allow_origin:
            scheme, colon, name = origin.partition("://")
            if scheme not in ("http", "https") or not colon or not name or set(name) & set("/@? "):
                raise InputError(
                    f"--allow-origin {origin!r} is not an origin. Try --allow-origin https://example.org."
                )
        check_int("--max-pixels", self.max_pixels, 1, 2**40, f"--max-pixels {MAX_PIXELS}")
        check_int("--max-steps", self.max_steps, 1, MAX_STEPS, "--max-steps 150")
        for name, most in (
            *(("max_count", MAX_COUNT), ("max_words", 10**6), ("max_mb", 4096), ("queue", 10**6)),
            *(("per_client", 10**6), ("store_mb", 10**9)),
        ):
            flag = f"--{name.replace('_', '-')}"
            check_int(flag, getattr(self, name), 1, most, f"{flag} {getattr(ServeConfig, name)}")
        if self.join is not None:
            check_int("--join", self.join, 1, 1024, "--join 8")
        check_float("--keep-seconds", self.keep_seconds, 1, 1e9, "--keep-seconds 600")
        check_float("--drain-seconds", self.drain_seconds, 0, 86_400, "--drain-seconds 30")
        check_int("--replica-cpus", self.replica_cpus, 1, 1024, "--replica-cpus 4")
        if self.replicas is not None:
            check_int("--replicas", self.replicas, 1, 4096, "--replicas 2")
        if self.replica_gpus is not None:
            check_float("--replica-gpus", self.replica_gpus, 0, 64, "--replica-gpus 1")
        for name in ("replicas", "replica_gpus", "replica_cpus"):
            if self.ray is None and getattr(self, name) != getattr(ServeConfig, name):
                raise InputError(f"--{name.replace('_', '-')} is for Ray; add --ray.")

    def models(self) -> dict[str, str]:
        """The models by the names under which they are served. Raises InputError for a name given twice."""
        return parse_models(self.model)

    def api_keys(self, env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
        """The keys of `--api-key-file`, else the one in IP2P_API_KEY. Raises InputError for bad ones.

        They are no setting, so that no `run.json` and no list of processes shows them.
        """
        if self.api_key_file is None:
            keys, source = [env["IP2P_API_KEY"]] if env.get("IP2P_API_KEY") else [], "IP2P_API_KEY"
        else:
            source = f"--api-key-file {self.api_key_file}"
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{source} cannot be read ({error}). Write a key a line into it.") from None
            keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not keys:
                raise InputError(f"{source} holds no key. Write one a line into it.")
        for key in keys:
            if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"a key of {source} cannot be used: it needs {MIN_KEY} characters or more of ASCII, "
                    "without blanks. Try: openssl rand -hex 24"
                )
        return tuple(keys)


@dataclass(frozen=True, kw_only=True)
class UiConfig:
    """Edit in the browser: ip2p ui"""

    port: int = 7860  # of this machine alone; the next free one is taken where it is in use
    model: Models = ("storybook",)  # what can be chosen; may be repeated (storybook alone)
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    dtype: DType = "auto"  # auto takes half precision where the device has it fast
    memory: MemoryUse = "auto"  # low is slower and needs least; high never saves; auto looks at the device
    max_pixels: int = MAX_PIXELS  # refuse a larger picture before decoding it
    mark: Mark = "iptc"  # what tells that a result was edited: IPTC's tag in the file, words too, or nothing
    no_browser: bool = False  # do not open the page, only tell its address
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used."""
        self.serving().check()

    def serving(self) -> ServeConfig:
        """How the page is served: to this machine alone."""
        shared = {field.name for field in dataclasses.fields(ServeConfig)}
        return ServeConfig(**{name: value for name, value in vars(self).items() if name in shared})


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say what a model is and whether it is whole: ip2p model info editor.safetensors"""

    model: Positional[ModelPath] = ""  # storybook, a hub id, a diffusers folder, a .safetensors or .ckpt file
    json: bool = False  # print it as JSON
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Go between a diffusers folder and a single file, both ways: ip2p model convert editor.ckpt editor"""

    source: Positional[ModelPath] = ""  # a hub id, a diffusers folder, a .safetensors or .ckpt file
    target: Positional[Target] = ""  # a .safetensors file, or a folder
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"  # of the weights that are written
    weights: Weights = "ema"  # of a file that holds both: the averaged ones or the last ones
    overwrite: bool = False  # replace a target that is there already
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """List the models in the package and in the hub's cache: ip2p model list"""

    json: bool = False  # print it as JSON
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Draw pages of the storybook: ip2p storybook draw --count 16 -o pages"""

    out: Out = None  # folder for the pictures; made when missing
    count: int = 16  # how many pages; a pair edits the page of its number
    seed: int = 0  # page k of a seed is the same whatever the count
    size: int = 256  # side of a picture, in pixels
    split: Split = "train"  # the pages and phrasings of training, or some that it never sees
    pairs: File = None  # parquet of edit pairs, in the columns of the published data set
    captions: File = None  # text file with a caption a line
    varied: bool = False  # say the captions in many forms, as training does; else each in the fullest one
    triples: File = None  # parquet of exact edits in words: caption, instruction, edited_caption
    sheet: File = None  # one picture that shows the first 64 pages
    overwrite: bool = False  # replace an output that is there already
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for a number that cannot be used."""
        check_int("--count", self.count, 1, 10_000_000, "--count 16")
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")
        check_int("--size", self.size, 32, 1024, "--size 256")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train an editor on pairs of pictures: ip2p train --data pairs --base MODEL --output editor --steps N"""

    data: DataPath = ""  # parquet, folders, shards or a hub id of pairs (docs/data.md); or storybook
    base: ModelPath = ""  # Stable Diffusion or an editor: a hub id, a folder, a file; or a UNet's config.json
    output: Out = None  # the editor's folder; the same call goes on from what lies there
    steps: int = 1000  # optimizer steps
    parts: Model = None  # with a config as --base: the model that gives autoencoder, text encoder and noise
    size: Size = None  # at which pictures are seen, in pixels; default: the base's own
    resize_to: Int = None  # draw crops: the shorter side is resized to anything from --size to this
    no_flip: bool = False  # do not mirror pictures; those whose words name a side never are
    batch: int = 32  # samples of a step, over all processes
    micro_batch: Int = None  # samples at once on a process; the rest accumulate
    lr: float = 1e-4  # learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate after the warm-up
    warmup: int = 0  # steps over which the learning rate rises
    weight_decay: float = 0.01  # AdamW's
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.999  # AdamW's
    clip_norm: float = 1.0  # gradients longer than this are shortened to it; 0 leaves them
    ema: float = 0.9999  # most decay of the weights' moving average, which is what is written; 0: none
    ema_every: Literal["step", "micro"] = "step"  # once a step or, as the paper's code, a micro-batch
    text_null: float = 0.05  # share of samples that lose their instruction alone
    image_null: float = 0.05  # share that lose their picture alone
    both_null: float = 0.05  # share that lose both
    min_snr: Float = None  # gamma of Min-SNR weighting; 5 is its paper's; default: none
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"  # auto is what the base predicts
    lora: Int = None  # train a LoRA of this rank in place of all weights
    lora_alpha: Float = None  # its strength; default: the rank
    lora_targets: Literal["attention", "all"] = "attention"  # the layers beside which it lies
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the passes; the weights stay fp32
    compile: bool = False  # compile the UNet first; pays on a GPU in long runs
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third slower
    cache: Folder = None  # where latents and encoded texts are kept; default: ~/.cache/ip2p
    cache_dtype: Literal["fp16", "fp32"] = "fp16"  # of the kept numbers
    no_cache: bool = False  # encode the pictures anew each time
    pool: int = 1024  # without a cache: pairs that are read and encoded at once
    reuse: int = 1  # without a cache: how often each is used before the next pool
    workers: int = 1  # processes that read pictures ahead
    keep: int = 2  # checkpoints that stay
    save_every: int = 500  # steps between two checkpoints
    validate_every: int = 500  # steps between two validations; 0: none
    held_out: int = 8  # pairs kept out of training, for the validations; at most a tenth of all
    validate_steps: int = 20  # sampling steps of a validation's edits
    clip: Model = None  # a CLIP for the validations' curves: a folder or a hub id; default: the base's own
    stop_when_worse: Int = None  # end after so many validations in a row that are no better than the best
    watch: str = "auto"  # which of their numbers that is; auto: success, else directional, else loss
    nan_steps: int = 1  # end after so many steps in a row that are not finite
    track: str = "auto"  # where curves go: tensorboard, wandb, … as accelerate knows them, none; auto
    profile: bool = False  # print where a step's time goes, and images a second
    seconds: Float = None  # save and stop after so many seconds
    seed: int = 0  # of the order, the noise and the dropout
    revision: Text = None  # branch, tag or commit of a base of the hub
    vae: Model = None  # another autoencoder: a folder, a hub id, or a file
    data_revision: Text = None  # of data of the hub
    split: str = "train"  # of data of the hub
    stream: bool = False  # read data of the hub without fetching them whole; nothing is cached
    license: Text = None  # of the new editor, for its card
    base_license: Text = None  # of the base, for the card
    data_license: Text = None  # of the data, for the card
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16"  # of the weights that are written at the end
    ray: Int = None  # train on so many workers of a Ray cluster
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    config: File = None  # settings file, .toml or .yaml; default: ip2p.toml in this folder, if there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        example = "ip2p train --data pairs --base MODEL --output editor --steps 1000"
        for name in ("data", "base", "output"):
            if not str(getattr(self, name) or "").strip():
                raise InputError(f"--{name} is missing; write: {example}")
        check_int("--steps", self.steps, 1, 10**9, "--steps 1000")
        check_size(self.size)
        check_int("--batch", self.batch, 1, 10**6, "--batch 32")
        if self.micro_batch is not None:
            check_int("--micro-batch", self.micro_batch, 1, self.batch, f"--micro-batch {min(8, self.batch)}")
            if self.batch % self.micro_batch:
                raise InputError(
                    f"--batch {self.batch} is not a multiple of --micro-batch {self.micro_batch}. "
                    f"Try --batch {self.micro_batch * -(-self.batch // self.micro_batch)}."
                )
        check_float("--lr", self.lr, 0, 1, "--lr 1e-4")
        check_int("--warmup", self.warmup, 0, 10**9, "--warmup 500")
        check_float("--weight-decay", self.weight_decay, 0, 10, "--weight-decay 0.01")
        for flag, decay in (("--beta1", self.beta1), ("--beta2", self.beta2), ("--ema", self.ema)):
            if not 0 <= decay < 1:
                raise InputError(f"{flag} is {decay}; it must be at least 0 and less than 1. Try {flag} 0.9.")
        check_float("--clip-norm", self.clip_norm, 0, 1e9, "--clip-norm 1")
        shares = {"text": self.text_null, "image": self.image_null, "both": self.both_null}
        for name, share in shares.items():
            check_float(f"--{name}-null", share, 0, 1, f"--{name}-null 0.05")
        if sum(shares.values()) > 1:
            raise InputError(
                "--text-null, --image-null and --both-null are more than 1 together. Try 0.05 each."
            )
        if self.min_snr is not None:
            check_float("--min-snr", self.min_snr, 0.01, 1e6, "--min-snr 5")
        if self.lora is not None:
            check_int("--lora", self.lora, 1, 4096, "--lora 16")
        if self.lora_alpha is not None and self.lora is None:
            raise InputError("--lora-alpha is a LoRA's; add --lora 16.")
        for name in ("pool", "reuse", "keep", "save_every", "nan_steps", "validate_steps"):
            flag = f"--{name.replace('_', '-')}"
            check_int(flag, getattr(self, name), 1, 10**9, f"{flag} {getattr(TrainConfig, name)}")
        for name in ("validate_every", "held_out", "workers"):
            flag = f"--{name.replace('_', '-')}"
            check_int(flag, getattr(self, name), 0, 10**9, f"{flag} {getattr(TrainConfig, name)}")
        if self.stop_when_worse is not None:
            check_int("--stop-when-worse", self.stop_when_worse, 1, 10**6, "--stop-when-worse 5")
            if not self.validate_every or not self.held_out:
                raise InputError(
                    "--stop-when-worse needs validations; leave --validate-every and --held-out."
                )
        if self.seconds is not None:
            check_float("--seconds", self.seconds, 0, 1e9, "--seconds 540")
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")
        if self.ray is not None:
            check_int("--ray", self.ray, 1, 4096, "--ray 8")


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig:
    """Say what is in a data set and what is wrong with it: ip2p data check pairs --sheet sheet.png"""

    data: Positional[DataPath] = ""  # a folder, a parquet, tar, CSV or JSONL file, a hub id, or storybook
    limit: Int = None  # look at the first so many rows; default: all, and of the storybook 1000
    sheet: File = None  # one picture with pairs from all over the set
    json: bool = False  # print the report as JSON
    split: str = "train"  # where names tell of several; storybook: as in `storybook draw`
    stream: bool = False  # read a hub's data set where it lies, without fetching it whole
    revision: Text = None  # branch, tag or commit of a hub's data set
    size: int = 256  # of the storybook's pages: the side in pixels
    seed: int = 0  # of the storybook's pages
    overwrite: bool = False  # replace a sheet that is there already
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for a number that cannot be used."""
        if self.limit is not None:
            check_int("--limit", self.limit, 1, 10**9, "--limit 1000")
        check_int("--size", self.size, 32, 1024, "--size 256")
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")


@dataclass(frozen=True, kw_only=True)
class DataConvertConfig:
    """Write a data set in another layout: ip2p data convert pairs shards --to shards"""

    data: Positional[DataPath] = ""  # a folder, a parquet, tar, CSV or JSONL file, a hub id, or storybook
    target: Positional[Target] = ""  # a folder; goes on from what is there already
    to: LayoutName = "parquet"  # the hub's columns, MagicBrush's, the paper's folders, tars, or a table
    count: Int = None  # write the first so many rows; the storybook needs it
    shard_rows: int = 1000  # rows a file of parquet or tar, and a part that is committed at once
    split: str = "train"  # where names tell of several; storybook: as in `storybook draw`
    stream: bool = False  # read a hub's data set where it lies, without fetching it whole
    revision: Text = None  # branch, tag or commit of a hub's data set
    size: int = 256  # of the storybook's pages: the side in pixels
    seed: int = 0  # of the storybook's pages
    overwrite: bool = False  # begin anew in a folder that an earlier conversion wrote
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for a number that cannot be used."""
        if self.count is not None:
            check_int("--count", self.count, 1, 10**9, "--count 1000")
        check_int("--shard-rows", self.shard_rows, 1, 1_000_000, "--shard-rows 1000")
        check_int("--size", self.size, 32, 1024, "--size 256")
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")


@dataclass(frozen=True, kw_only=True)
class SynthInstructConfig:
    """Write edits of captions with a language model: ip2p synth instruct captions.txt -o triples.parquet"""

    captions: Positional[Captions] = ""  # .txt, .jsonl, .csv, .parquet, a folder of them, a hub's data set
    out: Out = None  # a .parquet file, its parts in a folder beside it; or that folder; goes on from there
    model: str = "storybook"  # storybook, a folder, a hub id; with --server its name for the model
    server: Text = None  # ask a server in OpenAI's protocol, as http://localhost:8000/v1
    way: Way = "completion"  # of asking a server: completion for a tuned model, chat for a general one
    shots: Int = None  # seed triples that the model is shown; default: 8 with --way chat, else none
    edits: int = 1  # of each caption
    retries: int = 3  # an answer that is refused is asked for so often again
    allow_spatial: bool = False  # take edits that move or turn things, which Prompt-to-Prompt cannot draw
    block_list: File = None  # words that no text may hold, one a line, in place of the built-in ones
    column: Text = None  # of the captions; default: the first that is known, such as TEXT or caption
    sample: Int = None  # so many captions, drawn by --seed; default: all
    seed: int = 0  # of the sample; answers are drawn by their captions
    min_words: int = 2  # of a caption
    max_words: int = 50  # of a caption
    min_score: Float = None  # of the aesthetic score in the table
    language: Language = "english"  # of the captions, by their letters and commonest words
    split: str = "train"  # of a hub's data set
    revision: Text = None  # branch, tag or commit of a hub's data set
    stream: bool = False  # read a hub's data set where it lies, without fetching it whole
    temperature: float = 0.7  # the paper's code's, as the next two; 0 takes the likeliest word
    frequency_penalty: float = 0.1  # against words that the answer has already
    max_tokens: int = 256  # of an answer
    batch: int = 32  # answers at once of a model here
    together: int = 8  # requests under way at once
    rate: Float = None  # at most so many requests a second
    price: Prices = (0.0, 0.0)  # of a million tokens read and written, to tell what it cost
    timeout: float = 120.0  # seconds that one answer of a server may take
    patience: float = 300.0  # seconds for which a server may be away before the run stops
    key_variable: Text = None  # holds the server's key; default: IP2P_API_KEY, else OPENAI_API_KEY
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    dtype: DType = "auto"  # auto takes half precision where the device has it fast
    workers: Int = None  # processes here; default: as many as cores for small models on a CPU, else 1
    ray: Address = None  # on a Ray cluster: at this address, else at RAY_ADDRESS, else one on this machine
    ray_workers: Int = None  # default: as many as fit
    ray_gpus: Float = None  # a worker; default: one if the cluster has any
    threads: Int = None  # of each worker; default: 1 where there are several or --ray is given, else all
    overwrite: bool = False  # begin anew in place of an output that is there
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        example = "ip2p synth instruct captions.txt -o triples.parquet"
        check_named(self, ("captions", "the captions are"), ("out", "-o is"), example=example)
        for flag, value, least, usual in (
            ("--edits", self.edits, 1, 2),
            ("--retries", self.retries, 0, 3),
            ("--min-words", self.min_words, 0, 2),
            ("--max-words", self.max_words, 1, 50),
            ("--max-tokens", self.max_tokens, 1, 256),
            ("--batch", self.batch, 1, 32),
            ("--together", self.together, 1, 8),
        ):
            check_int(flag, value, least, 1_000_000, f"{flag} {usual}")
        check_some(self, sample=1000, shots=8)
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")
        check_float("--temperature", self.temperature, 0, 2, "--temperature 0.7")
        check_float("--frequency-penalty", self.frequency_penalty, -2, 2, "--frequency-penalty 0.1")
        if self.min_score is not None:
            check_float("--min-score", self.min_score, 0, 10, "--min-score 5")
        for price in self.price:
            check_float("--price", price, 0, 1e6, "--price 0.15 0.6")
        check_float("--timeout", self.timeout, 0.1, 86_400, "--timeout 120")
        check_float("--patience", self.patience, 0, 1e6, "--patience 300")
        if self.rate is not None:
            check_float("--rate", self.rate, 0.001, 1e6, "--rate 5")
        if self.server is not None and "@" in self.server:
            raise InputError("--server holds a name or a password; put the key into the environment instead.")
        if self.server is not None and self.model == "storybook":
            raise InputError("--server needs the name of its model; add --model NAME.")
        for name in ("way", "rate", "price", "key_variable"):
            if self.server is None and getattr(self, name) != getattr(SynthInstructConfig, name):
                raise InputError(f"--{name.replace('_', '-')} is for a server; add --server URL.")
        if self.server is not None and (self.ray is not None or (self.workers or 1) > 1):
            raise InputError(
                "--workers and --ray are not for a server: --rate holds in each process. Raise --together."
            )
        check_workers(self)


@dataclass(frozen=True, kw_only=True)
class SynthTuneConfig:
    """Tune a language model that writes edits: ip2p synth tune-lm --base MODEL -o writer --lora 16"""

    base: ModelPath = ""  # a causal language model: a folder or a hub id
    out: Out = None  # folder of the tuned model
    triples: File = None  # .parquet, .jsonl, .csv or a folder of `synth instruct`; default: the seed triples
    lora: Int = None  # train a LoRA of this rank and merge it; default: the whole model
    epochs: float = 3.0  # over the triples
    batch: int = 16  # triples of a step
    rate: Float = None  # learning rate; default: 5e-5, and 2e-4 for a LoRA
    warm_up: float = 0.03  # share of the steps over which it rises
    weight_decay: float = 0.01  # AdamW's
    clip_norm: float = 1.0  # gradients longer than this are shortened to it
    max_length: int = 512  # tokens of a caption and its edit; longer ones are left out
    backend: Literal["auto", "plain", "trl"] = "auto"  # trl: TRL's trainer, on many devices; auto: if there
    seed: int = 0  # of the order and the LoRA
    revision: Text = None  # branch, tag or commit of a base of the hub
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    overwrite: bool = False  # replace an output that is there already
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used."""
        example = "ip2p synth tune-lm --base MODEL -o writer"
        check_named(self, ("base", "--base is"), ("out", "-o is"), example=example)
        check_some(self, lora=16)
        check_float("--epochs", self.epochs, 0.001, 1e4, "--epochs 3")
        check_int("--batch", self.batch, 1, 10**6, "--batch 16")
        if self.rate is not None:
            check_float("--rate", self.rate, 1e-9, 1, "--rate 5e-5")
        check_float("--warm-up", self.warm_up, 0, 1, "--warm-up 0.03")
        check_float("--weight-decay", self.weight_decay, 0, 10, "--weight-decay 0.01")
        check_float("--clip-norm", self.clip_norm, 1e-6, 1e9, "--clip-norm 1")
        check_int("--max-length", self.max_length, 8, 10**6, "--max-length 512")
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")


# How `synth pairs` draws unless told otherwise, and as the paper and its code do. 0 or None turns a way off.
PAIRS: dict[str, Any] = {
    **{"most": 32, "enough": 4, "round_size": 8, "worth": 0.12, "risk": 0.05, "p_per_source": 1},
    **{"steps": 20, "sampler": "euler_ancestral", "spacing": "linspace", "attention": "self"},
    **{"early_at": 0.0, "tiny_vae": None},
}
# What is drawn on storybook pages, by its small model, comes out in fewer steps, and is hopeless sooner.
PAIRS_STORYBOOK: dict[str, Any] = PAIRS | {"steps": 10, "worth": 0.32, "early_at": 0.5}
PAIRS_AS_PAPER: dict[str, Any] = PAIRS | {
    **{"most": 100, "enough": 0, "round_size": 100, "risk": 0.0, "p_per_source": 1},
    **{"steps": 100, "sampler": "euler_ancestral", "spacing": "linspace", "attention": "self"},
    **{"early_at": 0.0, "tiny_vae": None},
}


@dataclass(frozen=True, kw_only=True)
class SynthPairsConfig:
    """Draw pairs of pictures for edits in words: ip2p synth pairs triples.parquet -o pairs"""

    triples: Positional[Triples] = ""  # .parquet, .jsonl, .csv, or a folder that `synth instruct` wrote
    out: Out = None  # folder of parquet; the same call goes on from what lies there
    model: str = "storybook"  # storybook, a hub id, a diffusers folder, a .safetensors or .ckpt file
    revision: Text = None  # branch, tag or commit of a model of the hub
    weights: Weights = "ema"  # of a file that holds both: the averaged ones or the last ones
    vae: Model = None  # another autoencoder: a folder, a hub id, or a file
    clip: Model = None  # the CLIP that judges; default: the model's own, else openai/clip-vit-large-patch14
    count: Int = None  # draw the first so many triples
    keep: Literal["passed", "all"] = "passed"  # all: every candidate that was drawn, with its scores
    as_paper: bool = False  # none of the savings: 100 candidates of 100 steps each, none given up
    most: Int = None  # candidates of a triple; default: 32
    enough: Int = None  # a triple is done after so many that pass, 0: draw all candidates; default: 4
    round_size: Int = None  # candidates of a triple between two looks at what passed; default: 8
    worth: Float = None  # share of passes below which a triple is given up; default: 0.12, storybook 0.32
    risk: Float = None  # of giving up one that is worth it, 0: none is given up; default: 0.05
    early_at: Float = None  # share of the steps at which what is far off goes; default: 0, storybook 0.5
    early_margin: float = 0.2  # how far below a threshold a similarity lies that is refused early
    p_per_source: Int = None  # candidates with one source picture, each with its own p; default: 1
    steps: Int = None  # sampling steps; default: 20, storybook 10
    sampler: SomeSampler = None  # euler_ancestral, euler or dpmpp_2m; default: euler_ancestral
    spacing: SomeSpacing = None  # noise schedule: linspace, karras or trailing; default: linspace
    tiny_vae: Model = None  # a tiny autoencoder for the pictures that are judged; default: none
    attention: SomeAttention = None  # what a pair shares: self, replace, refine, self+…; default: self
    p: Interval = (0.1, 0.9)  # the share of the steps in which it is shared, drawn for each candidate
    scale: SomeInterval = None  # of guidance, drawn for each; default: 3 5 for the storybook, else 7.5 15
    preset: Preset = "auto"  # of the least similarities; auto: storybook for its CLIP, else paper
    image: Float = None  # least similarity of the two pictures, instead of the preset's
    caption: Float = None  # of each picture and its caption
    directional: Float = None  # of the change in the pictures and in the captions
    size: Size = None  # of the pictures; default: what the model was trained at
    batch_size: Int = None  # pairs drawn at once; default: 4 on a CPU, else 8
    license: Text = None  # of the pictures, for their column
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    dtype: DType = "auto"  # auto takes half precision where the device has it fast
    workers: Int = None  # processes here; default: as many as cores for small models on a CPU, else 1
    ray: Address = None  # on a Ray cluster: at this address, else at RAY_ADDRESS, else one on this machine
    ray_workers: Int = None  # default: as many as fit
    ray_gpus: Float = None  # a worker; default: one if the cluster has any
    threads: Int = None  # of each worker; default: 1 where there are several or --ray is given, else all
    overwrite: bool = False  # begin anew in place of an output that is there
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        check_named(
            self,
            ("triples", "the triples are"),
            ("out", "-o is"),
            example="ip2p synth pairs triples.parquet -o pairs",
        )
        for name, value in PAIRS_AS_PAPER.items():
            given = getattr(self, name)
            if self.as_paper and given is not None and given != value:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {given} is not the paper's; leave out {flag} or --as-paper.")
        how = self.how()
        for flag, value, least in (
            ("--most", how["most"], 1),
            ("--enough", how["enough"], 0),
            ("--round-size", how["round_size"], 1),
            ("--p-per-source", how["p_per_source"], 1),
        ):
            check_int(flag, value, least, 10_000, f"{flag} {PAIRS[flag[2:].replace('-', '_')]}")
        check_float("--worth", how["worth"], 1e-4, 0.999, "--worth 0.1")
        check_float("--risk", how["risk"], 0, 0.999, "--risk 0.05")
        check_float("--early-at", how["early_at"], 0, 1, "--early-at 0.5")
        check_float("--early-margin", self.early_margin, 0, 2, "--early-margin 0.2")
        check_int("--steps", how["steps"], 1, MAX_STEPS, "--steps 20")
        check_interval("--p", self.p, 1, "--p 0.1 0.9")
        if self.scale is not None:
            check_interval("--scale", self.scale, MAX_SCALE, "--scale 7.5 15")
        check_thresholds(self.image, self.caption, self.directional)
        check_some(self, count=100, batch_size=8)
        check_size(self.size)
        check_workers(self)

    def how(self, *, storybook: bool = False) -> dict[str, Any]:
        """Each of the ways to save work as it is to be, the names being those of `PAIRS`.

        storybook: whether the model that draws is the storybook's.
        """
        usual = PAIRS_AS_PAPER if self.as_paper else PAIRS_STORYBOOK if storybook else PAIRS
        if self.keep == "all":
            usual = usual | {"early_at": 0.0}  # all that is begun is drawn
        return {
            name: value if getattr(self, name) is None else getattr(self, name)
            for name, value in usual.items()
        }


@dataclass(frozen=True, kw_only=True)
class SynthFilterConfig:
    """Keep the good pairs of a data set, by CLIP: ip2p synth filter pairs -o kept"""

    data: Positional[DataPath] = ""  # a folder, a parquet, tar, CSV or JSONL file, or a hub id
    out: Out = None  # folder of parquet; the same call goes on from what lies there
    preset: Preset = "auto"  # of the least similarities; auto: storybook for its CLIP, else paper
    image: Float = None  # least similarity of the two pictures, instead of the preset's
    caption: Float = None  # of each picture and its caption
    directional: Float = None  # of the change in the pictures and in the captions
    top: int = 4  # the best so many of each edit stay, by the directional similarity; 0: all
    near_bits: int = 4  # of 64 in which two pictures' hashes differ that count as the same; -1: not compared
    keep: Literal["passed", "all"] = "passed"  # all: every row that can be read, with its scores
    clip: Model = None  # measures rows without scores; default: that of the others, else the paper's ViT-L/14
    rescore: bool = False  # measure rows that have their scores too
    safety: Model = None  # a picture classifier, a folder or a hub id: pairs that it calls NSFW or unsafe go
    count: Int = None  # look at the first so many rows
    split: str = "train"  # where names tell of several
    revision: Text = None  # branch, tag or commit of a hub's data set
    stream: bool = False  # read a hub's data set where it lies, without fetching it whole
    batch: int = 32  # pictures that are measured at once
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    workers: Int = None  # processes here; default: as many as cores for small models on a CPU, else 1
    ray: Address = None  # on a Ray cluster: at this address, else at RAY_ADDRESS, else one on this machine
    ray_workers: Int = None  # default: as many as fit
    ray_gpus: Float = None  # a worker; default: one if the cluster has any
    threads: Int = None  # of each worker; default: 1 where there are several or --ray is given, else all
    overwrite: bool = False  # begin anew in place of an output; with other thresholds the scores stay
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        check_named(
            self, ("data", "the data set is"), ("out", "-o is"), example="ip2p synth filter pairs -o kept"
        )
        check_thresholds(self.image, self.caption, self.directional)
        check_int("--top", self.top, 0, 1_000_000, "--top 4")
        check_int("--near-bits", self.near_bits, -1, 64, "--near-bits 4")
        check_int("--batch", self.batch, 1, 1_000_000, "--batch 32")
        check_some(self, count=1000)
        if self.keep == "all" and any(
            value is not None for value in (self.image, self.caption, self.directional)
        ):
            raise InputError("--keep all writes every row; leave --image, --caption and --directional away.")
        check_workers(self)


@dataclass(frozen=True, kw_only=True)
class SynthInspectConfig:
    """Show on a page what the thresholds keep and reject: ip2p synth inspect kept -o inspect.html"""

    data: Positional[DataPath] = ""  # what `synth pairs` or `synth filter` wrote, or any data set with scores
    out: Annotated[Path, arg(aliases=["-o"], metavar="PATH")] = Path("inspect.html")  # pictures inside
    preset: Preset = "auto"  # of the least similarities; auto: the filter's, else as `synth filter` has it
    image: Float = None  # least similarity of the two pictures, instead of the preset's
    caption: Float = None  # of each picture and its caption
    directional: Float = None  # of the change in the pictures and in the captions
    top: int = 4  # the best so many of each edit stay; 0: all
    near_bits: int = 4  # of 64 in which two pictures' hashes differ that count as the same; -1: not compared
    each: int = 6  # pairs shown on each side of a threshold
    side: int = 128  # of a picture on the page
    count: Int = None  # look at the first so many rows
    split: str = "train"  # where names tell of several
    overwrite: bool = False  # replace an output that is there already
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for settings that cannot be used."""
        check_named(self, ("data", "the data set is"), example="ip2p synth inspect kept")
        check_thresholds(self.image, self.caption, self.directional)
        check_int("--top", self.top, 0, 1_000_000, "--top 4")
        check_int("--near-bits", self.near_bits, -1, 64, "--near-bits 4")
        check_int("--each", self.each, 1, 1000, "--each 6")
        check_int("--side", self.side, 16, 1024, "--side 128")
        check_some(self, count=1000)


BuildStage = Literal["all", "vae", "text", "clip", "perception", "unet", "decay", "lm"]


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Train the storybook model: ip2p storybook build --preset smoke -o model"""

    preset: Literal["smoke", "cpu", "h100"] = "smoke"  # one recipe, other numbers: seconds, hours, one GPU
    out: Annotated[Path, arg(aliases=["-o"], metavar="PATH")] = Path("storybook-model")  # goes on from here
    bundle: Folder = None  # the half-precision model, as far as it is trained; default: OUT/bundle
    start: Model = None  # a model made by this verb, of the same preset, whose UNet is trained further
    stage: BuildStage = "all"  # train one part only
    seconds: Float = None  # save and stop after so many seconds
    minutes: Float = None  # training time of the stage, in all; extends a finished perception or unet
    steps: Int = None  # optimizer steps of every stage, instead of the preset's
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for a number that cannot be used."""
        if self.seconds is not None:
            check_float("--seconds", self.seconds, 0, 1e9, "--seconds 540")
        if self.minutes is not None:
            check_float("--minutes", self.minutes, 0, 1e6, "--minutes 120")
        if self.steps is not None:
            check_int("--steps", self.steps, 1, 10**9, "--steps 100")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score a model on storybook edits whose answer is known: ip2p storybook score --count 500"""

    model: str = "storybook"  # a name, or a folder in the diffusers format
    split: Splits = ()  # test, unseen_phrasings, …; may be repeated; default: all but train
    count: int = 500  # how many edits per split; the kinds of edit come in turn
    seed: int = 0  # draws the edits and the noise
    out: Out = None  # JSON file with every number
    sheet: File = None  # picture with rows of page, instruction, result, exact answer of the first split
    steps: Int = None  # sampling steps; default: the model's own, else 20
    sampler: SomeSampler = None  # euler_ancestral, euler, dpmpp_2m; default: the model's own, else the first
    spacing: SomeSpacing = None  # linspace, karras or trailing; default: the model's own, else linspace
    text_cfg: Float = None  # how strongly to follow the instruction; default: the model's own, else 7.5
    image_cfg: Float = None  # how strongly to keep the input picture; default: the model's own, else 1.5
    size: Int = None  # side of a picture; default: what the model was trained at
    batch_size: int = 16  # edits made at once
    device: str = "auto"  # cuda, cuda:N, mps or cpu; auto takes the first that is there
    dtype: DType = "auto"  # auto takes half precision where the device has it fast
    overwrite: bool = False  # replace an output that is there already
    config: File = None  # settings file; default: ip2p.toml in this folder, when there is one
    debug: bool = False  # show the traceback of an error

    def check(self) -> None:
        """Raise InputError for a number that cannot be used."""
        check_guidance(self.steps, self.text_cfg, self.image_cfg)
        check_int("--count", self.count, 1, 1_000_000, "--count 500")
        check_int("--seed", self.seed, 0, MAX_SEED, "--seed 7")
        check_int("--batch-size", self.batch_size, 1, 4096, "--batch-size 16")
        check_size(self.size)


# --- ranges -------------------------------------------------------------------------------------


def check_int(name: str, value: int, low: int, high: int, example: str) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} is {value}; it must be {low} to {high}. Try {example}.")


def check_float(name: str, value: float, low: float, high: float, example: str) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} is {value}; it must be a number from {low:g} to {high:g}. Try {example}.")


def check_named(config: object, *needed: tuple[str, str], example: str) -> None:
    """Raise InputError for a setting without which nothing can be done; each with the words for it."""
    for name, called in needed:
        if not str(getattr(config, name) or "").strip():
            raise InputError(f"{called} missing; write: {example}")


def check_some(config: object, **examples: int) -> None:
    """Raise InputError for a whole number below 1 among settings that may be None."""
    for name, example in examples.items():
        if (value := getattr(config, name)) is not None:
            flag = f"--{name.replace('_', '-')}"
            least = 0 if name == "shots" else 1
            check_int(flag, value, least, 10**9, f"{flag} {example}")


def check_interval(flag: str, ends: tuple[float, float], most: float, example: str) -> None:
    """Raise InputError unless both ends are numbers from 0 to `most`, the lower one first."""
    for end in ends:
        check_float(flag, end, 0, most, example)
    if ends[0] > ends[1]:
        raise InputError(f"{flag} {ends[0]:g} {ends[1]:g} is empty. Try {example}.")


def check_thresholds(image: float | None, caption: float | None, directional: float | None) -> None:
    """Raise InputError for what no cosine can be."""
    for name, value in (("image", image), ("caption", caption), ("directional", directional)):
        if value is not None:
            check_float(f"--{name}", value, -1, 1, f"--{name} 0.2")


def check_workers(config: Any) -> None:
    """Raise InputError for workers that cannot be, or of a cluster where none is asked for."""
    check_some(config, workers=2, ray_workers=4, threads=1)
    if config.ray_gpus is not None:
        check_float("--ray-gpus", config.ray_gpus, 0, 1024, "--ray-gpus 1")
    for name in ("ray_workers", "ray_gpus"):
        if config.ray is None and getattr(config, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is of a Ray cluster; add --ray.")
    if config.ray is not None and config.workers is not None:
        raise InputError("--workers are processes here; of a Ray cluster they are --ray-workers.")


def check_guidance(steps: int | None, text_cfg: float | None, image_cfg: float | None) -> None:
    """Raise InputError for steps and scales that cannot be sampled with; None is the model's own."""
    if steps is not None:
        check_int("--steps", steps, 1, MAX_STEPS, "--steps 20")
    if text_cfg is not None:
        check_float("--text-cfg", text_cfg, 0, MAX_SCALE, "--text-cfg 7.5")
    if image_cfg is not None:
        check_float("--image-cfg", image_cfg, 0, MAX_SCALE, "--image-cfg 1.5")


def check_more_guidance(rescale: float, interval: tuple[float, float]) -> None:
    """Raise InputError unless the rescale and both ends of the interval are shares, the lower end first."""
    check_float("--text-cfg-rescale", rescale, 0, 1, "--text-cfg-rescale 0.7")
    for end in interval:
        check_float("--cfg-interval", end, 0, 1, "--cfg-interval 0.2 0.9")
    low, high = interval
    if low >= high:
        raise InputError(f"--cfg-interval {low:g} {high:g} is empty. Try --cfg-interval 0.2 0.9.")


def check_masking(mask: object, auto_mask: float | None, padding: int, feather: float | None) -> None:
    """Raise InputError for two masks at once, or numbers that no mask can have."""
    if mask is not None and auto_mask is not None:
        raise InputError("--mask names the region and --auto-mask looks for it; give one of them.")
    if auto_mask is not None:
        check_float("--auto-mask", auto_mask, 0, 1, f"--auto-mask {AUTO_MASK}")
    check_int("--mask-padding", padding, 0, MAX_SIZE, "--mask-padding 32")
    if feather is not None:
        check_float("--feather", feather, 0, MAX_SIZE, "--feather 8")


def check_size(size: int | tuple[int, int] | None) -> None:
    for side in () if size is None else (size,) if isinstance(size, int) else size:
        check_int("--size", side, MIN_SIZE, MAX_SIZE, "--size 256")


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and the weight of FILE:WEIGHT, or of FILE alone, whose weight is 1.

    The file's name may hold colons: only a number after the last one is a weight.
    """
    file, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        file, weight = text, 1.0
    if not file.strip():
        raise InputError(f"--lora {text!r} names no file. Try --lora style.safetensors:0.8.")
    check_float(f"the weight of --lora {text}", weight, -10, 10, f"--lora {file}:0.8")
    return Path(file), weight


def parse_models(listed: Sequence[str]) -> dict[str, str]:
    """NAME=MODEL, or MODEL alone, by the names under which they are served.

    A model alone goes by its own name: a hub id whole, a folder or a file by its last part, without the
    ending. Raises InputError for none, an empty one, or a name that stands for two.
    """
    models: dict[str, str] = {}
    for text in listed:
        name, equals, model = text.partition("=")
        if not equals:
            path = Path(text)
            local = (
                path.exists() or text.startswith((".", "/", "~")) or path.suffix in (".safetensors", ".ckpt")
            )
            stem = path.stem if path.suffix in (".safetensors", ".ckpt") else path.resolve().name
            name, model = (stem if local else text), text
        if not name.strip() or not model.strip():
            raise InputError(f"--model {text!r} names no model. Try --model mine=./my-editor.")
        if name in models:
            raise InputError(f"--model {text}: two models are called {name}. Try --model other={model}.")
        models[name] = model
    if not models:
        raise InputError("no model is named. Try --model storybook.")
    return models


def is_address(text: str) -> bool:
    """Whether it is an IP address and not a name."""
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


AXES: dict[str, type] = {"text-cfg": float, "image-cfg": float, "seed": int, "steps": int}


def parse_axis(flag: str, text: str) -> tuple[str, tuple[float, ...] | None]:
    """ "text-cfg=3,5" → ("text-cfg", (3.0, 5.0)); without values None. Raises InputError for any other."""
    name, equals, listed = text.partition("=")
    name = name.strip().replace("_", "-")
    if name not in AXES:
        raise InputError(
            f"{flag} is {text!r}; choose one of: {', '.join(AXES)}. Try {flag} text-cfg=3,5,7.5."
        )
    if not equals:
        return name, None
    values = []
    for word in listed.split(","):
        try:
            values.append(AXES[name](word))
        except ValueError:
            kind = "a whole number" if AXES[name] is int else "a number"
            raise InputError(f"{flag}: {word!r} is not {kind}. Try {flag} {name}=1,2,3.") from None
    for value in values:
        if name == "steps":
            check_int(f"{flag} steps", value, 1, MAX_STEPS, f"{flag} steps=5,10,20")
        elif name == "seed":
            check_int(f"{flag} seed", value, 0, MAX_SEED, f"{flag} seed=0,1,2")
        else:
            check_float(f"{flag} {name}", value, 0, MAX_SCALE, f"{flag} {name}=1.2,1.5,2")
    return name, tuple(values)


# --- where a setting comes from -----------------------------------------------------------------


def with_defaults(
    cls: type[Config], verb: str, *, file: Path | None = None, env: Mapping[str, str] = os.environ
) -> Config:
    """The verb's config with the settings file's and the environment's values as its defaults.

    `verb` is the file's table: `[edit]`, or `[storybook.draw]` for "storybook draw". The file is
    `file`, else the one that IP2P_CONFIG names, else `ip2p.toml` in the working folder if there is one.
    Raises InputError for an unknown setting or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if file is None and env.get("IP2P_CONFIG"):
        file = Path(env["IP2P_CONFIG"])
    for key, value in _file_table(file, verb).items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}."
            raise InputError(
                f"{file or CONFIG_FILE} sets {key} for {verb}, which has no such setting; {hint}"
            )
        if value is not None:  # YAML's null leaves a setting as it is
            values[name] = _convert(value, hints[name], f"{key} in {file or CONFIG_FILE}")
    for name in names:
        variable = f"IP2P_{name.upper()}"
        if env.get(variable, "") != "":
            values[name] = _convert(env[variable], hints[name], variable)
    return dataclasses.replace(cls(), **values)  # type: ignore[type-var]


def _file_table(file: Path | None, verb: str) -> dict[str, Any]:
    """The verb's table of the settings file, {} when there is none."""
    path = file or Path(CONFIG_FILE)
    if file is None and not path.is_file():
        return {}
    if path.suffix in (".yaml", ".yml"):
        return _yaml_table(path, verb)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the settings file {path}: {error.strerror}; check --config.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the settings file {path} is not TOML: {error}") from None
    for word in verb.split():
        table = table.get(word, {})
        if not isinstance(table, dict):
            raise InputError(f"{word} in {path} is not a table; write [{verb.replace(' ', '.')}] above it.")
    return table


def _yaml_table(path: Path, verb: str) -> dict[str, Any]:
    """A recipe: the verb's settings at its top, or under the verb's name."""
    import yaml

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"cannot read the settings file {path}: {error.strerror}; check --config.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the settings file {path} is not YAML: {reason}. Mend it.") from None
    inner = table.get(verb, table) if isinstance(table, dict) else table
    if not isinstance(inner, dict):
        raise InputError(f"{path} holds no settings; write lines such as: lr: 0.0001")
    return inner


def _convert(value: object, hint: Any, source: str) -> Any:
    """`value` (text of a variable, or TOML) as the type of the field.

    A setting that takes several values is a list, in a variable too (a JSON one) unless it holds one.
    """
    kinds = [kind for kind in _flat(hint) if kind is not type(None)]
    several = [typing.get_args(k) for k in kinds if typing.get_origin(k) is tuple and kinds == [k]]
    if several:
        return _convert_list(value, several[0], source)
    choices = [c for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k)]
    text = str(value).strip()
    if choices:
        if value in choices:
            return value
        raise InputError(f"{source} is {text!r}; choose one of: {', '.join(map(str, choices))}.")
    if bool in kinds:
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() in known:
            return known[text.lower()]
        raise InputError(f"{source} is {text!r}; write true or false.")
    if any(typing.get_origin(k) is tuple for k in kinds):
        try:
            return parse_size(text)
        except ValueError:
            raise InputError(f"{source} is {text!r}; write a side, or width and height as 576x384.") from None
    for kind, called in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise InputError(f"{source} is {text!r}; it must be {called}.") from None
    return Path(text) if Path in kinds else str(value)


def _convert_list(value: object, parts: Sequence[Any], source: str) -> tuple[Any, ...]:
    """The tuple of a `tuple[str, ...]` or a `tuple[float, float]`."""
    if isinstance(value, str):
        try:
            loaded = json.loads(value)
        except ValueError:
            loaded = None
        pair = parts[-1] is not Ellipsis
        value = loaded if isinstance(loaded, list) else value.replace(",", " ").split() if pair else [value]
    if not isinstance(value, list):
        raise InputError(f"{source} is {str(value)!r}; write a list, as in [{', '.join(['…'] * 2)}].")
    if parts[-1] is Ellipsis:
        return tuple(_convert(item, parts[0], source) for item in value)
    if len(value) != len(parts):
        raise InputError(f"{source} is {value}; it must be {len(parts)} numbers.")
    return tuple(_convert(item, kind, source) for item, kind in zip(value, parts, strict=True))


def values_of(cls: type[Any]) -> dict[str, int]:
    """How many words of the command line each setting takes after its flag."""
    counts = {}
    for name, hint in typing.get_type_hints(cls).items():
        [*_, last] = kinds = [kind for kind in _flat(hint) if kind is not type(None)]
        pair = typing.get_origin(last) is tuple and len(kinds) == 1 and Ellipsis not in typing.get_args(last)
        counts[name] = 0 if last is bool else len(typing.get_args(last)) if pair else 1
    return counts


def _flat(hint: Any) -> list[Any]:
    """The plain types that an annotation may hold: `int | None` gives [int, NoneType]."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _flat(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _flat(part)]
    return [hint]


def as_dict(config: object) -> dict[str, Any]:
    """The config's fields as plain JSON values, in their order."""
    fields = dataclasses.asdict(config)  # type: ignore[call-overload]
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


def run_json(config: object, **also: object) -> str:
    """The text of the `run.json` that lies beside an output: version, settings, and what else is given."""
    record = {"ip2p": __version__, "settings": as_dict(config), **also}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
