"""The heads of stage `perception`: the editor's network learns to see and to read before it learns to edit.

The network gets the page, an instruction and pure noise. Heads on its features name, in each cell, the kind,
color, size, number and clothes of what is there, before and after the edit, and say which cells the edit
changes. The picture itself is asked for too, as the velocity at full noise. Stable Diffusion brings all this
to InstructPix2Pix; a network that starts from nothing would have to find it in the errors of pictures.

The stage (`editor.train_perception`) trains on until most things are named right and most changes found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ip2p.training.objective import EditBatch
from ip2p.training.storybook.heads import Heads, class_loss
from ip2p_storybook.labels import EDIT_SIZES, IGNORED, PAGE_SIZES, THING_CLASSES, THING_SIZES

FIELDS = tuple(THING_CLASSES)
BACKGROUND_WEIGHT = 0.5  # of the loss of cells in which nothing stands


class CellHead(nn.Module):
    """Class logits for each latent cell, and for the whole page, from a map of features of any resolution."""

    def __init__(
        self, channels: int, factor: int, cell_classes: int, page_classes: int, hidden: int = 96
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.spread = nn.Sequential(
            nn.Conv2d(channels, hidden * factor**2, 1), nn.PixelShuffle(factor), nn.SiLU()
        )
        self.cells = nn.Conv2d(hidden, cell_classes, 1)
        self.page = nn.Linear(channels, page_classes)

    def forward(
        self, features: Float[Tensor, "batch channels h w"]
    ) -> tuple[Float[Tensor, "batch classes cells cells"], Float[Tensor, "batch page_classes"]]:
        x = F.silu(self.norm(features.float()))
        return self.cells(self.spread(x)), self.page(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Seen:
    """What the heads say: logits by cell of the page before and after, of both pages, and of a change."""

    before: Tensor
    after: Tensor
    page_before: Tensor
    page_after: Tensor
    changed: Tensor


class Perception(nn.Module):
    """The heads of an editor; each forward pass of its UNet leaves the features that they read.

    The page before is read where the way down ends, the rest where the way up ends.
    """

    def __init__(self, unet: Any, text_width: int) -> None:
        super().__init__()
        channels = unet.config.block_out_channels
        cell, page = sum(THING_SIZES), sum(PAGE_SIZES)
        self.before = CellHead(channels[-1], 2 ** (len(channels) - 1), cell, page)
        self.after = CellHead(channels[0], 1, cell + 1, page)
        self.edit = Heads(text_width, EDIT_SIZES)
        self._features: dict[str, Tensor] = {}
        unet.down_blocks[-1].register_forward_hook(self._keep("before"))
        unet.up_blocks[-1].register_forward_hook(self._keep("after"))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._features[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def see(self) -> Seen:
        """The heads' logits for the network's last forward pass."""
        before, page_before = self.before(self._features["before"])
        after, page_after = self.after(self._features["after"])
        return Seen(before, after[:, :-1], page_before, page_after, after[:, -1])

    def loss(
        self, batch: EditBatch, context: Float[Tensor, "batch tokens features"]
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The weighted loss, and shares: things named right on the page before, changed cells' IoU.

        Only what the conditions tell is asked: the page before if it is shown, the page after by a caption
        or by page and instruction, the change by these two, the edit by its words.
        """
        labels, draws = batch.labels, batch.draws
        assert labels is not None and batch.changed is not None, "perception needs drawn pages"
        seen = self.see()
        no_image, no_text = draws.image_null, draws.text_null
        both = ~(no_image | no_text) & ~draws.caption_only
        told = draws.caption_only | both
        before = _hidden(cell_labels(labels["before_cells"], labels["before_things"]), no_image)
        after = _hidden(cell_labels(labels["after_cells"], labels["after_things"]), ~told)
        words = _hidden(labels["edit"], no_text | draws.caption_only)
        losses = [
            cells_loss(seen.before, before),
            cells_loss(seen.after, after),
            0.5 * class_loss(seen.page_before, _hidden(labels["before_page"], no_image), PAGE_SIZES),
            0.5 * class_loss(seen.page_after, _hidden(labels["after_page"], ~told), PAGE_SIZES),
            change_loss(seen.changed, batch.changed[:, 0], both),
            0.5 * class_loss(self.edit(context[:, -1]), words, EDIT_SIZES),
        ]
        with torch.no_grad():
            shown = ~no_image
            right, count = named_right(
                seen.before[shown], labels["before_cells"][shown], labels["before_things"][shown]
            )["kind"]
            iou = change_iou(seen.changed[both], batch.changed[both, 0] > 0)
        numbers = {"named": right / max(count, 1), "iou": iou, "change": float(losses[4].detach())}
        return labels["weight"] * torch.stack(losses).sum(), numbers


def _hidden(labels: Int[Tensor, " batch *fields"], rows: Bool[Tensor, " batch"]) -> Tensor:
    """Labels without those of some rows."""
    return labels.masked_fill(rows.view(-1, *(1,) * (labels.ndim - 1)), IGNORED)


def cell_labels(
    cells: Int[Tensor, "batch h w"], things: Int[Tensor, "batch things fields"]
) -> Int[Tensor, "batch fields h w"]:
    """The classes of the thing in each cell; where there is none, kind 0 and nothing of the rest."""
    nothing = things.new_full((len(things), 1, things.shape[2]), IGNORED)
    nothing[..., FIELDS.index("kind")] = 0
    table = torch.cat([nothing, things], dim=1)
    rows = torch.arange(len(cells), device=cells.device)[:, None, None]
    return table[rows, cells].permute(0, 3, 1, 2)


def cells_loss(
    logits: Float[Tensor, "batch classes h w"], labels: Int[Tensor, "batch fields h w"]
) -> Float[Tensor, ""]:
    """The sum of the fields' mean cross-entropies over things' cells, and the background's, weighted."""
    parts = logits.float().split(list(THING_SIZES), dim=1)
    total = logits.sum() * 0.0
    for field, part in enumerate(parts):
        own = labels[:, field]
        if FIELDS[field] != "kind":
            if (own >= 0).any():
                total = total + 0.5 * F.cross_entropy(part, own, ignore_index=IGNORED)
            continue
        for there, weight in ((own > 0, 1.0), (own == 0, BACKGROUND_WEIGHT)):
            if there.any():
                total = total + weight * F.cross_entropy(
                    part, own.masked_fill(~there, IGNORED), ignore_index=IGNORED
                )
    return total


def change_loss(
    logits: Float[Tensor, "batch h w"], changed: Float[Tensor, "batch h w"], rows: Bool[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean of each sample's cross-entropies over its changed and over its unchanged cells."""
    if not rows.any():
        return logits.sum() * 0.0
    losses = F.binary_cross_entropy_with_logits(logits[rows].float(), changed[rows], reduction="none")
    own = changed[rows]
    inside = (losses * own).sum(dim=(1, 2)) / own.sum(dim=(1, 2)).clamp(min=1)
    outside = (losses * (1 - own)).sum(dim=(1, 2)) / (1 - own).sum(dim=(1, 2)).clamp(min=1)
    return (inside + outside).mean() / 2


@torch.no_grad()
def named_right(
    logits: Float[Tensor, "batch classes h w"],
    cells: Int[Tensor, "batch h w"],
    things: Int[Tensor, "batch things fields"],
) -> dict[str, tuple[int, int]]:
    """For each field, how many visible things are named right, and how many there are.

    A thing's name is the class with the largest sum of log-probabilities over its cells.
    """
    counts = dict.fromkeys(FIELDS, (0, 0))
    if not len(logits):
        return counts
    masks = torch.stack([cells == number + 1 for number in range(things.shape[1])], dim=1).float()
    visible = masks.sum(dim=(2, 3)) > 0
    for field, part in enumerate(logits.float().split(list(THING_SIZES), dim=1)):
        sums = torch.einsum("bchw,bthw->btc", part.log_softmax(dim=1), masks)
        own = visible & (things[..., field] >= 0)
        right = (sums.argmax(-1) == things[..., field]) & own
        counts[FIELDS[field]] = int(right.sum()), int(own.sum())
    return counts


@torch.no_grad()
def change_iou(logits: Float[Tensor, "batch h w"], changed: Bool[Tensor, "batch h w"]) -> float:
    """Intersection over union of the cells called changed and those that are, over the batch."""
    called = logits > 0
    union = (called | changed).sum()
    return float((called & changed).sum() / union) if union else 0.0
