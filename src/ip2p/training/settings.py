"""The settings of `ip2p train` and `ip2p distill`. A recipe (`recipes/*.yaml`) can set any of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ip2p.base.errors import InputError
from ip2p.settings import (
    COMMON,
    MAX_SCALE,
    MAX_SEED,
    MODEL,
    ColumnSettings,
    Conflict,
    DeviceSettings,
    Prediction,
    RunSettings,
    Size,
    check_needed,
    read_pair,
    setting,
)

OPTIMIZER, DROPOUT, MEMORY = "Optimizer", "Conditioning dropout", "Speed and memory"
VALIDATION, RECORDS, DATA = "Checkpoints and validation", "Model card", "Data"
_Scale = Annotated[float, Field(ge=0, le=MAX_SCALE)]
ScaleRange = Annotated[tuple[_Scale, _Scale] | None, BeforeValidator(read_pair)]


class TrainConfig(RunSettings, ColumnSettings, DeviceSettings):
    """Train an editor on pairs of pictures: ip2p train --data pairs --base MODEL --output editor --steps N"""

    needed: ClassVar[Mapping[str, str]] = {"data": "--data", "base": "--base", "output": "--output"}
    usage: ClassVar[str] = "ip2p train --data pairs --base MODEL --output editor --steps 1000"

    data: str = setting(
        "",
        "pairs: parquet, folders, shards or a Hugging Face data set (docs/data.md); or storybook",
        group=COMMON,
        metavar="DATA",
    )
    base: str = setting(
        "",
        "Stable Diffusion or an editor: a model id, a folder, a file; or a UNet's config.json",
        group=COMMON,
        metavar="MODEL",
    )
    output: Path | None = setting(
        None,
        "folder of the editor; the same command resumes",
        group=COMMON,
        flags=("-o",),
        aliases=("out",),
        same_job=False,
    )
    steps: int = setting(1000, "optimizer steps", ge=1, le=10**9, group=COMMON, same_job=False)
    parts_from: str | None = setting(
        None,
        "model that provides the other parts when --base is a UNet alone or its config",
        group=MODEL,
        metavar="MODEL",
        aliases=("parts",),
    )
    size: Size = setting(
        None,
        "training size in pixels; default: the base's own",
        example=256,
        group=COMMON,
        metavar="SIDE|WxH",
    )
    resize_to: int | None = setting(
        None,
        "random crops: resize the shorter side to a random length from --size to this",
        ge=1,
        le=10**5,
        group=DATA,
        hidden=True,
    )
    no_flip: bool = setting(
        False,
        "do not mirror pictures; pairs whose instruction names a side are never mirrored",
        group=DATA,
        hidden=True,
    )
    batch: int = setting(32, "batch size across all processes", ge=1, le=10**6, group=COMMON)
    micro_batch: int | None = setting(
        None,
        "samples per process and forward pass; gradients are accumulated",
        ge=1,
        le=10**6,
        example=8,
        group=MEMORY,
        same_job=False,
    )
    lr: float = setting(1e-4, "learning rate", ge=0, le=1, group=COMMON)
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "learning rate after the warm-up", group=OPTIMIZER
    )
    warmup: int = setting(
        0, "steps over which the learning rate rises", ge=0, le=10**9, example=500, group=OPTIMIZER
    )
    weight_decay: float = setting(0.01, "AdamW's weight decay", ge=0, le=10, group=OPTIMIZER, hidden=True)
    beta1: float = setting(0.9, "AdamW's beta1", ge=0, lt=1, group=OPTIMIZER, hidden=True)
    beta2: float = setting(0.999, "AdamW's beta2", ge=0, lt=1, group=OPTIMIZER, hidden=True)
    clip_norm: float = setting(
        1.0, "maximum gradient norm; 0: no limit", ge=0, le=1e9, group=OPTIMIZER, hidden=True
    )
    ema: float = setting(
        0.9999,
        "maximum EMA decay; the EMA weights are saved; 0: none",
        ge=0,
        lt=1,
        example=0.9,
        group=OPTIMIZER,
    )
    ema_on_cpu: bool = setting(
        False,
        "keep the EMA in CPU memory, which saves 4 bytes per weight on the GPU",
        group=MEMORY,
        same_job=False,
        hidden=True,
    )
    optimizer: Literal["adamw", "adamw8bit"] = setting(
        "adamw",
        "adamw8bit stores its moments in 8 bits, a quarter of the memory: pip install 'ip2p[8bit]'",
        group=OPTIMIZER,
        hidden=True,
    )
    ema_updates: int = setting(
        1,
        "EMA updates per step; the paper's code makes one per micro-batch, so 4",
        ge=1,
        le=1000,
        example=4,
        group=OPTIMIZER,
        hidden=True,
    )
    text_null: float = setting(
        0.05,
        "fraction of samples without the instruction",
        ge=0,
        le=1,
        group=DROPOUT,
        hidden=True,
    )
    image_null: float = setting(
        0.05, "fraction of samples without the input picture", ge=0, le=1, group=DROPOUT, hidden=True
    )
    both_null: float = setting(
        0.05, "fraction of samples without both", ge=0, le=1, group=DROPOUT, hidden=True
    )
    min_snr: float | None = setting(
        None,
        "gamma of Min-SNR weighting (its paper uses 5); default: none",
        ge=0.01,
        le=1e6,
        example=5.0,
        group=OPTIMIZER,
        hidden=True,
    )
    prediction: Literal["auto", Prediction] = setting(
        "auto", "what the network predicts; auto: as the base", group=MODEL, hidden=True
    )
    lora: int | None = setting(
        None, "train a LoRA of this rank instead of all weights", ge=1, le=4096, example=16, group=COMMON
    )
    lora_alpha: float | None = setting(
        None, "strength of the LoRA; default: its rank", group=OPTIMIZER, hidden=True
    )
    lora_targets: Literal["attention", "all"] = setting(
        "attention", "layers that get a LoRA", group=OPTIMIZER, hidden=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "number format of the forward and backward pass; the weights stay fp32",
        group=MEMORY,
        same_job=False,
    )
    compile: bool = setting(
        False, "compile the UNet; pays off in long runs on a GPU", group=MEMORY, same_job=False
    )
    checkpointing: bool = setting(
        False,
        "gradient checkpointing: less memory, a third slower",
        group=MEMORY,
        same_job=False,
    )
    cache: Path | None = setting(
        None,
        "folder for latents and encoded texts; default: ~/.cache/ip2p",
        group=MEMORY,
        same_job=False,
    )
    cache_dtype: Literal["fp16", "fp32"] = setting(
        "fp16", "number format of the cache", group=MEMORY, hidden=True
    )
    no_cache: bool = setting(
        False, "encode the pictures during training instead of caching them", group=MEMORY, hidden=True
    )
    pool: int = setting(
        1024,
        "without a cache: pairs to encode at a time",
        ge=1,
        le=10**9,
        group=MEMORY,
        hidden=True,
    )
    reuse: int = setting(
        1,
        "without a cache: number of times to use each encoded pair",
        ge=1,
        le=10**9,
        group=MEMORY,
        hidden=True,
    )
    workers: int = setting(
        1,
        "worker processes that load pictures",
        ge=0,
        le=10**9,
        group=MEMORY,
        same_job=False,
    )
    keep: int = setting(
        2,
        "checkpoints to keep",
        ge=1,
        le=10**9,
        group=VALIDATION,
        same_job=False,
        hidden=True,
    )
    save_every: int = setting(
        500,
        "steps between checkpoints",
        ge=1,
        le=10**9,
        group=VALIDATION,
        same_job=False,
    )
    validate_every: int = setting(
        500, "steps between validations; 0: none", ge=0, le=10**9, group=VALIDATION, same_job=False
    )
    held_out: int = setting(
        8,
        "pairs held out for validation; at most a tenth of all",
        ge=0,
        le=10**9,
        group=VALIDATION,
        hidden=True,
    )
    validate_steps: int = setting(
        20,
        "sampling steps of the edits in a validation",
        ge=1,
        le=10**9,
        group=VALIDATION,
        same_job=False,
        hidden=True,
    )
    clip: str | None = setting(
        None,
        "CLIP model for validation: a folder or a Hugging Face model id; default: the base's own",
        group=VALIDATION,
        metavar="MODEL",
        same_job=False,
    )
    stop_when_worse: int | None = setting(
        None,
        "stop after this many validations without a new best",
        ge=1,
        le=10**6,
        example=5,
        group=VALIDATION,
        same_job=False,
        hidden=True,
    )
    watch: str = setting(
        "auto",
        "metric for --stop-when-worse; auto: success, else clip_directional, else loss",
        group=VALIDATION,
        same_job=False,
        hidden=True,
    )
    nan_steps: int = setting(
        1,
        "stop after this many consecutive steps with nonfinite gradients",
        ge=1,
        le=10**9,
        group=VALIDATION,
        hidden=True,
        same_job=False,
    )
    track: str = setting(
        "auto",
        "experiment tracker: tensorboard, wandb, … as accelerate knows them, or none",
        group=VALIDATION,
        same_job=False,
    )
    profile: bool = setting(
        False,
        "measure and print the time of each part of a step",
        group=VALIDATION,
        same_job=False,
        hidden=True,
    )
    seconds: float | None = setting(
        None,
        "save and stop after this many seconds",
        ge=0,
        le=1e9,
        example=540.0,
        group=VALIDATION,
        same_job=False,
    )
    seed: int = setting(0, "seed of order, noise and dropout", ge=0, le=MAX_SEED, example=7, group=COMMON)
    revision: str | None = setting(None, "branch, tag or commit of the base", group=MODEL)
    vae: str | None = setting(
        None,
        "replace the autoencoder: a folder, a Hugging Face model id, or a file",
        group=MODEL,
        metavar="MODEL",
    )
    data_revision: str | None = setting(
        None, "branch, tag or commit of the data set", group=DATA, hidden=True
    )
    split: str = setting("train", "split of the data set", group=DATA, hidden=True)
    stream: bool = setting(
        False,
        "stream a Hugging Face data set instead of downloading it; nothing is cached",
        group=DATA,
        same_job=False,
    )
    license: str | None = setting(
        None, "license of the new editor", group=RECORDS, hidden=True, same_job=False
    )
    base_license: str | None = setting(
        None, "license of the base", group=RECORDS, hidden=True, same_job=False
    )
    data_license: str | None = setting(
        None, "license of the data", group=RECORDS, hidden=True, same_job=False
    )
    dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp16", "number format of the saved weights", group=MODEL, same_job=False
    )
    ray: int | None = setting(
        None,
        "train on this many workers of a Ray cluster",
        ge=1,
        le=4096,
        example=8,
        group=MEMORY,
        same_job=False,
    )

    def check_together(self) -> None:
        super().check_together()
        if self.micro_batch is not None and self.batch % self.micro_batch:
            multiple = self.micro_batch * -(-self.batch // self.micro_batch)
            raise Conflict(
                f"{{batch}} {self.batch} is not a multiple of {{micro_batch}} {self.micro_batch}. "
                f"Try {{batch}} {multiple}.",
                field="batch",
            )
        if self.text_null + self.image_null + self.both_null > 1:
            raise Conflict("{text_null}, {image_null} and {both_null} add up to more than 1. Try 0.05 each.")
        if self.lora_alpha is not None and self.lora is None:
            raise Conflict("{lora_alpha} applies only to a LoRA; add {lora} 16.")
        if self.stop_when_worse is not None and not (self.validate_every and self.held_out):
            raise Conflict("{stop_when_worse} needs validations; set {validate_every} and {held_out}.")

    def check(self) -> None:
        """Raise InputError if a required setting is missing."""
        check_needed(self, *((name, f"{flag} is") for name, flag in self.needed.items()), example=self.usage)
        if self.output is not None and self.output.is_file():
            raise InputError(f"--output {self.output} is a file; name a folder.")


class DistillConfig(TrainConfig):
    """Make an editor faster: ip2p distill --model MODEL --data pairs --output fast --steps N"""

    needed: ClassVar[Mapping[str, str]] = {"data": "--data", "base": "--model", "output": "--output"}
    usage: ClassVar[str] = "ip2p distill --model MODEL --data pairs --output fast --steps 1000"

    base: str = setting(
        "",
        "the editor to distill: a model id, a folder, a file, or storybook",
        name="model",
        called="--model",
        group=COMMON,
        metavar="MODEL",
    )
    stage: Literal["guidance", "few-steps"] = setting(
        "guidance",
        "guidance: one pass per step instead of three; few-steps: also 4 steps instead of 20",
        group=COMMON,
    )
    text_range: ScaleRange = setting(
        None,
        "minimum and maximum text CFG to learn; default: 1 12, or the model's if it is distilled",
        example=(1.0, 12.0),
        group=OPTIMIZER,
        metavar="LOW HIGH",
        hidden=True,
    )
    image_range: ScaleRange = setting(
        None,
        "minimum and maximum image CFG to learn; default: 1 2.5, or the model's if it is distilled",
        example=(1.0, 2.5),
        group=OPTIMIZER,
        metavar="LOW HIGH",
        hidden=True,
    )
    lr: float = setting(1e-5, "learning rate; a LoRA needs about 1e-4", ge=0, le=1, group=COMMON)
    # These do not apply; `check_together` rejects them.
    min_snr: float | None = setting(None, "does not apply to distillation", group=OPTIMIZER, hidden=True)
    prediction: Literal["auto", Prediction] = setting(
        "auto", "does not apply to distillation", group=MODEL, hidden=True
    )

    def check_together(self) -> None:
        super().check_together()
        if self.min_snr is not None:
            raise Conflict("{min_snr} does not apply to distillation; remove it.", field="min_snr")
        if self.prediction != "auto":
            raise Conflict(
                "{prediction} does not apply to distillation: the model predicts what its teacher predicts."
            )
        for name in ("text_range", "image_range"):
            limits = getattr(self, name)
            if limits is not None and limits[0] >= limits[1]:
                raise Conflict(
                    f"{{{name}}} {limits[0]:g} {limits[1]:g} is empty: the first number must be smaller.",
                    field=name,
                )
