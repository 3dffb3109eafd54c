"""Stages `perception`, `unet` and `decay`: one editing network, three runs of the training loop.

1. `perception` trains the recognition of the page and of the requested change, at full noise (`perception`).
2. `unet` trains the edit itself at all noise levels with a constant learning rate. It can be extended.
3. `decay` continues from the newest state of `unet` with a decreasing learning rate, and writes the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ip2p.training.checkpoints import Checkpoints
from ip2p.training.loss import Shares, scaled_linear_alpha_bar
from ip2p.training.objective import EditTask, Objective
from ip2p.training.storybook.autoencoder import channel_weights, skip_identities
from ip2p.training.storybook.data import LOOSE_SHARE, World
from ip2p.training.storybook.perception import FIELDS, Perception, change_iou, named_right
from ip2p.training.storybook.presets import Preset, StageConfig
from ip2p.training.storybook.samples import EditorSamples, LatentShards, Pool, draw_step
from ip2p.training.storybook.stage import Run, train_stage
from ip2p.training.storybook.text import load_tokenizer, text_reader, use_plain_attention
from ip2p_storybook.edits import EDIT_KINDS, GLOBAL_KINDS

NO_DROPOUT = Shares(text=0.0, image=0.0, both=0.0)


def new_unet(preset: Preset) -> Any:
    """The untrained UNet, a diffusers UNet2DConditionModel with twice the latent channels as input."""
    from diffusers import UNet2DConditionModel

    levels = len(preset.unet_channels)
    top = "CrossAttnUpBlock2D" if preset.fine_attention else "UpBlock2D"
    return UNet2DConditionModel(
        sample_size=preset.cells,
        in_channels=2 * preset.latent_channels,
        out_channels=preset.latent_channels,
        # Attention is most expensive on the finest level, so it is used only in the up blocks, if at all.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), top),
        block_out_channels=preset.unet_channels,
        layers_per_block=preset.unet_layers,
        cross_attention_dim=preset.text_width,
        attention_head_dim=preset.heads,  # diffusers' name for the number of heads
        norm_num_groups=preset.unet_groups,
    )


@torch.no_grad()
def start_as_copy(unet: Any) -> None:
    """Initialize a UNet that predicts x0 to return its image condition, for any noise and text.

    An edit leaves most of the page unchanged, and a randomly initialized network needs most of its samples to
    learn that. Half of the first convolution's channels are set to the image condition c and to -c, with
    constants next to them. The last skip connection passes them to the output, where the constants fix the
    scale of the normalization and SiLU(c) - SiLU(-c) = c. The other half is initialized as usual.
    """
    latents, width, groups = (
        unet.config.out_channels,
        unet.conv_in.out_channels,
        unet.conv_norm_out.num_groups,
    )
    size = width // groups  # channels that are normalized together
    # A group of copies holds as many constants as components with their opposites, or more.
    each = max((n for n in range(1, size // 4 + 1) if latents % n == 0), default=0)
    if not each or size % 2 or 2 * (latents // each) > groups:
        raise ValueError(f"{groups} groups of {size} channels cannot hold {latents} latent channels")
    place = torch.arange(latents)
    plus = place // each * size + place % each  # the channel of c; that of -c is `each` further
    copies = torch.arange(latents // each * size)
    constants = copies[copies % size >= 2 * each]
    level = 6.0
    scale = ((level**2 * (size - 2 * each) + 2 * each) / size) ** 0.5  # for components of unit variance

    first, end = unet.conv_in, unet.up_blocks[-1]
    block = end.resnets[-1]
    first.weight[copies], first.bias[copies] = 0, 0
    first.weight[plus, latents + place, 1, 1] = 1
    first.weight[plus + each, latents + place, 1, 1] = -1
    first.bias[constants] = level * (1 - 2.0 * (constants % 2))

    skip = block.in_channels - width  # the skip connection follows the hidden channels
    block.conv_shortcut.weight[copies], block.conv_shortcut.bias[copies] = 0, 0
    block.conv_shortcut.weight[copies, skip + copies] = 1
    branches = [block.conv2, *(attention.proj_out for attention in getattr(end, "attentions", [])[-1:])]
    for branch in branches:
        branch.weight[copies], branch.bias[copies] = 0, 0

    unet.conv_norm_out.weight[copies] = scale
    out = unet.conv_out
    out.weight.zero_()
    out.bias.zero_()
    out.weight[place, plus, 1, 1], out.weight[place, plus + each, 1, 1] = 1, -1


@dataclass
class EditorParts:
    """Shared by the three stages: the task, and the networks that its samples need."""

    task: EditTask
    heads: Perception
    objective: Objective
    vae: Any
    tokens: Callable[[list[str]], Tensor]


def build_parts(run: Run) -> EditorParts:
    """Load the networks of earlier stages and create the UNet, or load that of `--start`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel

    preset, device = run.preset, run.device
    vae = AutoencoderKL.from_pretrained(run.output / "vae").to(device).eval().requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    skip_identities(vae.encoder)
    text_encoder = CLIPTextModel.from_pretrained(run.output / "text_tower")
    use_plain_attention(text_encoder, device)
    torch.manual_seed(preset.seed)
    start = run.output / "start" / "unet"
    if start.exists():
        unet = UNet2DConditionModel.from_pretrained(start)
    else:
        unet = new_unet(preset)
        if preset.prediction == "sample":
            start_as_copy(unet)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # trains faster there, as in `use_plain_attention`
    heads = Perception(unet, preset.text_width)
    unet.to(device, memory_format=run.numerics.memory_format)
    objective = Objective(
        prediction=preset.prediction,
        snr_clip=preset.snr_clip,
        timestep_power=preset.timestep_power,
        change_share=preset.change_share,
        change_weight_most=preset.change_weight_most,
        caption_share=preset.caption_share,
    )
    task = EditTask(
        unet,
        scaled_linear_alpha_bar(),
        objective,
        latent_scale=vae.config.scaling_factor,
        text_encoder=text_encoder.to(device),
        aside=heads,
        channel_weights=channel_weights(vae, preset),
    ).to(device)
    return EditorParts(task, heads, objective, vae, text_reader(load_tokenizer(run)))


def latent_shards(run: Run, parts: EditorParts, *, validation: bool = False) -> LatentShards:
    """The shards of the training pages, or of validation pages."""
    preset = run.preset
    world = World(
        size=preset.size,
        cells=preset.cells,
        seed=preset.seed + (100 if validation else run.seed_shift),
        groups=preset.groups,
        edits=preset.edits,
        often={} if validation else dict(preset.often),
        loose=0.0 if validation else LOOSE_SHARE,
    )
    return LatentShards(
        world,
        run.output / "latents",
        parts.vae,
        parts.tokens,
        workers=0 if validation else preset.workers,
        precision=run.numerics.precision,
    )


def _train(
    run: Run,
    parts: EditorParts,
    stage: str,
    config: StageConfig,
    *,
    full_noise: bool,
    weight: Callable[[int], float],
    steps_before: int = 0,
    after: str | None = None,
    fingerprint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on pages that were not used in `steps_before` steps of earlier stages."""
    preset = run.preset
    samples = EditorSamples(
        latent_shards(run, parts),
        preset.pool,
        parts.objective,
        batch=config.batch,
        seed=preset.seed + steps_before,
        device=run.device,
        full_noise=full_noise,
        weight=weight,
        steps_before=steps_before,
    )
    keys = ("size", "unet_channels", "unet_layers", "fine_attention", "heads", "text_width", "text_layers")
    mine = {key: getattr(preset, key) for key in (*keys, "prediction", "latent_channels")}
    return train_stage(
        run,
        stage,
        parts.task,
        config,
        samples,
        fingerprint={**mine, **(fingerprint or {})},
        after=after,
        optimizer="muon",
    )


# --- perception -------------------------------------------------------------------------------------


def train_perception(run: Run) -> None:
    """Train until the gates are passed, for at most `perception_most` minutes. Raises OutOfTime."""
    preset = run.preset
    parts = build_parts(run)
    minutes = preset.perception.minutes
    while True:
        config = replace(preset.perception, minutes=minutes)
        summary = _train(run, parts, "perception", config, full_noise=True, weight=lambda step: 1.0)
        measured = measure_perception(run, parts)
        missed = missed_gates(preset, measured)
        if not missed or minutes >= preset.perception_most:
            break
        minutes = min(preset.perception_most, minutes + preset.perception.minutes / 4)
        run.log(f"perception: {'; '.join(missed)}; training to {minutes:g} minutes")
    if missed:
        run.log(
            f"perception: {'; '.join(missed)} after {minutes:g} minutes. Training continues, but edits of "
            "things that it does not recognize will fail"
        )
    run.finish("perception", {**summary, "measured": measured, "missed": missed})


def missed_gates(preset: Preset, measured: dict[str, float]) -> list[str]:
    """Messages for the `Preset.gates` that were not reached."""
    return [
        f"{name} is {measured[name]:.1%}, below {least:.0%}"
        for name, least in preset.gates.items()
        if measured[name] < least
    ]


@torch.no_grad()
def measure_perception(run: Run, parts: EditorParts, count: int = 512) -> dict[str, float]:
    """The accuracy for the kind, color, … of things, and the IoU of changed cells, on new pages.

    `change` is the IoU for edits of things, `change_page` for edits of the whole page.
    """
    shards = latent_shards(run, parts, validation=True)
    shards.make([0], then=[])
    pool = Pool([shards.read(0)], run.device)
    generator = torch.Generator(run.device).manual_seed(0)
    rows = torch.randperm(len(pool.before), generator=generator, device=run.device)[:count]
    shape, empty = tuple(pool.pages["latents"].shape[1:]), parts.tokens([""]).to(run.device)
    plain = replace(parts.objective, shares=NO_DROPOUT, caption_share=0.0)
    totals = dict.fromkeys(FIELDS, (0, 0))
    changes: dict[bool, list[Tensor]] = {True: [], False: []}
    of_page = torch.tensor([kind in GLOBAL_KINDS for kind in EDIT_KINDS], device=run.device)
    was_training = parts.task.training
    parts.task.eval()
    for some in rows.split(64):
        draws = draw_step(len(some), shape, plain, generator, full_noise=True)
        batch = pool.batch(some, draws, torch.zeros_like(some), empty)
        parts.task.predict(batch)
        seen = parts.heads.see()
        assert batch.labels is not None and batch.changed is not None
        for name, part in named_right(
            seen.before, batch.labels["before_cells"], batch.labels["before_things"]
        ).items():
            totals[name] = totals[name][0] + part[0], totals[name][1] + part[1]
        both = torch.stack([seen.changed.float(), batch.changed[:, 0]], dim=1).cpu()
        whole = of_page[pool.pairs["kind"][some]].cpu()
        for key in changes:
            changes[key].append(both[whole == key])
    parts.task.train(was_training)
    measured = {name: right / max(1, of) for name, (right, of) in totals.items()}
    for name, key in (("change", False), ("change_page", True)):
        logits, changed = torch.cat(changes[key]).unbind(1)
        measured[name] = change_iou(logits, changed > 0)
    run.log("perception: " + ", ".join(f"{name} {value:.1%}" for name, value in measured.items()))
    return {name: round(value, 4) for name, value in measured.items()}


# --- editing ------------------------------------------------------------------------------------


def head_weight(preset: Preset, batch: int) -> Callable[[int], float]:
    """The weight of the perception heads' loss, which halves every `head_half_life` samples."""
    return lambda step: max(
        preset.head_weight_least, preset.head_weight * 0.5 ** (step * batch / preset.head_half_life)
    )


def train_unet(run: Run) -> None:
    """Train the edit at a constant learning rate. Raises OutOfTime."""
    preset = run.preset
    parts = build_parts(run)
    seen = run.summary("perception").get("steps", 0)
    summary = _train(
        run,
        parts,
        "unet",
        preset.unet,
        full_noise=False,
        weight=head_weight(preset, preset.unet.batch),
        steps_before=seen,
        after="perception" if seen else None,
    )
    run.finish("unet", summary)


def train_decay(run: Run) -> None:
    """Train a copy of the newest `unet` state with a decreasing learning rate; write the two networks.

    Raises OutOfTime.
    """
    preset = run.preset
    state = Checkpoints(run.state_dir / "unet").load()
    steps = 0 if state is None else int(state["step"])
    samples = steps * preset.unet.batch
    del state
    parts = build_parts(run)
    least = head_weight(preset, preset.unet.batch)(steps)
    summary = _train(
        run,
        parts,
        run.restart_after("decay", steps),
        preset.decay,
        full_noise=False,
        weight=lambda step: least,
        steps_before=run.summary("perception").get("steps", 0) + steps,
        after="unet",
        fingerprint={"steps_before": steps},
    )
    unet = parts.task.unet.to(memory_format=torch.contiguous_format)
    unet.save_pretrained(run.output / "unet", max_shard_size="15MB")
    parts.task.text_encoder.save_pretrained(run.output / "text_encoder")
    run.finish("decay", {**summary, "steps_before": steps, "samples_before": samples})
