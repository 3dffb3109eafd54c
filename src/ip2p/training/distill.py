"""`ip2p distill`: an editor that needs one pass per step instead of three, and 4 steps instead of 20.

The student is the teacher's UNet with the two guidance scales as an additional input. In the stage `guidance`
it learns to predict in one pass what equation 3 combines from three (Meng et al. 2023, "On distillation of
guided diffusion models"). In `few-steps` it learns to predict, from every noise level, the end of the
teacher's guided path (Luo et al. 2023, "Latent consistency models"). Data, loop, checkpoints and output are
those of `train`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ip2p.base.errors import InputError
from ip2p.diffusion.guidance import embed_scales, guide
from ip2p.diffusion.schedule import alpha_bar_from_config
from ip2p.models.bundle import RECOMMENDED, Bundle, Card
from ip2p.models.text import encode_prompts
from ip2p.models.widen import add_scales_input
from ip2p.training.loss import add_noise, pseudo_huber_loss, split_noisy
from ip2p.training.objective import EditBatch, EditTask, Objective
from ip2p.training.settings import DistillConfig, TrainConfig
from ip2p.training.trainer import Recipe, load_pretrained, shares_of, start

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ip2p.training.arguments import DistillArguments

RANGES = {"text_cfg": (1.0, 12.0), "image_cfg": (1.0, 2.5)}
STEPS = 4  # recommended steps of a few-step model
LEVELS = 50  # noise levels of a few-step model, `schedule.lcm_sigmas`


def distill(config: DistillConfig | None = None, **changes: Unpack[DistillArguments]) -> Path:
    """Distill an editor, or resume, and return its folder. config, changes: see `DistillConfig`.

    `distill(model="timbrooks/instruct-pix2pix", data="pairs", output="fast", steps=1000)`. Raises InputError,
    ModelError and ResourceError.
    """
    return start((config or DistillConfig()).changed(**changes), Distillation)


class DistillTask(EditTask):
    """A UNet that takes the guidance scales, and its teacher.

    teacher: a UNet without scales, which needs three passes, or one with scales, which needs one. null: the
    encoded empty text, one row, by the names of `EditBatch`. ranges: minimum and maximum of the text and the
    image scale, [2, 2]. usual: the scales in validations, [2]. The rest is as in `EditTask`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        alpha_bar: Tensor,
        objective: Objective,
        *,
        null: Mapping[str, Tensor],
        ranges: Tensor,
        usual: Tensor,
        few_steps: bool,
        latent_scale: float,
        condition_scale: float = 1.0,
    ) -> None:
        super().__init__(
            student, alpha_bar, objective, latent_scale=latent_scale, condition_scale=condition_scale
        )
        self.teacher, self.few_steps = teacher, few_steps
        self.null, self.ranges, self.usual = null, ranges, usual

    def train(self, mode: bool = True) -> DistillTask:
        super().train(mode)
        self.teacher.eval()
        return self

    def predict(self, batch: EditBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's prediction, its target, the samples' alpha_bar, and the text's hidden states.

        guidance: noise or velocity. few-steps: x0 at a noise level; its target is the student's own x0 at the
        next lower one of the `LEVELS`, after one step of the teacher (algorithm 1 of Luo et al. 2023).
        """
        draws = batch.draws
        clean, image = self.latents(batch)
        text = {name: value for name in self.null if (value := getattr(batch, name)) is not None}
        scales = self._scales(draws.scales, len(clean))
        times, gap = draws.timesteps, len(self.alpha_bar) // LEVELS
        if self.few_steps:
            times = times // gap * gap + gap - 1
        a = self.alpha_bar[times]
        x = add_noise(clean, draws.noise, a)
        predicted = self._predict(self.unet, x, image, times, text, scales)
        with torch.no_grad():
            target = self.guided(x, image, times, text, scales)
            if self.few_steps:
                x0, noise = self._split(x, target, a)
                later = (times - gap).clamp(min=0)
                b = self.alpha_bar[later]
                x_later = add_noise(x0, noise, b)
                at_later = self._predict(self.unet, x_later, image, later, text, scales)
                ended = (times < gap)[:, None, None, None]
                target = torch.where(ended, x0, self._split(x_later, at_later, b)[0])
        if self.few_steps:
            predicted, _ = self._split(x, predicted, a)
        return predicted, target, a, batch.text

    def guided(
        self, x: Tensor, image: Tensor, times: Tensor, text: Mapping[str, Tensor], scales: Tensor
    ) -> Tensor:
        """The teacher's prediction by equation 3; scales: (s_T, s_I) of each sample, [batch, 2]."""
        if self.teacher.config.time_cond_proj_dim:
            return self._predict(self.teacher, x, image, times, text, scales)
        null = {name: self.null[name].to(x).expand_as(value) for name, value in text.items()}
        output = self._predict(
            self.teacher,
            x.repeat(3, 1, 1, 1),
            torch.cat([image, image, torch.zeros_like(image)]),
            times.repeat(3),
            {name: torch.cat([value, null[name], null[name]]) for name, value in text.items()},
            None,
        )
        s_text, s_image = scales[:, :, None, None, None].unbind(1)
        return guide(*output.split(len(x)), text=s_text, image=s_image)

    def _predict(
        self,
        unet: Any,
        x: Tensor,
        image: Tensor,
        times: Tensor,
        text: Mapping[str, Tensor],
        scales: Tensor | None,
    ) -> Tensor:
        conditions: dict[str, Any] = {}
        if "pooled" in text:
            conditions["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
        if scales is not None:
            conditions["timestep_cond"] = embed_scales(scales, unet.config.time_cond_proj_dim)
        inputs = torch.cat([x, image], dim=1)
        output: Tensor = unet(inputs, times, text["text"], return_dict=False, **conditions)[0]
        return output.float()

    def _scales(self, uniform: Tensor | None, count: int) -> Tensor:
        device = self.alpha_bar.device
        if uniform is None:
            return self.usual.to(device).expand(count, 2)
        low, high = self.ranges.to(device).unbind(1)
        return low + (high - low) * uniform

    def _split(self, x: Tensor, predicted: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return split_noisy(x, predicted, a, self.objective.prediction)

    def _loss(
        self, batch: EditBatch, predicted: Tensor, target: Tensor, a: Tensor, context: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        if self.few_steps:
            return pseudo_huber_loss(predicted, target), {}
        return super()._loss(batch, predicted, target, a, context)


class Distillation(Recipe):
    """The steps of `train` that differ for a distillation. `open` loads the teacher."""

    name = "distill"
    teacher: Any = None

    def open(self, config: TrainConfig, device: torch.device) -> Bundle:
        assert isinstance(config, DistillConfig)
        bundle = load_pretrained(config, device)
        if bundle.widened:
            raise InputError(
                f"{config.base} is not an editor: its UNet takes no input picture. Train it first: "
                f"ip2p train --base {config.base}"
            )
        self.teacher = bundle.unet.requires_grad_(False).eval()
        # A LoRA does not change the weights, so both can share them.
        shared = list(self.teacher.parameters()) if config.lora is not None else []
        student = copy.deepcopy(self.teacher, {id(weight): weight for weight in shared})
        if not self.teacher.config.time_cond_proj_dim:
            add_scales_input(student)
        if config.lora is None:
            student.requires_grad_(True)
        return replace(bundle, unet=student, card=_card(config, bundle.card))

    def objective(self, config: TrainConfig, prediction: str) -> Objective:
        # The truncated SNR of Salimans and Ho (2022), as in Meng et al. Without it, the noisiest levels,
        # which determine the edit, have little weight. The error of a predicted x0 does not shrink with the
        # noise as that of a predicted noise does, so the least noisy levels would determine its loss.
        most = 5.0 if prediction == "sample" else math.inf
        return Objective(prediction=prediction, shares=shares_of(config), snr_clip=(1.0, most))

    def task(
        self, config: TrainConfig, bundle: Bundle, objective: Objective, size: tuple[int, int]
    ) -> EditTask:
        assert isinstance(config, DistillConfig)
        card = bundle.card
        assert card.text_cfg_range is not None and card.image_cfg_range is not None
        if config.lora is not None:
            bundle.unet.time_embedding.cond_proj.requires_grad_(True)  # it is new, or too small for a LoRA
        if self.teacher.device.type == "cuda":
            self.teacher.to(memory_format=torch.channels_last)
        with torch.no_grad():
            null = encode_prompts(bundle, [""], size)
        named = {"text": null.hidden, "pooled": null.pooled, "time_ids": null.time_ids}
        return DistillTask(
            bundle.unet,
            self.teacher,
            alpha_bar_from_config(bundle.scheduler_config),
            objective,
            null={name: value for name, value in named.items() if value is not None},
            ranges=torch.tensor([card.text_cfg_range, card.image_cfg_range]),
            usual=torch.tensor([card.text_cfg, card.image_cfg]),
            few_steps=config.stage == "few-steps",
            latent_scale=bundle.latent_scale,
            condition_scale=bundle.condition_scale,
        )

    def validation_steps(self, config: TrainConfig) -> int:
        assert isinstance(config, DistillConfig)
        return STEPS if config.stage == "few-steps" else config.validate_steps

    def notes(self, bundle: Bundle) -> str:
        card = bundle.card
        assert card.text_cfg_range is not None and card.image_cfg_range is not None
        (a, b), (c, d) = card.text_cfg_range, card.image_cfg_range
        return (
            f"One pass of the network per step, for text CFG {a:g} to {b:g} and image CFG {c:g} to {d:g}, "
            f"without a negative prompt. Recommended: {card.steps} steps, sampler `{card.sampler}`."
        )


def _card(config: DistillConfig, card: Card) -> Card:
    """The card with the ranges and, for few steps, the sampling. Raises InputError for unusable ranges."""
    changes: dict[str, Any] = {}
    for name, requested in (("text_cfg", config.text_range), ("image_cfg", config.image_range)):
        known = getattr(card, f"{name}_range")
        low, high = requested or known or RANGES[name]
        usual, flag = getattr(card, name), f"--{name.removesuffix('_cfg')}-range"
        if known is not None and not known[0] <= low < high <= known[1]:
            raise InputError(
                f"{flag} {low:g} {high:g}: {config.base} was distilled for {known[0]:g} to {known[1]:g}. Use "
                "a range within it, or distill the original model."
            )
        if not low <= usual <= high:
            raise InputError(
                f"{flag} {low:g} {high:g} does not contain {usual:g}, which {config.base} recommends. "
                f"Try {flag} {min(low, usual):g} {max(high, usual):g}."
            )
        changes[f"{name}_range"] = (low, high)
    few = config.stage == "few-steps"
    if few:
        changes |= {"steps": STEPS, "sampler": "lcm", "schedule": "lcm"}
    card = replace(card, **changes)
    if few or not card.allows_interval:  # few-step students learn guidance at all noise levels
        card = replace(card, cfg_interval=RECOMMENDED["cfg_interval"])
    return card
