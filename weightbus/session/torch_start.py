"""What the ranks of one start of a training job share, and those of no other do."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets

import torch.distributed as dist

_KEY = "weightbus/start"

# Of a launcher: the run, and which try at it this is. Without the first of each line, the others say nothing.
_LAUNCHERS = (
    ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("PMIX_NAMESPACE",),
    ("LSB_JOBID", "LSB_JOBINDEX"),
    ("PBS_JOBID",),
)


def start_token() -> str:
    """Equal on all trainer ranks of one start: of the default process group's store, else of the launcher's
    variables; empty where there is neither, and only the places tell starts apart. Waits for no other rank.
    """
    return _of_default_group() or _of_launcher()


def _of_default_group() -> str:
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(Exception):  # stores for tests keep nothing, a lost one nothing any more
            store = dist.distributed_c10d._get_default_store()
            return bytes(store.compare_set(_KEY, "", secrets.token_hex(16))).decode()[:64]
    return ""


def _of_launcher() -> str:
    for names in _LAUNCHERS:
        values = [os.environ.get(name, "") for name in names]
        if values[0]:
            return hashlib.sha256("\0".join([names[0], *values]).encode()).hexdigest()[:32]
    return ""
