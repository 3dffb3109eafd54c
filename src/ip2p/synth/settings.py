"""The settings of `ip2p synth`, each declared once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ip2p.base.errors import InputError
from ip2p.settings import (
    COMMON,
    MAX_SCALE,
    MAX_SEED,
    MODEL,
    Conflict,
    DeviceSettings,
    DTypeSettings,
    HubDataSettings,
    ModelChoice,
    OverwriteSettings,
    PictureSettings,
    RunSettings,
    SamplerName,
    ScheduleName,
    Settings,
    SharePair,
    StepSettings,
    WorkerSettings,
    check_needed,
    meta_of,
    read_pair,
    setting,
)

Language = Literal["english", "latin", "any"]
Way = Literal["completion", "chat"]
Attention = Literal["self", "replace", "refine", "self+replace", "self+refine"]
Preset = Literal["auto", "paper", "code", "storybook"]

CAPTIONS, WRITING, SERVER = "Captions", "Writing", "Server"
DRAWING, THRESHOLDS = "Drawing", "Thresholds"
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE)]
ScalePair = Annotated[tuple[Scale, Scale], BeforeValidator(read_pair)]
Price = Annotated[float, Field(ge=0, le=1e6)]
PricePair = Annotated[tuple[Price, Price], BeforeValidator(read_pair)]


class SeedSettings(Settings):
    """A seed."""

    seed: int = setting(0, "seed", ge=0, le=MAX_SEED, example=7, group=COMMON)


class ThresholdSettings(Settings):
    """The least similarities of a pair that is kept."""

    preset: Preset = setting(
        "auto", "thresholds: paper, code or storybook; auto: by the CLIP in use", group=THRESHOLDS
    )
    image: float | None = setting(
        None,
        "least similarity of the two pictures, instead of the preset's",
        ge=-1,
        le=1,
        example=0.2,
        group=THRESHOLDS,
    )
    caption: float | None = setting(
        None, "least similarity of each picture and its caption", ge=-1, le=1, example=0.2, group=THRESHOLDS
    )
    directional: float | None = setting(
        None,
        "least similarity of the change in pictures and captions",
        ge=-1,
        le=1,
        example=0.2,
        group=THRESHOLDS,
    )


class KeepBestSettings(Settings):
    """Which of several good pairs stay."""

    top: int = setting(
        4,
        "keep this many of each edit, by directional similarity; 0: all",
        ge=0,
        le=1_000_000,
        group=THRESHOLDS,
    )
    top_whole: int = setting(
        1,
        "the same for edits of the whole picture, which pass more often; 0: as --top",
        ge=0,
        le=1_000_000,
        group=THRESHOLDS,
        hidden=True,
    )
    near_bits: int = setting(
        4,
        "hash bits (of 64) up to which two pictures count as the same; -1: not compared",
        ge=-1,
        le=64,
        group=THRESHOLDS,
    )


class SynthInstructConfig(
    RunSettings,
    OverwriteSettings,
    WorkerSettings,
    HubDataSettings,
    DTypeSettings,
    DeviceSettings,
    SeedSettings,
):
    """Write edits of captions with a language model: ip2p synth instruct captions.txt -o triples.parquet"""

    captions: str = setting(
        "",
        ".txt, .jsonl, .csv, .parquet, a folder of them, or a Hugging Face data set",
        positional=1,
        metavar="CAPTIONS",
    )
    out: Path | None = setting(
        None,
        "a .parquet file, or a folder for its shards; the same command resumes",
        group=COMMON,
        flags=("-o",),
    )
    model: str = setting(
        "storybook", "storybook, a folder or a Hugging Face model id; the name at --server", group=COMMON
    )
    server: str | None = setting(
        None, "URL of a server with OpenAI's API, as http://localhost:8000/v1", group=SERVER
    )
    way: Way = setting("completion", "completion for a tuned model, chat for a general one", group=SERVER)
    together: int = setting(8, "concurrent requests", ge=1, le=1_000_000, group=SERVER, hidden=True)
    rate: float | None = setting(
        None, "maximum requests per second", ge=0.001, le=1e6, example=5.0, group=SERVER
    )
    price: PricePair = setting(
        (0.0, 0.0),
        "price of a million tokens read and written, to print the cost",
        example=(0.15, 0.6),
        group=SERVER,
        metavar="READ WRITTEN",
        hidden=True,
    )
    timeout: float = setting(
        120.0, "seconds that one answer may take", ge=0.1, le=86_400, group=SERVER, hidden=True
    )
    patience: float = setting(
        300.0, "seconds of server outage after which the run stops", ge=0, le=1e6, group=SERVER, hidden=True
    )
    key_variable: str | None = setting(
        None,
        "environment variable with the server's key; default: IP2P_API_KEY, else OPENAI_API_KEY",
        group=SERVER,
        hidden=True,
    )
    shots: int | None = setting(
        None,
        "seed triples shown to the model; default: 8 with --way chat, else none",
        ge=0,
        le=10**9,
        example=8,
        group=WRITING,
        hidden=True,
    )
    edits: int = setting(1, "edits per caption", ge=1, le=1_000_000, example=2, group=WRITING)
    retries: int = setting(
        3, "how often to ask again after a rejected answer", ge=0, le=1_000_000, group=WRITING, hidden=True
    )
    allow_spatial: bool = setting(
        False, "accept edits that move things, which Prompt-to-Prompt cannot draw", group=WRITING, hidden=True
    )
    block_list: Path | None = setting(
        None, "file of blocked words, one a line, instead of the built-in list", group=WRITING
    )
    temperature: float = setting(0.7, "sampling temperature", ge=0, le=2, group=WRITING)
    frequency_penalty: float = setting(
        0.1, "penalty for words that are in the answer already", ge=-2, le=2, group=WRITING, hidden=True
    )
    max_tokens: int = setting(
        256, "maximum tokens per answer", ge=1, le=1_000_000, group=WRITING, hidden=True
    )
    batch: int = setting(32, "answers per batch of a local model", ge=1, le=1_000_000, group=WRITING)
    column: str | None = setting(
        None, "column of the captions; default: the first known, such as TEXT", group=CAPTIONS, hidden=True
    )
    sample: int | None = setting(
        None,
        "use this many captions, drawn by --seed; default: all",
        ge=1,
        le=10**9,
        example=1000,
        group=CAPTIONS,
        hidden=True,
    )
    min_words: int = setting(2, "minimum words of a caption", ge=0, le=1_000_000, group=CAPTIONS, hidden=True)
    max_words: int = setting(
        50, "maximum words of a caption", ge=1, le=1_000_000, group=CAPTIONS, hidden=True
    )
    min_score: float | None = setting(
        None, "minimum aesthetic score", ge=0, le=10, example=5.0, group=CAPTIONS, hidden=True
    )
    language: Language = setting("english", "language of the captions", group=CAPTIONS, hidden=True)

    def check(self) -> None:
        """Raise InputError for settings that cannot be run with, alone or together."""
        example = "ip2p synth instruct captions.txt -o triples.parquet"
        check_needed(self, ("captions", "the captions are"), ("out", "-o is"), example=example)
        if self.server is not None and "@" in self.server:
            raise InputError("--server holds a name or a password; put the key into the environment instead.")
        if self.server is not None and self.model == "storybook":
            raise InputError("--server needs the name of its model; add --model NAME.")
        for name in ("way", "rate", "price", "key_variable"):
            if self.server is None and getattr(self, name) != type(self).model_fields[name].default:
                raise InputError(f"--{name.replace('_', '-')} is for a server; add --server URL.")
        if self.server is not None and (self.ray is not None or (self.workers or 1) > 1):
            raise InputError(
                "--workers and --ray are not for a server: --rate holds in each process. Raise --together."
            )


class SynthTuneConfig(RunSettings, OverwriteSettings, DeviceSettings, SeedSettings):
    """Tune a language model that writes edits: ip2p synth tune-lm --base MODEL -o writer --lora 16"""

    base: str = setting(
        "", "causal language model: a folder or a Hugging Face model id", group=COMMON, metavar="MODEL"
    )
    out: Path | None = setting(None, "folder of the tuned model", group=COMMON, flags=("-o",))
    triples: Path | None = setting(
        None, "what `synth instruct` wrote; default: the built-in seed triples", group=COMMON
    )
    lora: int | None = setting(
        None,
        "train a LoRA of this rank and merge it; default: all weights",
        ge=1,
        le=10**9,
        example=16,
        group=COMMON,
    )
    epochs: float = setting(3.0, "epochs", ge=0.001, le=1e4, group=COMMON)
    batch: int = setting(16, "triples per step", ge=1, le=10**6, group=COMMON)
    rate: float | None = setting(
        None,
        "learning rate; default: 5e-5, or 2e-4 for a LoRA",
        ge=1e-9,
        le=1,
        example=5e-5,
        group=COMMON,
    )
    warm_up: float = setting(0.03, "share of the steps over which the rate rises", ge=0, le=1, hidden=True)
    weight_decay: float = setting(0.01, "AdamW's weight decay", ge=0, le=10, hidden=True)
    clip_norm: float = setting(1.0, "maximum gradient norm", ge=1e-6, le=1e9, hidden=True)
    max_length: int = setting(
        512, "maximum tokens of a caption and its edit; longer ones are left out", ge=8, le=10**6, hidden=True
    )
    backend: Literal["auto", "plain", "trl"] = setting(
        "auto", "trl trains on many devices; auto uses it if it is installed", hidden=True
    )
    revision: str | None = setting(None, "branch, tag or commit on Hugging Face", group=MODEL)

    def check(self) -> None:
        """Raise InputError for settings that cannot be run with."""
        example = "ip2p synth tune-lm --base MODEL -o writer"
        check_needed(self, ("base", "--base is"), ("out", "-o is"), example=example)


# How `synth pairs` draws by default, and as the paper and its code do. 0 or None turns a way off.
PAIRS: dict[str, Any] = {
    **{"most": 32, "enough": 4, "enough_whole": 2, "round_size": 8},
    **{"worth": 0.12, "risk": 0.05, "p_per_source": 1},
    **{"steps": 20, "sampler": "euler_ancestral", "schedule": "linspace", "attention": "self"},
    **{"early_at": 0.0, "tiny_vae": None},
}
# What is drawn on storybook pages, by its small model, comes out in fewer steps, and is hopeless sooner.
PAIRS_STORYBOOK: dict[str, Any] = PAIRS | {"steps": 10, "worth": 0.32, "early_at": 0.5}
PAIRS_AS_PAPER: dict[str, Any] = PAIRS | {
    **{"most": 100, "enough": 0, "enough_whole": 0, "round_size": 100, "risk": 0.0, "p_per_source": 1},
    **{"steps": 100, "sampler": "euler_ancestral", "schedule": "linspace", "attention": "self"},
    **{"early_at": 0.0, "tiny_vae": None},
}


def _drawing_setting(kind: type[Settings], name: str, help: str) -> Any:
    """A setting of `kind` with the default of this stage instead of the model card's."""
    found = copy.copy(kind.model_fields[name])
    found.description = help
    found.json_schema_extra = replace(meta_of(found), group=DRAWING, fallback=None)
    return found


class SynthPairsConfig(
    RunSettings,
    OverwriteSettings,
    WorkerSettings,
    ThresholdSettings,
    DTypeSettings,
    DeviceSettings,
    PictureSettings,
    StepSettings,
    ModelChoice,
):
    """Draw pairs of pictures for edits in words: ip2p synth pairs triples.parquet -o pairs"""

    triples: str = setting(
        "", ".parquet, .jsonl, .csv, or a folder that `synth instruct` wrote", positional=1, metavar="TRIPLES"
    )
    out: Path | None = setting(
        None, "folder of parquet shards; the same command resumes", group=COMMON, flags=("-o",)
    )
    clip: str | None = setting(
        None, "CLIP for the scores; default: the model's own, else openai/clip-vit-large-patch14", group=MODEL
    )
    count: int | None = setting(
        None, "draw only the first N triples", ge=1, le=10**9, example=100, group=COMMON
    )
    keep: Literal["passed", "all"] = setting(
        "passed", "all: every candidate, with its scores", group=THRESHOLDS
    )
    as_paper: bool = setting(False, "no shortcuts: 100 candidates of 100 steps each", group=DRAWING)
    most: int | None = setting(
        None, "maximum candidates per triple; default: 32", ge=1, le=10_000, example=32, group=DRAWING
    )
    enough: int | None = setting(
        None,
        "stop after this many that pass, 0: draw all; default: 4",
        ge=0,
        le=10_000,
        example=4,
        group=DRAWING,
    )
    enough_whole: int | None = setting(
        None,
        "the same for edits of the whole picture, which pass more often; 0: as the others; default: 2",
        ge=0,
        le=10_000,
        example=2,
        group=DRAWING,
        hidden=True,
    )
    round_size: int | None = setting(
        None,
        "candidates between two looks at what passed; default: 8",
        ge=1,
        le=10_000,
        example=8,
        group=DRAWING,
        hidden=True,
    )
    worth: float | None = setting(
        None,
        "pass rate below which a triple is given up; default: 0.12, storybook 0.32",
        ge=1e-4,
        le=0.999,
        example=0.1,
        group=DRAWING,
        hidden=True,
    )
    risk: float | None = setting(
        None,
        "risk of giving up a good triple, 0: none is given up; default: 0.05",
        ge=0,
        le=0.999,
        example=0.05,
        group=DRAWING,
        hidden=True,
    )
    early_at: float | None = setting(
        None,
        "share of the steps at which hopeless candidates are dropped; default: 0, storybook 0.5",
        ge=0,
        le=1,
        example=0.5,
        group=DRAWING,
        hidden=True,
    )
    early_margin: float = setting(
        0.2,
        "how far below a threshold a similarity is dropped early",
        ge=0,
        le=2,
        group=DRAWING,
        hidden=True,
    )
    p_per_source: int | None = setting(
        None,
        "candidates per source picture, each with its own p; default: 1",
        ge=1,
        le=10_000,
        example=1,
        group=DRAWING,
        hidden=True,
    )
    steps: int | None = _drawing_setting(StepSettings, "steps", "sampling steps; default: 20, storybook 10")
    sampler: SamplerName | None = _drawing_setting(
        StepSettings, "sampler", "sampler; default: euler_ancestral"
    )
    schedule: ScheduleName | None = _drawing_setting(
        PictureSettings, "schedule", "noise schedule; default: linspace"
    )
    tiny_vae: str | None = setting(
        None, "a tiny autoencoder for the pictures that are scored; default: none", group=DRAWING, hidden=True
    )
    attention: Attention | None = setting(
        None, "attention that a pair shares; default: self", group=DRAWING, hidden=True
    )
    reweight: float = setting(
        1.0,
        "weight of the new words' cross-attention maps; needs --attention replace or refine",
        ge=-10,
        le=100,
        example=2.0,
        group=DRAWING,
        hidden=True,
    )
    blend: float | None = setting(
        None,
        "change only where the changed words' attention is above this share of its maximum; 0.3 is usual",
        ge=0,
        le=1,
        example=0.3,
        group=DRAWING,
        hidden=True,
    )
    p: SharePair = setting(
        (0.1, 0.9),
        "share of the steps with shared attention, drawn per candidate",
        group=DRAWING,
        metavar="LOW HIGH",
        hidden=True,
    )
    p_cross: SharePair | None = setting(
        None,
        "the same for cross-attention alone; default: the p of the candidate",
        example=(0.4, 0.9),
        group=DRAWING,
        metavar="LOW HIGH",
        hidden=True,
    )
    scale: ScalePair | None = setting(
        None,
        "guidance scale, drawn per candidate; default: 3 5 for the storybook, else 7.5 15",
        example=(7.5, 15.0),
        group=DRAWING,
        metavar="LOW HIGH",
        hidden=True,
    )
    batch_size: int | None = setting(
        None, "pairs per batch; default: 4 on a CPU, else 8", ge=1, le=10**9, example=8, group=DRAWING
    )
    license: str | None = setting(None, "license of the pictures, for their column", hidden=True)

    def check_together(self) -> None:
        super().check_together()
        for name, ends in (("p", self.p), ("p_cross", self.p_cross), ("scale", self.scale)):
            if ends is not None and ends[0] > ends[1]:
                raise Conflict(
                    f"{{{name}}} {ends[0]:g} {ends[1]:g} is empty; the smaller number comes first.",
                    field=name,
                )
        if self.attention in (None, "self"):
            for name, usual in (("p_cross", None), ("reweight", 1.0)):
                if getattr(self, name) != usual:
                    raise Conflict(
                        f"{{{name}}} is for cross-attention; set {{attention}} to refine, replace, "
                        "self+refine or self+replace.",
                        field=name,
                    )

    def check(self) -> None:
        """Raise InputError for settings that cannot be run with, alone or together."""
        check_needed(
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

    def how(self, *, storybook: bool = False) -> dict[str, Any]:
        """How candidates are drawn, under the names of `PAIRS`. storybook: the model is the storybook's."""
        usual = PAIRS_AS_PAPER if self.as_paper else PAIRS_STORYBOOK if storybook else PAIRS
        if self.keep == "all":
            usual = usual | {"early_at": 0.0}  # all that is begun is drawn
        return {
            name: value if getattr(self, name) is None else getattr(self, name)
            for name, value in usual.items()
        }


class SynthFilterConfig(
    RunSettings,
    OverwriteSettings,
    WorkerSettings,
    HubDataSettings,
    KeepBestSettings,
    ThresholdSettings,
    DeviceSettings,
):
    """Keep the good pairs of a data set, by CLIP: ip2p synth filter pairs -o kept"""

    data: str = setting(
        "",
        "a folder, a parquet, tar, CSV or JSONL file, or a Hugging Face data set",
        positional=1,
        metavar="DATA",
    )
    out: Path | None = setting(
        None, "folder of parquet shards; the same command resumes", group=COMMON, flags=("-o",)
    )
    keep: Literal["passed", "all"] = setting(
        "passed", "all: every readable row, with its scores", group=THRESHOLDS
    )
    clip: str | None = setting(
        None, "CLIP for rows without scores; default: that of the others, else the paper's", group=MODEL
    )
    rescore: bool = setting(False, "measure rows that have scores too", group=MODEL, hidden=True)
    safety: str | None = setting(
        None,
        "picture classifier: pairs that it calls NSFW or unsafe are dropped",
        group=MODEL,
        metavar="MODEL",
    )
    count: int | None = setting(None, "use only the first N rows", ge=1, le=10**9, example=1000, group=COMMON)
    batch: int = setting(32, "pictures per batch", ge=1, le=1_000_000, group=MODEL)

    def check(self) -> None:
        """Raise InputError for settings that cannot be run with, alone or together."""
        check_needed(
            self, ("data", "the data set is"), ("out", "-o is"), example="ip2p synth filter pairs -o kept"
        )
        if self.keep == "all" and any(
            value is not None for value in (self.image, self.caption, self.directional)
        ):
            raise InputError("--keep all writes every row; leave --image, --caption and --directional away.")


class SynthInspectConfig(RunSettings, OverwriteSettings, KeepBestSettings, ThresholdSettings):
    """Show on a page what the thresholds keep and reject: ip2p synth inspect kept -o inspect.html"""

    data: str = setting(
        "",
        "what `synth pairs` or `synth filter` wrote, or any data set with scores",
        positional=1,
        metavar="DATA",
    )
    out: Path = setting(
        Path("inspect.html"), "the page, with its pictures inside", group=COMMON, flags=("-o",)
    )
    each: int = setting(6, "pairs on each side of a threshold", ge=1, le=1000, hidden=True)
    side: int = setting(128, "side of a picture on the page, in pixels", ge=16, le=1024, hidden=True)
    count: int | None = setting(None, "use only the first N rows", ge=1, le=10**9, example=1000, group=COMMON)
    split: str = setting("train", "split of the data set", group="Data", hidden=True)

    def check(self) -> None:
        """Raise InputError for settings that cannot be run with."""
        check_needed(self, ("data", "the data set is"), example="ip2p synth inspect kept")
