"""The settings as keyword arguments. Written by scripts/make_arguments.py: do not edit."""

from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict


class InstructArguments(TypedDict, total=False):
    """Keyword arguments of `ServerWriter`; see `SynthInstructConfig`."""

    # seed
    seed: int
    # cuda, cuda:N, mps or cpu; auto: the first available one
    device: str
    # fp32, bf16 or fp16; auto: half precision if the device supports it well
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    # split of the data set; for storybook as in `storybook draw`
    split: str
    # branch, tag or commit on Hugging Face
    revision: str | None
    # stream a Hugging Face data set instead of downloading it
    stream: bool
    # run on a Ray cluster: at this address, else RAY_ADDRESS, else a local one
    ray: str | None
    # local processes; default: one per core for small models on a CPU, else 1
    workers: int | None
    # workers on the cluster; default: as many as fit
    ray_workers: int | None
    # GPUs per worker; default: one if the cluster has any
    ray_gpus: float | None
    # threads per worker; default: 1 with several workers or --ray, else all
    threads: int | None
    # replace an existing output
    overwrite: bool
    # .txt, .jsonl, .csv, .parquet, a folder of them, or a Hugging Face data set
    captions: str
    # a .parquet file, or a folder for its shards; the same command resumes
    out: str | Path | None
    # URL of a server with OpenAI's API, as http://localhost:8000/v1
    server: str | None
    # completion for a tuned model, chat for a general one
    way: Literal["completion", "chat"]
    # concurrent requests
    together: int
    # maximum requests per second
    rate: float | None
    # price of a million tokens read and written, to print the cost
    price: tuple[float, float]
    # seconds that one answer may take
    timeout: float
    # seconds of server outage after which the run stops
    patience: float
    # environment variable with the server's key; default: IP2P_API_KEY, else OPENAI_API_KEY
    key_variable: str | None
    # seed triples shown to the model; default: 8 with --way chat, else none
    shots: int | None
    # edits per caption
    edits: int
    # how often to ask again after a rejected answer
    retries: int
    # accept edits that move things, which Prompt-to-Prompt cannot draw
    allow_spatial: bool
    # file of blocked words, one a line, instead of the built-in list
    block_list: str | Path | None
    # sampling temperature
    temperature: float
    # penalty for words that are in the answer already
    frequency_penalty: float
    # maximum tokens per answer
    max_tokens: int
    # answers per batch of a local model
    batch: int
    # column of the captions; default: the first known, such as TEXT
    column: str | None
    # use this many captions, drawn by --seed; default: all
    sample: int | None
    # minimum words of a caption
    min_words: int
    # maximum words of a caption
    max_words: int
    # minimum aesthetic score
    min_score: float | None
    # language of the captions
    language: Literal["english", "latin", "any"]


class PairsArguments(TypedDict, total=False):
    """Keyword arguments of `PairMaker`; see `SynthPairsConfig`."""

    # model that provides the parts a UNet-only file lacks
    parts_from: str | None
    # replace the autoencoder: a folder, a Hugging Face model id, or a file
    vae: str | None
    # branch, tag or commit on Hugging Face
    revision: str | None
    # for files with both: ema or plain weights; auto uses ema unless it belongs to another model
    weights: Literal["auto", "ema", "plain"]
    # sampling steps; default: 20, storybook 10
    steps: int | None
    # sampler; default: euler_ancestral, storybook euler
    sampler: Literal["euler_ancestral", "euler", "dpmpp_2m", "lcm", "tcd"] | None
    # working size of the model in pixels; default: close to its training size
    size: int | tuple[int, int] | None
    # noise schedule; default: linspace, storybook trailing
    schedule: Literal["linspace", "karras", "exponential", "trailing", "lcm"] | None
    # cuda, cuda:N, mps or cpu; auto: the first available one
    device: str
    # fp32, bf16 or fp16; auto: half precision if the device supports it well
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    # thresholds: paper, code or storybook; auto: by the CLIP in use
    preset: Literal["auto", "paper", "code", "storybook"]
    # minimum similarity of the two pictures, instead of the preset's
    image: float | None
    # minimum similarity of each picture and its caption
    caption: float | None
    # minimum similarity of the change in pictures and captions
    directional: float | None
    # run on a Ray cluster: at this address, else RAY_ADDRESS, else a local one
    ray: str | None
    # local processes; default: one per core for small models on a CPU, else 1
    workers: int | None
    # workers on the cluster; default: as many as fit
    ray_workers: int | None
    # GPUs per worker; default: one if the cluster has any
    ray_gpus: float | None
    # threads per worker; default: 1 with several workers or --ray, else all
    threads: int | None
    # replace an existing output
    overwrite: bool
    # .parquet, .jsonl, .csv, or a folder that `synth instruct` wrote
    triples: str
    # folder of parquet shards; the same command resumes
    out: str | Path | None
    # CLIP for the scores; default: the model's own, else openai/clip-vit-large-patch14
    clip: str | None
    # draw only the first N triples
    count: int | None
    # all: every candidate, with its scores
    keep: Literal["passed", "all"]
    # no shortcuts: 100 candidates of 100 steps each
    as_paper: bool
    # maximum candidates per triple; default: 32
    most: int | None
    # stop after this many that pass, 0: draw all; default: 4
    enough: int | None
    # the same for edits of the whole picture, which pass more often; 0: as the others; default: 2
    enough_whole: int | None
    # candidates between two looks at what passed; default: 8
    round_size: int | None
    # pass rate below which a triple is given up; default: 0.12, storybook 0.32
    worth: float | None
    # risk of giving up a good triple, 0: none is given up; default: 0.05
    risk: float | None
    # share of the steps at which hopeless candidates are dropped; default: 0, storybook 0.5
    early_at: float | None
    # how far below a threshold a similarity is dropped early
    early_margin: float
    # candidates per source picture, each with its own p; default: 1
    p_per_source: int | None
    # apply guidance only between these noise levels; default: 0 1, storybook 0.3 1
    cfg_interval: tuple[float, float] | None
    # attention that a pair shares; default: self
    attention: Literal["self", "replace", "refine", "self+replace", "self+refine"] | None
    # weight of the new words' cross-attention maps; needs --attention replace or refine
    reweight: float
    # change only where the changed words' attention is above this share of its maximum; 0.3 is usual
    blend: float | None
    # share of the steps with shared attention, drawn per candidate
    p: tuple[float, float]
    # the same for cross-attention alone; default: the p of the candidate
    p_cross: tuple[float, float] | None
    # guidance scale, drawn per candidate; default: 3 5 for the storybook, else 7.5 15
    scale: tuple[float, float] | None
    # pairs per batch; default: 4 on a CPU, else 8
    batch_size: int | None
    # license of the pictures, for their column
    license: str | None


class TuneArguments(TypedDict, total=False):
    """Keyword arguments of `tune_lm`; see `SynthTuneConfig`."""

    # seed
    seed: int
    # cuda, cuda:N, mps or cpu; auto: the first available one
    device: str
    # replace an existing output
    overwrite: bool
    # train a LoRA of this rank and merge it; default: all weights
    lora: int | None
    # epochs
    epochs: float
    # triples per step
    batch: int
    # learning rate; default: 5e-5, or 2e-4 for a LoRA
    rate: float | None
    # share of the steps over which the rate rises
    warm_up: float
    # AdamW's weight decay
    weight_decay: float
    # maximum gradient norm
    clip_norm: float
    # maximum tokens of a caption and its edit; longer ones are left out
    max_length: int
    # trl trains on many devices; auto uses it if it is installed
    backend: Literal["auto", "plain", "trl"]
    # branch, tag or commit on Hugging Face
    revision: str | None
