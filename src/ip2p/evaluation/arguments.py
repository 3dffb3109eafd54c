"""The settings as keyword arguments. Written by scripts/make_arguments.py: do not edit."""

from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict


class EvaluateArguments(TypedDict, total=False):
    """Arguments of `evaluate`; see `EvaluateConfig`."""

    # what to avoid in the result
    negative: str
    # sampling steps
    steps: int | None
    # sampler
    sampler: Literal["euler_ancestral", "euler", "dpmpp_2m", "lcm", "tcd"] | None
    # how strongly to follow the instruction
    text_cfg: float | None
    # how strongly to keep the input picture
    image_cfg: float | None
    # working size of the model in pixels; default: close to its training size
    size: int | tuple[int, int] | None
    # noise schedule
    schedule: Literal["linspace", "karras", "exponential", "trailing", "lcm"] | None
    # reduce the contrast that high scales add; 0 to 1
    text_cfg_rescale: float
    # apply guidance only between these noise levels; 1 is the highest
    cfg_interval: tuple[float, float] | None
    # compute guidance only at every Nth step and reuse it between; faster, approximate
    cfg_every: int
    # run the whole UNet only at every Nth step and reuse its deep features between; faster, approximate
    cache_every: int
    # cuda, cuda:N, mps or cpu; auto: the first available one
    device: str
    # fp32, bf16 or fp16; auto: half precision if the device supports it well
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
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
    # original=NAME,instruction=NAME,edited=NAME; default: known names (docs/data.md)
    columns: str | None
    # split of the data set
    split: str
    # branch, tag or commit on Hugging Face
    revision: str | None
    # stream a Hugging Face data set instead of downloading it
    stream: bool
    # replace an existing output
    overwrite: bool
    # a data set of pairs (docs/data.md), a benchmark's files, or storybook
    data: str
    # output folder; the same command resumes
    out: str | Path | None
    # an editor, or NAME=EDITOR; may be repeated; default: only the baselines
    model: tuple[str, ...]
    # use only the first N rows; default: all, or 200 for storybook
    count: int | None
    # metrics, separated by commas; may be repeated; see --list; default: depends on the data
    metrics: tuple[str, ...]
    # score each model at several values of a setting and draw curves
    sweep: str | None
    # sdedit: the edited caption at strengths 0.3 to 0.9; text: the edited caption alone; may be repeated
    baseline: tuple[Literal["sdedit", "text"], ...]
    # model of the baselines; default: the first --model
    base: str | None
    # seed; the noise of a row depends on it and on the row's id
    seed: int
    # CLIP for the clip_* metrics; default: ViT-L/14, or the storybook's for its pages
    clip: str | None
    # another CLIP for clip_b32_*
    clip_b32: str | None
    # another DINO for dino_*
    dino: str | None
    # another DINOv2 for dinov2_*
    dinov2: str | None
    # another ViT for structure
    structure: str | None
    # the benchmark that DATA is
    benchmark: Literal["magicbrush", "magicbrush-multi", "emu-edit", "pie", "gedit", "imgedit"] | None
    # evaluate as the benchmark's public code does, faults included (docs/evaluate.md)
    as_published: bool
    # evaluate as the paper's released script does, faults included (docs/evaluate.md)
    as_code: bool
    # OpenAI-compatible server whose vision model scores the edits
    judge: str | None
    # name of the vision model on the server
    judge_model: str
    # answers per picture, to estimate the variance
    judge_repeats: int
    # folder with your own semantics.txt and quality.txt
    judge_prompts: str | Path | None
    # seconds to wait for an answer
    judge_timeout: float
    # environment variable with the server's key; default: IP2P_API_KEY, else OPENAI_API_KEY
    key_variable: str | None
    # edits per batch; default: 16 for small pictures, else 4, or 1 on a CPU
    batch_size: int | None
    # number of rows whose pictures the page shows
    shown: int
    # bootstrap resamples for the intervals
    resamples: int
