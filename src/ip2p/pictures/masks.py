"""Limit an edit to a region: a mask from the user, or one that is detected from the model's changes.

A mask is a picture in mode "L": 255 is edited, 0 stays byte-identical, values in between are blended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.pictures.images import MAX_PIXELS, MIN_SIDE, Picture, load_image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ip2p.diffusion import Denoiser

Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow crops
# For mask detection: the noise level (as a fraction of the training times) and the number of noise draws. One
# level and two draws work as well as three levels with four draws each.
LEVEL, DRAWS = 0.65, 2
# If the median of a change exceeds this fraction of its maximum, the edit concerns the whole picture.
WHOLE = 0.17
GROW, RIM = 1.5, 0.75  # in latent cells: dilation of a detected region, and the soft rim inside it


# --- user masks ----------------------------------------------------------------------------------


def load_mask(source: Picture, size: tuple[int, int], *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Load a mask for a picture of `size` (width, height), in mode "L". Transparent pixels become black.

    Raises InputError for a mask of another size, for an all-black mask, and as `load_image` does.
    """
    mask = load_image(source, max_pixels=max_pixels, background="black").convert("L")
    if mask.size != size:
        raise InputError(
            f"The mask is {_times(mask.size)} pixels and the picture {_times(size)}; they must have the same "
            f"size. Paint the mask on the upright picture, or scale it to {_times(size)}."
        )
    if mask.getbbox() is None:
        raise InputError("The mask is all black, so nothing would change. Paint the region to edit white.")
    mask.info = {}
    return mask


def feather(mask: Image.Image, width: float) -> Image.Image:
    """`mask` with a soft rim of `width` pixels inside it: black pixels stay black.

    The value increases with the distance to the nearest black pixel, up to `width`. A mask that is thinner
    than that everywhere gets a narrower rim, so that its middle stays white.
    """
    values = np.asarray(mask)
    if width < 0.5:
        return mask
    depth = _depth(values > 0, int(np.ceil(width)) + 1)
    rim = depth / (width + 1)
    rim = (rim / min(1.0, max(rim.max(), 1e-6))).clip(0, 1)
    return Image.fromarray(np.minimum(values, (rim * 255).round()).astype(np.uint8))


def feathered_part(mask: Image.Image, box: Box, width: float) -> Image.Image:
    """The part of the mask inside `box`, feathered. The box must contain all nonblack pixels."""
    # Include one pixel around the box: the mask ends there, except at the picture's border.
    left, top = max(0, box[0] - 1), max(0, box[1] - 1)
    around = mask.crop((left, top, min(mask.width, box[2] + 1), min(mask.height, box[3] + 1)))
    return feather(around, width).crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))


def _depth(inside: NDArray[np.bool_], limit: int) -> NDArray[np.float32]:
    """The Euclidean distance of every pixel to the nearest outside pixel, at most `limit`; [h, w].

    The picture's border is not an edge: a region that touches the border is assumed to continue beyond it.
    """
    # Rows first, then columns: a distance transform as a lower envelope (Felzenszwalb & Huttenlocher 2012),
    # by brute force over the few rows within reach.
    height, width = inside.shape
    place = np.arange(width, dtype=np.int32)
    far = np.int32(-2 * limit)
    before = np.maximum.accumulate(np.where(inside, far, place), axis=1)
    after = np.minimum.accumulate(np.where(inside, width - far, place)[:, ::-1], axis=1)[:, ::-1]
    row = np.minimum(place - before, after - place).clip(0, limit).astype(np.float32) ** 2
    nearest = row.copy()
    for step in range(1, min(limit, height)):
        np.minimum(nearest[step:], row[:-step] + step**2, out=nearest[step:])
        np.minimum(nearest[:-step], row[step:] + step**2, out=nearest[:-step])
    return np.sqrt(nearest).clip(max=limit)


def padded_box(mask: Image.Image, padding: int) -> Box:
    """The bounding box of the nonblack pixels, `padding` pixels larger on every side, within the picture.

    If the picture has room, each side is at least 16 pixels and at least half of the other side: a narrow
    strip shows the model too little context.
    """
    box = mask.getbbox()
    assert box is not None, "the mask is black"
    left, top, right, bottom = box
    box = (
        max(0, left - padding),
        max(0, top - padding),
        min(mask.width, right + padding),
        min(mask.height, bottom + padding),
    )
    width, height = box[2] - box[0], box[3] - box[1]
    low = max(MIN_SIDE, -(-max(width, height) // 2))
    return _grown(box, max(width, low), max(height, low), mask.size)


def widened_box(box: Box, shape: tuple[int, int], picture: tuple[int, int]) -> Box:
    """`box` made taller or wider to match the aspect ratio of `shape`, as far as the picture has room."""
    width, height = box[2] - box[0], box[3] - box[1]
    wide, tall = shape
    if width * tall < height * wide:
        width = round(height * wide / tall)
    else:
        height = round(width * tall / wide)
    return _grown(box, width, height, picture)


def _grown(box: Box, width: int, height: int, picture: tuple[int, int]) -> Box:
    """A box of width x height centered on `box`, moved and, if necessary, cropped to fit into the picture."""
    width, height = min(width, picture[0]), min(height, picture[1])
    left = min(max(0, (box[0] + box[2] - width) // 2), picture[0] - width)
    top = min(max(0, (box[1] + box[3] - height) // 2), picture[1] - height)
    return left, top, left + width, top + height


def paste(original: Image.Image, edited: Image.Image, mask: Image.Image) -> Image.Image:
    """`edited` where the mask is white, exactly `original` where it is black; pictures of the same size."""
    return Image.composite(edited, original, mask)


# --- fixed latents -------------------------------------------------------------------------------


def free_cells(mask: Image.Image, size: tuple[int, int], factor: int) -> Tensor:
    """Which latent cells may change: 1 for cells with any nonblack pixel, else 0; [1, 1, h, w].

    size: the working size in pixels; factor: pixels per latent cell.
    """
    import torch

    coverage = Image.fromarray((np.asarray(mask) > 0).astype(np.float32)).resize(size, Image.Resampling.BOX)
    free = torch.from_numpy((np.asarray(coverage) > 0).astype(np.float32))
    return torch.nn.functional.max_pool2d(free[None, None], factor)


def hold_known(denoise: Denoiser, known: Tensor, free: Tensor) -> Denoiser:
    """A denoiser that predicts `known` wherever `free` is 0.

    There, every sampler moves straight from noise to `known`: at each step the latents are known + sigma ·
    noise, and the free region is denoised to match them.
    """
    import torch

    def denoise_inside(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(free > 0, denoise(x, sigma), known)

    return denoise_inside


# --- detected masks ------------------------------------------------------------------------------


def detect_masks(
    relevance: Tensor, change: Tensor, threshold: float, size: tuple[int, int]
) -> list[Image.Image]:
    """Detect the region of an instruction: a mask of `size` (width, height) for each row.

    relevance: [batch, draws, channels, h, w], the model's predictions with the instruction minus those
    without it, from noised latents of the picture. change: [batch, channels, h, w], the latents of the result
    minus those of the picture. A position is selected only if both are high: relevance alone ("Watch Your
    Steps", Mirzaei et al. 2023, section 3.2) also marks objects that the instruction merely mentions, and
    change alone marks every artifact. A change without a background (of the light or the whole scene) gives a
    mask of the whole picture.
    """
    import torch

    factor = size[0] // change.shape[-1]
    reach, rim = round(GROW * factor), RIM * factor
    masks = []
    for predicted, actual in zip(
        _smooth(relevance.abs().mean(dim=(1, 2))), _smooth(change.abs().mean(1)), strict=True
    ):
        if actual.median() > WHOLE * actual.max():
            masks.append(Image.new("L", size, 255))
            continue
        outcome = normalized_strength(actual)
        both = outcome.minimum(normalized_strength(predicted))
        if both.max() < threshold:  # they disagree: use the actual change
            both = outcome
        fine = torch.nn.functional.interpolate(both[None, None], size[::-1], mode="bilinear")
        inside = (fine >= min(threshold, float(fine.max()))).float()
        # Dilate the region: edges fall between cells, and an object includes its shadow and outline.
        grown = torch.nn.functional.max_pool2d(inside, 2 * reach + 1, 1, reach)[0, 0]
        masks.append(feather(Image.fromarray((grown * 255).byte().cpu().numpy()), rim))
    return masks


def normalized_strength(strength: Tensor) -> Tensor:
    """Scale [h, w] to [0, 1]: 0 up to the median, 1 from the largest value that is no outlier (1.5 IQR).

    The upper limit is at least a quarter of the maximum: with a static background, all changed values would
    be outliers.
    """
    values = strength.flatten()
    low, high = values.quantile(0.25), values.quantile(0.75)
    most = (high + 1.5 * (high - low)).maximum(values.max() / 4).minimum(values.max())
    middle = values.median()
    return ((strength - middle) / (most - middle).clamp_min(1e-12)).clamp(0, 1)


def _smooth(maps: Tensor) -> Tensor:
    """The 3x3 box mean of maps [batch, h, w]."""
    import torch

    wide = torch.nn.functional.pad(maps.float()[:, None], (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool2d(wide, 3, 1)[:, 0]


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
