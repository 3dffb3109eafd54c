"""The heads of stage `perception`: the UNet learns to recognize pages and instructions before it edits.

The UNet gets the page, an instruction and pure noise. Heads on its features classify, for each cell, the
kind, color, size, number and clothes of the thing there, before and after the edit, and whether the edit
changes the cell. The picture itself is predicted as well. InstructPix2Pix starts from Stable Diffusion, which
has this knowledge; a randomly initialized network would have to learn it from the errors of pictures alone.

The stage (`editor.train_perception`) ends when most things are classified correctly and most changes found.
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
BACKGROUND_WEIGHT = 0.5  # of the loss of empty cells


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
    """The heads' logits: per cell before and after, per page before and after, and of a change per cell."""

    before: Tensor
    after: Tensor
    page_before: Tensor
    page_after: Tensor
    changed: Tensor


class Perception(nn.Module):
    """The heads of an editor, which use the features of the UNet's last forward pass.

    The page before the edit is classified from the last down block, the rest from the last up block.
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
        """The logits for the UNet's last forward pass."""
        before, page_before = self.before(self._features["before"])
        after, page_after = self.after(self._features["after"])
        return Seen(before, after[:, :-1], page_before, page_after, after[:, -1])

    def loss(
        self, batch: EditBatch, context: Float[Tensor, "batch tokens features"]
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The weighted loss, the accuracy for things before the edit, and the IoU of changed cells.

        Only what the conditions determine counts: the page before if it is the input, the page after given a
        caption or page and instruction, the change given both, and the edit given its instruction.
        """
        labels, draws = batch.labels, batch.draws
        assert labels is not None and batch.changed is not None, "perception needs drawn pages"
        seen = self.see()
        no_image, no_text = draws.image_null, draws.text_null
        both = ~(no_image | no_text) & ~draws.caption_only
        known = draws.caption_only | both
        before = _hidden(cell_labels(labels["before_cells"], labels["before_things"]), no_image)
        after = _hidden(cell_labels(labels["after_cells"], labels["after_things"]), ~known)
        edit = _hidden(labels["edit"], no_text | draws.caption_only)
        losses = [
            cells_loss(seen.before, before),
            cells_loss(seen.after, after),
            0.5 * class_loss(seen.page_before, _hidden(labels["before_page"], no_image), PAGE_SIZES),
            0.5 * class_loss(seen.page_after, _hidden(labels["after_page"], ~known), PAGE_SIZES),
            change_loss(seen.changed, batch.changed[:, 0], both),
            0.5 * class_loss(self.edit(context[:, -1]), edit, EDIT_SIZES),
        ]
        with torch.no_grad():
            shown = ~no_image
            right, count = named_right(
                seen.before[shown], labels["before_cells"][shown], labels["before_things"][shown]
            )["kind"]
            iou = change_iou(seen.changed[both], batch.changed[both, 0] > 0)
        metrics = {"named": right / max(count, 1), "iou": iou, "change": float(losses[4].detach())}
        return labels["weight"] * torch.stack(losses).sum(), metrics


def _hidden(labels: Int[Tensor, " batch *fields"], rows: Bool[Tensor, " batch"]) -> Tensor:
    """Labels with those of some rows replaced by IGNORED."""
    return labels.masked_fill(rows.view(-1, *(1,) * (labels.ndim - 1)), IGNORED)


def cell_labels(
    cells: Int[Tensor, "batch h w"], things: Int[Tensor, "batch things fields"]
) -> Int[Tensor, "batch fields h w"]:
    """The classes of the thing in each cell; an empty cell has kind 0, and IGNORED for the other fields."""
    nothing = things.new_full((len(things), 1, things.shape[2]), IGNORED)
    nothing[..., FIELDS.index("kind")] = 0
    table = torch.cat([nothing, things], dim=1)
    rows = torch.arange(len(cells), device=cells.device)[:, None, None]
    return table[rows, cells].permute(0, 3, 1, 2)


def cells_loss(
    logits: Float[Tensor, "batch classes h w"], labels: Int[Tensor, "batch fields h w"]
) -> Float[Tensor, ""]:
    """The weighted sum of the fields' mean cross-entropies, over cells with things and over empty cells."""
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
    """The mean of the cross-entropies over changed and over unchanged cells of each sample."""
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
    """For each field, the numbers of correctly classified visible things and of all visible things.

    A thing's class is the one with the largest sum of log-probabilities over its cells.
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
    """Intersection over union of the predicted and the actual changed cells, over the batch."""
    predicted = logits > 0
    union = (predicted | changed).sum()
    return float((predicted & changed).sum() / union) if union else 0.0
