"""The settings as keyword arguments. Written by scripts/make_arguments.py: do not edit."""

from typing import Literal

from typing_extensions import TypedDict

from ip2p.pictures.images import Picture


class EditArguments(TypedDict, total=False):
    """Keyword arguments of `Editor.edit` besides the picture, instruction and seeds; see `EditSettings`."""

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
    # seed of the first result, increased by 1 for each further one; -1: random
    seed: int
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
    # picture of the input's size: white is edited, black stays unchanged to the byte
    mask: Picture | None
    # pixels around the white area to show the model
    mask_padding: int
    # width in pixels of the soft edge inside the mask; default: 1/128 of its longer side
    feather: float | None
    # let the model find the region to edit; lower thresholds select more (without a value: 0.5)
    auto_mask: float | None
    # original: apply the change at the input resolution; model: keep the working size
    fit: Literal["original", "model"]
    # color behind transparent parts: a name or #rrggbb; default: results stay transparent
    background: str | None
    # input of the ControlNet: edges, a depth map, …
    control_image: Picture | None
    # strength of the ControlNet
    control_scale: float
