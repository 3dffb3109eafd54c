"""Stage `clip`: a small CLIP for ranking results (`ip2p edit --best`) and filtering pairs (`ip2p synth`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip2p.models.clip import MEAN, STD
from ip2p.training.storybook.data import Stream, draw_planes, read_ahead
from ip2p.training.storybook.presets import Preset
from ip2p.training.storybook.stage import Run, train_stage
from ip2p.training.storybook.text import load_tokenizer, text_config, text_reader, use_plain_attention
from ip2p_storybook.captions import caption
from ip2p_storybook.edits import sample_edit
from ip2p_storybook.scene import rng_for


class EditedPages(Stream):
    """Random edits: uint8 `before` and `after` [batch, 3, size, size], and lists of texts.

    The texts are `instruction`, `caption` (of the page before) and `edited_caption`.
    """

    def make(self, index: int) -> dict[str, Any]:
        rngs = [rng_for("train", "pair", self.seed, index, i) for i in range(self.batch)]
        edits = [sample_edit(rng) for rng in rngs]
        return {
            "before": torch.stack([torch.from_numpy(draw_planes(e.before, self.size)) for e in edits]),
            "after": torch.stack([torch.from_numpy(draw_planes(e.after, self.size)) for e in edits]),
            "instruction": [e.instruction for e in edits],
            "caption": [caption(e.before, rng) for e, rng in zip(edits, rngs, strict=True)],
            "edited_caption": [caption(e.after, rng) for e, rng in zip(edits, rngs, strict=True)],
        }


def new_clip(preset: Preset, tokenizer: Any) -> Any:
    """The untrained network, a CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    text = text_config(preset, tokenizer)
    vision = {
        **{
            key: text[key]
            for key in ("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim")
        },
        "num_hidden_layers": preset.clip_layers,
        "image_size": preset.clip_pixels,
        "patch_size": preset.clip_patch,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=preset.text_width))


def contrastive_loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric contrastive loss over a batch (Radford et al. 2021, figure 3)."""
    logits = scale * a @ b.T
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class ClipTask(nn.Module):
    """The contrastive loss of captions and pictures, and of instructions and changes between pictures.

    A page and its edited page are in the same batch, so each is a hard negative of the other.
    """

    def __init__(self, clip: Any, tokenizer: Any, preset: Preset) -> None:
        super().__init__()
        self.clip, self.preset, self.tokens = clip, preset, text_reader(tokenizer)

    def images(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.clip.device).float() / 255
        if x.shape[-1] != self.preset.clip_pixels:
            x = F.interpolate(x, size=self.preset.clip_pixels, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return self.clip.visual_projection(self.clip.vision_model((x - mean) / std).pooler_output).float()

    def texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokens(texts).to(self.clip.device)
        return self.clip.text_projection(self.clip.text_model(tokens).pooler_output).float()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        n = len(batch["before"])
        images = self.images(torch.cat([batch["before"], batch["after"]]))
        texts = self.texts([*batch["caption"], *batch["edited_caption"], *batch["instruction"]])
        with torch.autocast(images.device.type, enabled=False):
            scale = self.clip.logit_scale.exp().clamp(max=100)
            captions, instructions = F.normalize(texts[: 2 * n], dim=-1), F.normalize(texts[2 * n :], dim=-1)
            unit = F.normalize(images, dim=-1)
            direction = F.normalize(unit[n:] - unit[:n], dim=-1, eps=1e-4)
            image_text = contrastive_loss(unit, captions, scale)
            edit = contrastive_loss(direction, instructions, scale.detach().clamp(max=30))
            hits = ((unit @ captions.T).argmax(1).cpu() == torch.arange(2 * n)).float().mean()
        return image_text + 0.5 * edit, {"edit": float(edit.detach()), "top1": float(hits)}


def train_clip(run: Run) -> None:
    """Write `clip`. Raises OutOfTime."""
    from transformers import CLIPTextModel

    preset = run.preset
    tokenizer = load_tokenizer(run)
    torch.manual_seed(preset.seed)
    clip = use_plain_attention(new_clip(preset, tokenizer), run.device)
    # The text tower is initialized with the text encoder of the instructions.
    tower = CLIPTextModel.from_pretrained(run.output / "text_tower").state_dict()
    clip.text_model.load_state_dict({key.removeprefix("text_model."): v for key, v in tower.items()})

    def batches(first: int) -> Iterator[list[Any]]:
        pairs = EditedPages(preset.clip.batch, preset.size, preset.seed + 2, first)
        return ([batch] for batch in read_ahead(pairs, preset.workers))

    keys = ("size", "text_width", "text_layers", "clip_layers", "clip_pixels", "clip_patch")
    summary = train_stage(
        run,
        "clip",
        ClipTask(clip.to(run.device), tokenizer, preset),
        preset.clip,
        batches,
        fingerprint={key: getattr(preset, key) for key in keys},
    )
    clip.save_pretrained(run.output / "clip")
    run.finish("clip", summary)
