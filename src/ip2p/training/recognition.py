"""Auxiliary classification heads that teach a small editor what is on a page and what an edit requests.

Stable Diffusion knows objects and words before InstructPix2Pix trains it to edit. A network trained from
scratch has to learn both from pixel errors, which takes far longer than learning the edits. These heads
classify its features during training, with known labels, and are discarded afterward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from ip2p.training.objective import EditBatch

IGNORED = -100  # the label of fields without a loss


class Heads(nn.Module):
    """Class logits from features: one hidden layer, with the classes of all fields concatenated."""

    def __init__(self, features: int, sizes: Sequence[int], hidden: int = 192) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, sum(sizes)))

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        return self.layers(features)


class SceneHead(nn.Module):
    """Classifies a page from a feature map: each spot of a 2 x 3 grid, and the whole page."""

    def __init__(self, channels: int, spot_sizes: Sequence[int], page_sizes: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(16, channels)
        self.spots = Heads(2 * channels, spot_sizes)
        self.page = Heads(channels, page_sizes)

    def loss(
        self, features: Float[Tensor, "batch channels h w"], labels: Int[Tensor, "batch fields"]
    ) -> tuple[Float[Tensor, ""], float]:
        """The mean cross-entropy over the labeled fields, and the accuracy of the spots' first field."""
        x = F.silu(self.norm(features.float()))
        batch, channels = x.shape[:2]
        # Two rows of features per row of spots, to distinguish high and low positions.
        parts = F.adaptive_avg_pool2d(x, (4, 3)).view(batch, channels, 2, 2, 3)
        spots = self.spots(parts.permute(0, 2, 4, 1, 3).reshape(batch, 6, 2 * channels))
        own = labels[:, : 6 * len(self.spots.sizes)].reshape(batch, 6, -1)
        page = labels[:, 6 * len(self.spots.sizes) :]
        loss = class_loss(spots, own, self.spots.sizes) + class_loss(
            self.page(x.mean(dim=(2, 3))), page, self.page.sizes
        )
        there = own[..., 0] > 0
        right = spots[..., : self.spots.sizes[0]].argmax(-1) == own[..., 0]
        return loss, float(right[there].float().mean()) if there.any() else 0.0


def class_loss(
    logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch fields"], sizes: Sequence[int]
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the fields; fields without a label (-100) are ignored."""
    losses = []
    for field, part in enumerate(logits.float().split(list(sizes), dim=-1)):
        own = labels[..., field].reshape(-1)
        if (own >= 0).any():
            losses.append(F.cross_entropy(part.reshape(-1, part.shape[-1]), own))
    return torch.stack(losses).mean() if losses else logits.float().sum() * 0


class Recognition(nn.Module):
    """The heads of an editor: features for the pages before and after, text for the edit.

    thing_sizes, page_sizes, edit_sizes: the number of classes of each field. Call `watch(unet)` first; each
    forward pass of the UNet then stores the features that `loss` reads.
    """

    def __init__(
        self,
        channels: int,
        text_width: int,
        thing_sizes: Sequence[int],
        page_sizes: Sequence[int],
        edit_sizes: Sequence[int],
        weight: float,
    ) -> None:
        super().__init__()
        self.before = SceneHead(channels, thing_sizes, page_sizes)
        self.after = SceneHead(channels, thing_sizes, page_sizes)
        self.edit = Heads(text_width, edit_sizes)
        self.weight = weight
        self._features: dict[str, Tensor] = {}

    def watch(self, unet: Any) -> None:
        """Hook the features at the middle level: page before in the down path, page after in the up path."""
        for name, block in (("before", unet.down_blocks[-2]), ("after", unet.up_blocks[1])):
            block.attentions[-1].register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._features[name] = output[0]

        return hook

    def loss(
        self, batch: EditBatch, context: Float[Tensor, "batch tokens features"]
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The weighted loss, and metrics: `sees` and `knows` are accuracies, `reads` is a loss."""
        labels, draws = batch.labels, batch.draws
        assert labels is not None, "recognition needs drawn pages with labels"
        # Only what the conditions determine: the page before if it is shown; the page after from a caption
        # (which takes precedence over a null text) or from both conditions; the edit from its text.
        no_image, no_text = draws.image_null[:, None], draws.text_null[:, None]
        by_caption = draws.caption_only[:, None]
        known_after = by_caption | ~(no_text | no_image)
        before, sees = self.before.loss(
            self._features["before"], labels["before"].masked_fill(no_image, IGNORED)
        )
        after, knows = self.after.loss(
            self._features["after"], labels["after"].masked_fill(~known_after, IGNORED)
        )
        words = labels["edit"].masked_fill(no_text | by_caption, IGNORED)
        edit = class_loss(self.edit(context[:, -1]), words, self.edit.sizes)
        numbers = {"sees": sees, "knows": knows, "reads": float(edit.detach())}
        return self.weight * (before + after + edit), numbers
