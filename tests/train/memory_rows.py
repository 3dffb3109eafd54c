"""In-memory rows, and child processes that may be killed.

Not a conftest.py: `from conftest import ...` would find it instead of tests/conftest.py.
"""

import os
import traceback
from collections.abc import Callable

import numpy as np
import torch

from ip2p.data.records import BrokenRow, Pair


class Rows:
    """A source of `count` small pictures in memory; `on_read(row)` is called on every read."""

    name, endless = "rows", False

    def __init__(self, count: int, *, side: int = 32, broken=(), same=False, on_read=None, labels=False):
        self.count, self.side, self.broken, self.same = count, side, set(broken), same
        self.on_read, self.labels = on_read, labels
        self.key = f"rows {count} {side} {sorted(self.broken)} {same}"

    def __len__(self) -> int:
        return self.count

    def blocks(self) -> list[range]:
        return [range(self.count)]

    def __getitem__(self, row: int) -> Pair:
        if self.on_read is not None:
            self.on_read(row)
        if row in self.broken:
            raise BrokenRow(f"row {row}", "it is broken on purpose")
        rng = np.random.default_rng(row)
        before, after = rng.integers(0, 256, (2, self.side, self.side, 3), np.uint8)
        return Pair(
            id=f"row {row}",
            before=before,
            after=before if self.same else after,
            instruction=f"make it {row % 3}",
            caption=f"page {row}",
            edited_caption=f"page {row}, changed",
            labels={"edit": np.array([row, row % 3])} if self.labels else {},
        )


class Child:
    """A forked process that runs `work`: it has the parent's modules, so it starts at once."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        try:
            torch.set_num_threads(1)  # a thread pool does not survive a fork
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def end(self) -> int:
        """Wait for its exit: 0 on success, minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
