"""Many copies in few kernel launches. torch's private name here: ``_foreach_copy_``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """``dst[i].copy_(src[i])`` for all i, casting where dtypes differ; overlaps nothing, records no grad."""
    with torch.no_grad():
        if len(dst) == 1:
            dst[0].copy_(src[0], non_blocking=True)
        else:
            torch._foreach_copy_(list(dst), list(src), non_blocking=True)
