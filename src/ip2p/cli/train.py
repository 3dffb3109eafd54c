"""`ip2p train`: an editor from pairs of pictures."""

from __future__ import annotations

from ip2p.training.settings import TrainConfig


def train(config: TrainConfig) -> None:
    """Train, or resume; the editor's folder goes to stdout."""
    from ip2p.training.trainer import train as train_editor  # imports torch

    train_editor(config)
