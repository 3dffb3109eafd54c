"""`ip2p train`: train an editor on pairs of pictures."""

from __future__ import annotations

from ip2p.training.settings import TrainConfig


def run_train(config: TrainConfig) -> None:
    """Train, or resume. Prints the folder of the editor."""
    from ip2p.training.trainer import is_main_process, train  # imports torch

    output = train(config)
    if is_main_process():
        print(output)
