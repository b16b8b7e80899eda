"""Which implementation digests what: by the tensors' device, prepared once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from weightbus.digest.grid61 import STABLE_SEED, Digest, P, check_seed, combine, model_digest_of
from weightbus.digest.reference import ReferenceSums
from weightbus.digest.segments import BoxCopy, why_not_written
from weightbus.errors import SpecError
from weightbus.memory.shard import Part, check_plain, plain_view, spec_of
from weightbus.memory.torch_copy import cast_on_host
from weightbus.memory.warn_once import say_once
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec
from weightbus.tensors.bucket import torch_dtype
from weightbus.tensors.layout import Source, layout_of
from weightbus.tensors.torch_dtensor import local_parts

Sums = npt.NDArray[np.uint64]


class _Sums(Protocol):
    def launch(self, seed: bytes, stream: torch.cuda.Stream | None) -> Callable[[], Sums]: ...


class Digester:
    """grid61 sums of many parts in one call; prepared once, replayed with each new seed.

    parts: any mix of dtypes, sizes, strides and devices. The storage behind them is read at each call, so it
    must stay where it is. What is ``narrowed`` is digested as what it is cast to: on CUDA while it is read, on
    the host out of a copy of one part at a time. nbytes: bytes that a call digests.
    copies: where each part is written as it is digested, by the kernel that reads it, all on one CUDA device:
    only where ``why_not_copied`` finds no reason. By default nothing is written.
    Raises ImportError where these can't be had, SpecError for a part whose tensor is not its box in its dtype,
    and for what ``check_plain`` refuses.
    """

    def __init__(self, parts: Sequence[Part], copies: Sequence[Sequence[BoxCopy]] = ()) -> None:
        checked = [_checked(part) for part in parts]
        self._count = len(checked)
        self.nbytes = sum(part.nbytes for part in checked)
        rows: dict[tuple[torch.device, bool], list[int]] = {}
        for row, part in enumerate(checked):
            on_host = part.tensor.device.type == "cpu"
            rows.setdefault((part.tensor.device, on_host and bool(part.narrowed)), []).append(row)
        # The host's last: it digests within the launch, beside what has been launched on GPUs.
        self._sums: list[tuple[npt.NDArray[np.intp], _Sums]] = []
        if copies:
            from weightbus.digest.cuda import CudaSums

            self._sums.append((np.arange(self._count), CudaSums(checked, copies)))
            return
        for device, cast in sorted(rows, key=lambda key: key[0].type == "cpu"):
            parts = [checked[row] for row in rows[device, cast]]
            sums = _CastSums(parts) if cast else _implementation(parts, device)
            self._sums.append((np.array(rows[device, cast]), sums))

    def sums(self, seed: bytes, *, stream: torch.cuda.Stream | None = None) -> Sums:
        """uint64 array of shape (parts, 2): each part's sums at its place in its global tensor, in [0, P).

        Runs on ``stream``, by default each device's current one; synchronises with it once.
        Raises ValueError if ``seed`` is not 32 bytes.
        """
        return self.launch(seed, stream=stream)()

    def launch(self, seed: bytes, *, stream: torch.cuda.Stream | None = None) -> Callable[[], Sums]:
        """As ``sums``, in two halves: the digest is on its way, and the returned function waits for it.

        It waits for this digest only, not for what the stream does after it. Call it before the next launch.
        """
        check_seed(seed)
        launched = [(rows, sums.launch(seed, stream)) for rows, sums in self._sums]

        def wait() -> Sums:
            found = np.empty((self._count, 2), dtype=np.uint64)
            for rows, result in launched:
                found[rows] = result()
            return found

        return wait


def tensor_digest(tensor: Tensor, *, seed: bytes = STABLE_SEED) -> Digest:
    """grid61 digest of ``tensor``'s bytes; equal on CPU and CUDA (docs/digest.md).

    tensor: any dtype, strides and shape, 0-d and empty included. A DTensor gives its own shard's
        part of the global sum; ``combine`` adds the parts.
    Runs on the current stream; synchronises once, to return integers.
    Raises ValueError if ``seed`` is not 32 bytes.
    """
    check_seed(seed)
    parts = local_parts("tensor", tensor)
    return _digest(spec_of("tensor", tensor), parts, Digester(parts).sums(seed), seed)


def model_digest(model: Source, *, seed: bytes = STABLE_SEED) -> str:
    """SHA-256 text over the names, dtypes, shapes and digests of a model's tensors (docs/digest.md).

    Persistent buffers are included; a tied tensor counts once, under the least of its names. Each tensor
    must be whole on this rank: for a sharded model, ``combine`` the ranks' digests by name and give them
    to ``model_digest_of``. Raises SpecError for a duplicate name, CoverageError for a shard.
    """
    check_seed(seed)
    digests: dict[str, list[Digest]] = {}
    parts = list(chain.from_iterable(layout_of(model).parts.values()))
    for part, row in zip(parts, Digester(parts).sums(seed), strict=True):
        digest = _digest(part.spec, [part], row[None], seed)
        digests.setdefault(part.spec.name, []).append(digest)
    return model_digest_of({name: combine(found) for name, found in digests.items()}, seed=seed)


def sub_part(part: Part, box: Box) -> Part | None:
    """The piece of ``part`` that lies in ``box`` of the global tensor, or None: to narrow a mismatch."""
    common = part.box.intersect(box)
    if common is None:
        return None
    return Part(spec=part.spec, box=common, tensor=part.tensor[common.within(part.box)])


def why_not_copied(part: Part, copies: Sequence[BoxCopy]) -> str:
    """Why the kernel that digests ``part`` can't write it as it reads it; empty if it can.

    copies: boxes of the part, each with the tensor that takes it.
    """
    device = part.tensor.device
    if device.type != "cuda" or any(dst.device != device for _, dst in copies):
        return "both do not lie on one CUDA device"
    if any(str(dst.dtype) != f"torch.{part.spec.dtype}" for _, dst in copies):
        return "it is written in another dtype than it is digested"
    return why_not_written(part, copies) or _why_no_kernel(device)


@cache
def _why_no_kernel(device: torch.device) -> str:
    try:
        from weightbus.digest.cuda import grid61_kernels

        with torch.cuda.device(device):
            grid61_kernels()
    except ImportError as error:
        return f"no kernel: {error}"
    return ""


def _digest(spec: Spec, parts: Sequence[Part], rows: npt.NDArray[np.uint64], seed: bytes) -> Digest:
    lane0, lane1 = (sum(lane) % P for lane in zip(*rows.tolist(), strict=True)) if len(rows) else (0, 0)
    return Digest(
        sums=(lane0, lane1),
        dtype=spec.dtype,
        shape=spec.shape,
        boxes=tuple(part.box for part in parts),
        seed=seed,
    )


def _checked(part: Part) -> Part:
    spec, tensor = part.spec, part.tensor
    check_plain(spec.name, tensor)
    same = str(tensor.dtype) == f"torch.{spec.dtype}" or part.narrowed
    if not same or tuple(tensor.shape) != part.box.sizes:
        raise SpecError(
            f"{spec.name}: expected a {spec.dtype} view of box {part.box}, "
            f"got {tensor.dtype} {list(tensor.shape)}; digest"
        )
    if not part.box.inside(spec.shape):
        raise SpecError(f"{spec.name}: expected a box in shape {list(spec.shape)}, got {part.box}; digest")
    return replace(part, tensor=plain_view(tensor))


class _CastSums:
    """Sums of parts in host memory that are cast first, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    def launch(self, seed: bytes, stream: torch.cuda.Stream | None) -> Callable[[], Sums]:
        found = np.empty((len(self._parts), 2), dtype=np.uint64)
        for row, part in enumerate(self._parts):
            cast = replace(part, tensor=cast_on_host(part.tensor, torch_dtype(part.spec.dtype)))
            found[row : row + 1] = _implementation([cast], cast.tensor.device).launch(seed, stream)()
        return lambda: found


def _implementation(parts: list[Part], device: torch.device) -> _Sums:
    try:
        if device.type == "cpu":
            from weightbus.digest.cpu import CpuSums

            return CpuSums(parts)
        if device.type == "cuda":
            from weightbus.digest.cuda import CudaSums

            return CudaSums(parts)
        _warn(f"no fast digest for device type {device.type}")
    except ImportError as error:
        cure = (
            "install weightbus where a C++17 compiler is found"
            if device.type == "cpu"
            else f"pip install 'weightbus[cuda{(torch.version.cuda or '13').split('.')[0]}]'"
        )
        _warn(f"no fast digest on {device.type} ({error}); cure: {cure}")
    except NotImplementedError as error:
        _warn(f"no fast digest for these tensors ({error})")
    return ReferenceSums(parts)


def _warn(reason: str) -> None:
    say_once(f"weightbus digests with torch operations, exact but slower: {reason}")
