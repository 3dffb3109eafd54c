"""Classifier-free guidance with two conditions (paper, section 3.2)."""

from typing import NamedTuple

from ip2p.diffusion import Latent


class Passes(NamedTuple):
    """Which of the three predictions of equation 3 have a nonzero weight."""

    full: bool
    image_only: bool
    neither: bool


def guide(full: Latent, image_only: Latent, neither: Latent, *, text: float, image: float) -> Latent:
    """Mix three predictions into one (paper, eq. 3).

    e = e00 + image · (e0I - e00) + text · (eTI - e0I). It is linear with weights that sum to one, so it
    applies to noise, velocity and x0. `text` is s_T, `image` is s_I.
    """
    return neither + image * (image_only - neither) + text * (full - image_only)


def passes(*, text: float, image: float) -> Passes:
    """The predictions that equation 3 needs; their weights are text, image - text and 1 - image.

    Skipping a zero weight is exact: image = 1 or text = image needs two passes, and both equal to 1 need one.
    An image scale below 1 is an ordinary scale and disables nothing.
    """
    return Passes(full=text != 0, image_only=image != text, neither=image != 1)


def rescale(mixed: Latent, full: Latent, share: float) -> Latent:
    """Move each picture's standard deviation toward that of its full prediction (Lin et al. 2023, eq. 14-16).

    share · e · std(eTI) / std(e) + (1 - share) · e; `share` is their φ, in [0, 1]. Large guidance scales
    increase the deviation, which looks overexposed.
    """
    picture = tuple(range(1, mixed.ndim))
    ratio = full.std(dim=picture, keepdim=True) / mixed.std(dim=picture, keepdim=True)
    return share * mixed * ratio + (1 - share) * mixed
