"""SHA-256 of tensors and modules, as SGLang's diffusion server computes it.

For ``/update_weights_from_tensor_checker`` that server hashes each parameter or buffer that a request names:
the text of its torch dtype, the text of its shape as a tuple, then its bytes, row-major; of a DTensor these are
the local tensor's. Where ranks hold shards, it also tries the digest of their concatenation. For
``/get_weights_checksum`` it makes one hash for each module: its parameters in the order of their names, each as
name and bytes, without buffers, dtypes or shapes; a tied parameter stands once, under the first of its names.

SHA-256 is for comparing with others. Ranks of one job are compared sooner by grid61 (docs/digest.md).
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor, nn

from weightbus.memory.host_bytes import HostBytes
from weightbus.memory.shard import check_plain, plain_view, spec_of
from weightbus.tensors.layout import Source, named_tensors
from weightbus.tensors.torch_dtensor import local_tensor

MAX_THREADS = 16


def tensor_sha256(tensor: Tensor) -> str:
    """Hexadecimal SHA-256 of what this rank holds of ``tensor``: ``str(dtype) || repr(tuple(shape)) || bytes``.

    tensor: any dtype, strides, shape and device; of a DTensor it is the local tensor, and its shape.
    Raises SpecError for tensors without bytes of their own (meta, sparse, lazily conjugated).
    """
    return local_sha256s({"tensor": tensor})["tensor"]


def named_sha256(source: Source, *, threads: int | None = None) -> dict[str, str]:
    """``tensor_sha256`` of each parameter and persistent buffer: a manifest that SGLang's checker accepts.

    source: a module, a mapping of modules (names ``module.tensor``), in which a tied tensor stands under the
        first of its names, as in ``named_parameters``; or (name, tensor) pairs, all of which stand.
    threads: by default one for each core, at most MAX_THREADS. On CUDA each has three pinned buffers of 4 MiB.
    Talks to no other rank. Puts FSDP2 modules back to their sharded parameters.
    """
    return local_sha256s(manifest_tensors(source), threads=threads)


def module_sha256(module: nn.Module | Iterable[tuple[str, Tensor]]) -> str:
    """Hexadecimal SHA-256 over ``name || bytes`` of what this rank holds, in order of names.

    module: its parameters count, not its buffers, and a tied one once, under the first of its names; or
        (name, tensor) pairs, all of which count, as ``model.state_dict().items()``.
    Runs in this thread, while the next bytes are copied from the device.
    """
    tensors = manifest_tensors(module)
    if isinstance(module, nn.Module):
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    names = sorted(tensors)
    hasher, begun = hashlib.sha256(), -1
    for index, data in HostBytes([local_plain(name, tensors[name]) for name in names]):
        if index != begun:
            begun = index
            hasher.update(names[index].encode())
        hasher.update(data)
    return hasher.hexdigest()


def manifest_tensors(source: Source) -> dict[str, Tensor]:
    """What a manifest of ``source`` names: a module's tied tensor once, by identity, under its first name."""
    pairs = not isinstance(source, nn.Module | Mapping)
    first: dict[object, tuple[str, Tensor]] = {}
    for name, tensor in named_tensors(source).items():
        first.setdefault(name if pairs else id(tensor), (name, tensor))
    return dict(first.values())


def local_plain(name: str, tensor: Tensor) -> Tensor:
    """The local tensor behind a parameter, as a base-class tensor. Raises SpecError if it can't be read."""
    spec_of(name, tensor)
    local = local_tensor(tensor)
    check_plain(name, local)
    return plain_view(local)


def local_sha256s(tensors: Mapping[str, Tensor], *, threads: int | None = None) -> dict[str, str]:
    """``tensor_sha256`` of each tensor, in the mapping's order; one under several names is read once."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    once = [names[0] for names in names_of.values()]
    local = {name: local_plain(name, tensors[name]) for name in once}
    if threads is None:
        threads = min(MAX_THREADS, _cores())
    shares = _shares([(name, local[name].nbytes) for name in once], threads)
    readers = [HostBytes([local[name] for name in share]) for share in shares]
    found: dict[str, str] = {}
    with ThreadPoolExecutor(max(1, len(shares)), "weightbus-sha256") as pool:
        tasks = pool.map(_hashed, readers, ([local[name] for name in share] for share in shares))
        for share, digests in zip(shares, tasks, strict=True):
            found.update(zip(share, digests, strict=True))
    return {name: found[names_of[id(tensor)][0]] for name, tensor in tensors.items()}


def header(dtype: str, shape: Sequence[int]) -> bytes:
    """What a tensor's hash begins with. dtype: torch's name without ``torch.``."""
    return f"torch.{dtype}{tuple(shape)!r}".encode()


def _hashed(reader: HostBytes, tensors: Sequence[Tensor]) -> list[str]:
    hashers = [hashlib.sha256(header(spec_of("", t).dtype, t.shape)) for t in tensors]
    for index, data in reader:
        hashers[index].update(data)
    return [hasher.hexdigest() for hasher in hashers]


def _shares(sizes: Iterable[tuple[str, int]], count: int) -> list[list[str]]:
    """Names in ``count`` lists of about equal bytes, or in fewer; the largest first."""
    heap: list[tuple[int, int, list[str]]] = [(0, i, []) for i in range(max(1, count))]
    for name, nbytes in sorted(sizes, key=lambda item: -item[1]):
        load, i, share = heap[0]
        share.append(name)
        heapq.heapreplace(heap, (load + nbytes + 1, i, share))
    return [share for _, _, share in heap if share]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
