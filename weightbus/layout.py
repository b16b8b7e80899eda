"""Where a rank's tensors lie: each one's spec, and the local view behind each of its boxes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weightbus.box import Box
from weightbus.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One box of a tensor, where it lies on this rank.

    tensor: plain view of the local storage, any strides, ``tensor.shape == box.sizes``; its dtype is
    ``spec.dtype``, and ``spec.shape`` is the global shape.
    """

    spec: Spec
    box: Box
    tensor: Tensor
