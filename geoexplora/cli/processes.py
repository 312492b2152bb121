"""Which of several processes this is, before torch is there to ask. Torch-free."""

from __future__ import annotations

import os

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Set by torchrun, by Lightning and by Slurm in the processes that they start."""


def is_first_process() -> bool:
    """Whether the user started this process, or a launcher did and it is the first."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
