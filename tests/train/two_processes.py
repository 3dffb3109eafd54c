"""One of two training processes; started by test_reference.py through torchrun."""

import os
import sys
from pathlib import Path

import torch
from test_reference import ours

from ip2p.training.samples import Share

if __name__ == "__main__":
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    losses, weights, _, _ = ours(folder, work, Share(batch=32, micro=16), steps=4, number=torch.float64)
    if os.environ["RANK"] == "0":
        results = {"losses": losses, "weights": weights, "world": int(os.environ["WORLD_SIZE"])}
        torch.save(results, work / "two.pt")
