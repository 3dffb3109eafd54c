"""The settings of `ip2p synth`, each declared once."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
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
    flag_of,
    meta_of,
    read_pair,
    setting,
)

Language = Literal["english", "latin", "any"]
Way = Literal["completion", "chat"]
Attention = Literal["self", "replace", "refine", "self+replace", "self+refine"]
Preset = Literal["auto", "paper", "code", "storybook"]

DRAWING = "Drawing"
common_setting, model_setting = partial(setting, group=COMMON), partial(setting, group=MODEL)
caption_setting, writing_setting = partial(setting, group="Captions"), partial(setting, group="Writing")
server_setting, drawing_setting = partial(setting, group="Server"), partial(setting, group=DRAWING)
threshold_setting = partial(setting, group="Thresholds")
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE)]
ScalePair = Annotated[tuple[Scale, Scale], BeforeValidator(read_pair)]
Price = Annotated[float, Field(ge=0, le=1e6)]
PricePair = Annotated[tuple[Price, Price], BeforeValidator(read_pair)]


class SeedSettings(Settings):
    """A seed."""

    seed: int = common_setting(0, "seed", ge=0, le=MAX_SEED, example=7)


class ThresholdSettings(Settings):
    """Minimum similarities of a kept pair."""

    preset: Preset = threshold_setting(
        "auto", "thresholds: paper, code or storybook; auto: by the CLIP in use"
    )
    image: float | None = threshold_setting(
        None, "minimum similarity of the two pictures, instead of the preset's", ge=-1, le=1, example=0.2
    )
    caption: float | None = threshold_setting(
        None, "minimum similarity of each picture and its caption", ge=-1, le=1, example=0.2
    )
    directional: float | None = threshold_setting(
        None, "minimum similarity of the change in pictures and captions", ge=-1, le=1, example=0.2
    )


class KeepBestSettings(Settings):
    """Which of several good pairs are kept."""

    top: int = threshold_setting(
        4, "keep this many of each edit, by directional similarity; 0: all", ge=0, le=1_000_000
    )
    top_whole: int = threshold_setting(
        1,
        "the same for edits of the whole picture, which pass more often; 0: as --top",
        ge=0,
        le=1_000_000,
        hidden=True,
    )
    near_bits: int = threshold_setting(
        4, "hash bits (of 64) up to which two pictures count as the same; -1: not compared", ge=-1, le=64
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
    out: Path | None = common_setting(
        None, "a .parquet file, or a folder for its shards; the same command resumes", flags=("-o",)
    )
    model: str = common_setting(
        "storybook", "storybook, a folder or a Hugging Face model id; the name at --server"
    )
    server: str | None = server_setting(
        None, "URL of a server with OpenAI's API, as http://localhost:8000/v1"
    )
    way: Way = server_setting("completion", "completion for a tuned model, chat for a general one")
    together: int = server_setting(8, "concurrent requests", ge=1, le=1_000_000, hidden=True)
    rate: float | None = server_setting(None, "maximum requests per second", ge=0.001, le=1e6, example=5.0)
    price: PricePair = server_setting(
        (0.0, 0.0),
        "price of a million tokens read and written, to print the cost",
        example=(0.15, 0.6),
        metavar="READ WRITTEN",
        hidden=True,
    )
    timeout: float = server_setting(120.0, "seconds that one answer may take", ge=0.1, le=86_400, hidden=True)
    patience: float = server_setting(
        300.0, "seconds of server outage after which the run stops", ge=0, le=1e6, hidden=True
    )
    key_variable: str | None = server_setting(
        None,
        "environment variable with the server's key; default: IP2P_API_KEY, else OPENAI_API_KEY",
        hidden=True,
    )
    shots: int | None = writing_setting(
        None,
        "seed triples shown to the model; default: 8 with --way chat, else none",
        ge=0,
        le=10**9,
        example=8,
        hidden=True,
    )
    edits: int = writing_setting(1, "edits per caption", ge=1, le=1_000_000, example=2)
    retries: int = writing_setting(
        3, "how often to ask again after a rejected answer", ge=0, le=1_000_000, hidden=True
    )
    allow_spatial: bool = writing_setting(
        False, "accept edits that move things, which Prompt-to-Prompt cannot draw", hidden=True
    )
    block_list: Path | None = writing_setting(
        None, "file of blocked words, one a line, instead of the built-in list"
    )
    temperature: float = writing_setting(0.7, "sampling temperature", ge=0, le=2)
    frequency_penalty: float = writing_setting(
        0.1, "penalty for words that are in the answer already", ge=-2, le=2, hidden=True
    )
    max_tokens: int = writing_setting(256, "maximum tokens per answer", ge=1, le=1_000_000, hidden=True)
    batch: int = writing_setting(32, "answers per batch of a local model", ge=1, le=1_000_000)
    column: str | None = caption_setting(
        None, "column of the captions; default: the first known, such as TEXT", hidden=True
    )
    sample: int | None = caption_setting(
        None,
        "use this many captions, drawn by --seed; default: all",
        ge=1,
        le=10**9,
        example=1000,
        hidden=True,
    )
    min_words: int = caption_setting(2, "minimum words of a caption", ge=0, le=1_000_000, hidden=True)
    max_words: int = caption_setting(50, "maximum words of a caption", ge=1, le=1_000_000, hidden=True)
    min_score: float | None = caption_setting(
        None, "minimum aesthetic score", ge=0, le=10, example=5.0, hidden=True
    )
    language: Language = caption_setting("english", "language of the captions", hidden=True)

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        example = "ip2p synth instruct captions.txt -o triples.parquet"
        check_needed(self, ("captions", "the captions are"), ("out", "-o is"), example=example)
        if self.server is not None and "@" in self.server:
            raise InputError(
                "--server contains a name or a password; put the key into the environment instead."
            )
        if self.server is not None and self.model == "storybook":
            raise InputError("--server needs the name of its model; add --model NAME.")
        for name in ("way", "rate", "price", "key_variable"):
            if self.server is None and getattr(self, name) != type(self).model_fields[name].default:
                raise InputError(f"{flag_of(name)} is for a server; add --server URL.")
        if self.server is not None and (self.ray is not None or (self.workers or 1) > 1):
            raise InputError(
                "--workers and --ray do not apply to a server: --rate is per process. Raise --together."
            )


class SynthTuneConfig(RunSettings, OverwriteSettings, DeviceSettings, SeedSettings):
    """Tune a language model that writes edits: ip2p synth tune-lm --base MODEL -o writer --lora 16"""

    base: str = common_setting(
        "", "causal language model: a folder or a Hugging Face model id", metavar="MODEL"
    )
    out: Path | None = common_setting(None, "folder of the tuned model", flags=("-o",))
    triples: Path | None = common_setting(
        None, "what `synth instruct` wrote; default: the built-in seed triples"
    )
    lora: int | None = common_setting(
        None, "train a LoRA of this rank and merge it; default: all weights", ge=1, le=10**9, example=16
    )
    epochs: float = common_setting(3.0, "epochs", ge=0.001, le=1e4)
    batch: int = common_setting(16, "triples per step", ge=1, le=10**6)
    rate: float | None = common_setting(
        None, "learning rate; default: 5e-5, or 2e-4 for a LoRA", ge=1e-9, le=1, example=5e-5
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
    revision: str | None = model_setting(None, "branch, tag or commit on Hugging Face")

    def check(self) -> None:
        """Raise InputError for settings that cannot be used."""
        example = "ip2p synth tune-lm --base MODEL -o writer"
        check_needed(self, ("base", "--base is"), ("out", "-o is"), example=example)


# How `synth pairs` draws by default, and as in the paper. 0 or None turns a shortcut off.
PAIRS: dict[str, Any] = {
    **{"most": 32, "enough": 4, "enough_whole": 2, "round_size": 8},
    **{"worth": 0.12, "risk": 0.05, "p_per_source": 1},
    **{"steps": 20, "sampler": "euler_ancestral", "schedule": "linspace", "attention": "self"},
    **{"cfg_interval": (0.0, 1.0), "early_at": 0.0, "tiny_vae": None},
}
# The storybook's small model needs fewer steps, and hopeless candidates show earlier.
PAIRS_STORYBOOK: dict[str, Any] = PAIRS | {
    **{"steps": 10, "sampler": "euler", "schedule": "trailing", "cfg_interval": (0.3, 1.0)},
    **{"worth": 0.32, "early_at": 0.5},
}
PAIRS_AS_PAPER: dict[str, Any] = PAIRS | {
    **{"most": 100, "enough": 0, "enough_whole": 0, "round_size": 100, "risk": 0.0, "steps": 100}
}


def _drawing_setting(kind: type[Settings], name: str, help: str) -> Any:
    """A setting of `kind` with this stage's default instead of the model card's."""
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
    out: Path | None = common_setting(
        None, "folder of parquet shards; the same command resumes", flags=("-o",)
    )
    clip: str | None = model_setting(
        None, "CLIP for the scores; default: the model's own, else openai/clip-vit-large-patch14"
    )
    count: int | None = common_setting(None, "draw only the first N triples", ge=1, le=10**9, example=100)
    keep: Literal["passed", "all"] = threshold_setting("passed", "all: every candidate, with its scores")
    as_paper: bool = drawing_setting(False, "no shortcuts: 100 candidates of 100 steps each")
    most: int | None = drawing_setting(
        None, "maximum candidates per triple; default: 32", ge=1, le=10_000, example=32
    )
    enough: int | None = drawing_setting(
        None, "stop after this many that pass, 0: draw all; default: 4", ge=0, le=10_000, example=4
    )
    enough_whole: int | None = drawing_setting(
        None,
        "the same for edits of the whole picture, which pass more often; 0: as the others; default: 2",
        ge=0,
        le=10_000,
        example=2,
        hidden=True,
    )
    round_size: int | None = drawing_setting(
        None,
        "candidates between two looks at what passed; default: 8",
        ge=1,
        le=10_000,
        example=8,
        hidden=True,
    )
    worth: float | None = drawing_setting(
        None,
        "pass rate below which a triple is given up; default: 0.12, storybook 0.32",
        ge=1e-4,
        le=0.999,
        example=0.1,
        hidden=True,
    )
    risk: float | None = drawing_setting(
        None,
        "risk of giving up a good triple, 0: none is given up; default: 0.05",
        ge=0,
        le=0.999,
        example=0.05,
        hidden=True,
    )
    early_at: float | None = drawing_setting(
        None,
        "share of the steps at which hopeless candidates are dropped; default: 0, storybook 0.5",
        ge=0,
        le=1,
        example=0.5,
        hidden=True,
    )
    early_margin: float = drawing_setting(
        0.2, "how far below a threshold a similarity is dropped early", ge=0, le=2, hidden=True
    )
    p_per_source: int | None = drawing_setting(
        None,
        "candidates per source picture, each with its own p; default: 1",
        ge=1,
        le=10_000,
        example=1,
        hidden=True,
    )
    steps: int | None = _drawing_setting(StepSettings, "steps", "sampling steps; default: 20, storybook 10")
    sampler: SamplerName | None = _drawing_setting(
        StepSettings, "sampler", "sampler; default: euler_ancestral, storybook euler"
    )
    schedule: ScheduleName | None = _drawing_setting(
        PictureSettings, "schedule", "noise schedule; default: linspace, storybook trailing"
    )
    cfg_interval: SharePair | None = drawing_setting(
        None,
        "apply guidance only between these noise levels; default: 0 1, storybook 0.3 1",
        example=(0.2, 0.9),
        metavar="LOW HIGH",
        hidden=True,
    )
    tiny_vae: str | None = drawing_setting(
        None, "a tiny autoencoder for the pictures that are scored; default: none", hidden=True
    )
    attention: Attention | None = drawing_setting(
        None, "attention that a pair shares; default: self", hidden=True
    )
    reweight: float = drawing_setting(
        1.0,
        "weight of the new words' cross-attention maps; needs --attention replace or refine",
        ge=-10,
        le=100,
        example=2.0,
        hidden=True,
    )
    blend: float | None = drawing_setting(
        None,
        "change only where the changed words' attention is above this share of its maximum; 0.3 is usual",
        ge=0,
        le=1,
        example=0.3,
        hidden=True,
    )
    p: SharePair = drawing_setting(
        (0.1, 0.9),
        "share of the steps with shared attention, drawn per candidate",
        metavar="LOW HIGH",
        hidden=True,
    )
    p_cross: SharePair | None = drawing_setting(
        None,
        "the same for cross-attention alone; default: the p of the candidate",
        example=(0.4, 0.9),
        metavar="LOW HIGH",
        hidden=True,
    )
    scale: ScalePair | None = drawing_setting(
        None,
        "guidance scale, drawn per candidate; default: 3 5 for the storybook, else 7.5 15",
        example=(7.5, 15.0),
        metavar="LOW HIGH",
        hidden=True,
    )
    batch_size: int | None = drawing_setting(
        None, "pairs per batch; default: 4 on a CPU, else 8", ge=1, le=10**9, example=8
    )
    license: str | None = setting(None, "license of the pictures, for their column", hidden=True)

    def check_together(self) -> None:
        super().check_together()
        for name in ("p", "p_cross", "scale", "cfg_interval"):
            ends = getattr(self, name)
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
        """Raise InputError for settings that cannot be used, alone or together."""
        check_needed(
            self,
            ("triples", "the triples are"),
            ("out", "-o is"),
            example="ip2p synth pairs triples.parquet -o pairs",
        )
        for name, value in PAIRS_AS_PAPER.items():
            given = getattr(self, name)
            if self.as_paper and given is not None and given != value:
                flag = flag_of(name)
                raise InputError(f"{flag} {given} is not the paper's; leave out {flag} or --as-paper.")

    def how(self, *, storybook: bool = False) -> dict[str, Any]:
        """How candidates are drawn, with the keys of `PAIRS`. storybook: the model is the storybook's."""
        usual = PAIRS_AS_PAPER if self.as_paper else PAIRS_STORYBOOK if storybook else PAIRS
        if self.keep == "all":
            usual = usual | {"early_at": 0.0}  # every candidate is finished
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
    out: Path | None = common_setting(
        None, "folder of parquet shards; the same command resumes", flags=("-o",)
    )
    keep: Literal["passed", "all"] = threshold_setting("passed", "all: every readable row, with its scores")
    clip: str | None = model_setting(
        None, "CLIP for rows without scores; default: that of the others, else the paper's"
    )
    rescore: bool = model_setting(False, "measure rows that have scores too", hidden=True)
    safety: str | None = model_setting(
        None, "picture classifier: pairs that it calls NSFW or unsafe are dropped", metavar="MODEL"
    )
    count: int | None = common_setting(None, "use only the first N rows", ge=1, le=10**9, example=1000)
    batch: int = model_setting(32, "pictures per batch", ge=1, le=1_000_000)

    def check(self) -> None:
        """Raise InputError for settings that cannot be used, alone or together."""
        check_needed(
            self, ("data", "the data set is"), ("out", "-o is"), example="ip2p synth filter pairs -o kept"
        )
        if self.keep == "all" and any(
            value is not None for value in (self.image, self.caption, self.directional)
        ):
            raise InputError("--keep all writes every row; remove --image, --caption and --directional.")


class SynthInspectConfig(RunSettings, OverwriteSettings, KeepBestSettings, ThresholdSettings):
    """Show on a page what the thresholds keep and reject: ip2p synth inspect kept -o inspect.html"""

    data: str = setting(
        "",
        "what `synth pairs` or `synth filter` wrote, or any data set with scores",
        positional=1,
        metavar="DATA",
    )
    out: Path = common_setting(Path("inspect.html"), "the page, with its pictures inside", flags=("-o",))
    each: int = setting(6, "pairs on each side of a threshold", ge=1, le=1000, hidden=True)
    side: int = setting(128, "side of a picture on the page, in pixels", ge=16, le=1024, hidden=True)
    count: int | None = common_setting(None, "use only the first N rows", ge=1, le=10**9, example=1000)
    split: str = setting("train", "split of the data set", group="Data", hidden=True)

    def check(self) -> None:
        """Raise InputError for settings that cannot be used."""
        check_needed(self, ("data", "the data set is"), example="ip2p synth inspect kept")
