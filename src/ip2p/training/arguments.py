"""The settings as keyword arguments. Written by scripts/make_arguments.py: do not edit."""

from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict


class TrainArguments(TypedDict, total=False):
    """Arguments of `train`; see `TrainConfig`."""

    # cuda, cuda:N, mps or cpu; auto: the first available one
    device: str
    # original=NAME,instruction=NAME,edited=NAME; default: known names (docs/data.md)
    columns: str | None
    # pairs: parquet, folders, shards or a Hugging Face data set (docs/data.md); or storybook
    data: str
    # Stable Diffusion or an editor: a model id, a folder, a file; or a UNet's config.json
    base: str
    # folder of the editor; the same command resumes
    output: str | Path | None
    # optimizer steps
    steps: int
    # model that provides the other parts when --base is a UNet alone or its config
    parts_from: str | None
    # training size in pixels; default: the base's own
    size: int | tuple[int, int] | None
    # random crops: resize the shorter side to a random length from --size to this
    resize_to: int | None
    # do not mirror pictures; pairs whose instruction names a side are never mirrored
    no_flip: bool
    # batch size across all processes
    batch: int
    # samples per process and forward pass; gradients are accumulated
    micro_batch: int | None
    # learning rate
    lr: float
    # learning rate after the warm-up
    schedule: Literal["constant", "cosine"]
    # steps over which the learning rate rises
    warmup: int
    # AdamW's weight decay
    weight_decay: float
    # AdamW's beta1
    beta1: float
    # AdamW's beta2
    beta2: float
    # maximum gradient norm; 0: no limit
    clip_norm: float
    # maximum EMA decay; the EMA weights are saved; 0: none
    ema: float
    # keep the EMA in CPU memory, which saves 4 bytes per weight on the GPU
    ema_on_cpu: bool
    # adamw8bit stores its moments in 8 bits, a quarter of the memory: pip install 'ip2p[8bit]'
    optimizer: Literal["adamw", "adamw8bit"]
    # EMA updates per step; the paper's code makes one per micro-batch, so 4
    ema_updates: int
    # fraction of samples without the instruction
    text_null: float
    # fraction of samples without the input picture
    image_null: float
    # fraction of samples without both
    both_null: float
    # gamma of Min-SNR weighting (its paper uses 5); default: none
    min_snr: float | None
    # what the network predicts; auto: as the base
    prediction: Literal["auto", "epsilon", "v_prediction", "sample"]
    # train a LoRA of this rank instead of all weights
    lora: int | None
    # strength of the LoRA; default: its rank
    lora_alpha: float | None
    # layers that get a LoRA
    lora_targets: Literal["attention", "all"]
    # number format of the forward and backward pass; the weights stay fp32
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    # compile the UNet; pays off in long runs on a GPU
    compile: bool
    # gradient checkpointing: less memory, a third slower
    checkpointing: bool
    # folder for latents and encoded texts; default: ~/.cache/ip2p
    cache: str | Path | None
    # number format of the cache
    cache_dtype: Literal["fp16", "fp32"]
    # encode the pictures during training instead of caching them
    no_cache: bool
    # without a cache: pairs to encode at a time
    pool: int
    # without a cache: number of times to use each encoded pair
    reuse: int
    # worker processes that load pictures
    workers: int
    # checkpoints to keep
    keep: int
    # steps between checkpoints
    save_every: int
    # steps between validations; 0: none
    validate_every: int
    # pairs held out for validation; at most a tenth of all
    held_out: int
    # sampling steps of the edits in a validation
    validate_steps: int
    # CLIP model for validation: a folder or a Hugging Face model id; default: the base's own
    clip: str | None
    # stop after this many validations without a new best
    stop_when_worse: int | None
    # metric for --stop-when-worse; auto: success, else clip_directional, else loss
    watch: str
    # stop after this many consecutive steps with nonfinite gradients
    nan_steps: int
    # experiment tracker: tensorboard, wandb, … as accelerate knows them, or none
    track: str
    # measure and print the time of each part of a step
    profile: bool
    # save and stop after this many seconds
    seconds: float | None
    # seed of order, noise and dropout
    seed: int
    # branch, tag or commit of the base
    revision: str | None
    # replace the autoencoder: a folder, a Hugging Face model id, or a file
    vae: str | None
    # branch, tag or commit of the data set
    data_revision: str | None
    # split of the data set
    split: str
    # stream a Hugging Face data set instead of downloading it; nothing is cached
    stream: bool
    # license of the new editor
    license: str | None
    # license of the base
    base_license: str | None
    # license of the data
    data_license: str | None
    # number format of the saved weights
    dtype: Literal["fp32", "bf16", "fp16"]
    # train on this many workers of a Ray cluster
    ray: int | None


class DistillArguments(TrainArguments, total=False):
    """Arguments of `distill`; see `DistillConfig`."""

    # the editor to distill: a model id, a folder, a file, or storybook
    model: str
    # guidance: one pass per step instead of three; few-steps: also 4 steps instead of 20
    stage: Literal["guidance", "few-steps"]
    # minimum and maximum text CFG to learn; default: 1 12, or the model's if it is distilled
    text_range: tuple[float, float] | None
    # minimum and maximum image CFG to learn; default: 1 2.5, or the model's if it is distilled
    image_range: tuple[float, float] | None
