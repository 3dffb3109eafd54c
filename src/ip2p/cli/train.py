"""`ip2p train`: train an editor on pairs of pictures; `ip2p distill`: make an editor faster."""

from __future__ import annotations

from ip2p.training.settings import DistillConfig, TrainConfig


def run_train(config: TrainConfig) -> None:
    """Train, or resume. Prints the folder of the editor."""
    from ip2p.training.trainer import is_main_process, train  # imports torch

    output = train(config)
    if is_main_process():
        print(output)


def run_distill(config: DistillConfig) -> None:
    """Distill, or resume; the editor's folder goes to stdout."""
    from ip2p.training.distill import distill
    from ip2p.training.trainer import is_main_process

    output = distill(config)
    if is_main_process():
        print(output)
