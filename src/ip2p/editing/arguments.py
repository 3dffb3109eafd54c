"""The settings as keyword arguments. Written by scripts/make_arguments.py: do not edit."""

from typing import Literal

from typing_extensions import TypedDict

from ip2p.pictures.images import Picture


class EditArguments(TypedDict, total=False):
    """What `Editor.edit` takes beside the picture, the instruction and the seeds; see `EditSettings`."""

    # what to stay away from
    negative: str
    # sampling steps
    steps: int | None
    # sampler
    sampler: Literal["euler_ancestral", "euler", "dpmpp_2m", "lcm", "tcd"] | None
    # how strongly to follow the instruction
    text_cfg: float | None
    # how strongly to keep the input picture
    image_cfg: float | None
    # seed of the first result; the next ones count up; -1 draws one
    seed: int
    # working size of the model, in pixels; default: near the size it was trained at
    size: int | tuple[int, int] | None
    # noise schedule
    schedule: Literal["linspace", "karras", "exponential", "trailing", "lcm"] | None
    # 0 to 1: reduce the contrast that high scales add
    text_cfg_rescale: float
    # use guidance only between these noise levels; 1 is the noisiest
    cfg_interval: tuple[float, float]
    # picture of the input's size: white is edited, black stays the same to the byte
    mask: Picture | None
    # pixels around the white area that the model sees too
    mask_padding: int
    # pixels over which the edit fades inside the mask; default: 1/128 of its longer side
    feather: float | None
    # let the model find the region to edit; a lower threshold takes more (default alone: 0.5)
    auto_mask: float | None
    # original: apply the change at the picture's own resolution; model: keep the working size
    fit: Literal["original", "model"]
    # color to lay transparent parts on: a name or #rrggbb; default: results stay transparent
    background: str | None
    # picture that the ControlNet reads: edges, a depth map, …
    control_image: Picture | None
    # strength of the ControlNet
    control_scale: float
