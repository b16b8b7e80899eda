"""Whether an engine computes with what its loader makes of the checkpoint that it was loaded from.

A step after loading may have repacked weights into others of the same shape and dtype, or have made copies. An
update in the checkpoint's layout would then be proved, and the model wrong. So what is live is compared, before
the first update, with what loading would write: nothing live is written to, and one tensor is read at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError
from weightbus.inventory.tree import tree_of
from weightbus.memory.shard import bits_of, plain_view
from weightbus.session.destination import Destination
from weightbus.storage.conversion import convert
from weightbus.storage.disk import stored_modules
from weightbus.storage.opened import Files
from weightbus.storage.ranges import Read, pieces_of
from weightbus.storage.reading import Reader
from weightbus.storage.sources import Sources
from weightbus.tensors.torch_dtensor import local_tensor

Baseline = str | os.PathLike[str] | Callable[[], nn.Module | Mapping[str, nn.Module]]
"""A directory of safetensors files, or a function that makes the engine's model anew."""

# How many of the tensors that differ an error names.
SHOWN = 8


def check_baseline(destination: Destination, baseline: Baseline) -> None:
    """Compare what is live on this rank with the baseline. Each server rank calls it for itself.

    Of a directory, what the rank's loading code writes is read, if it can be traced. A function is called once;
    all tensors that its modules hold are compared with those of the same name, and the new modules are dropped.
    Raises SpecError that names the tensors that differ, and for loading code that can't be traced.
    """
    if callable(baseline):
        where, differ = "a fresh model", list(_differ_from(destination, baseline()))
    else:
        path = Path(baseline)
        where, differ = str(path), list(_differ_from_files(destination, path))
    if differ:
        (name, how), *others = differ
        same = "; also " + "; ".join(f"{n}: {h}" for n, h in others[: SHOWN - 1]) if others else ""
        more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise SpecError(
            f"{name}: expected what loading {where} gives, got {how} (a step after loading has changed it, "
            f"or it was loaded from elsewhere; undo that step, or name what it makes in derived=){same}{more}"
        )


def _differ_from_files(destination: Destination, path: Path) -> Iterator[tuple[str, str]]:
    layout = destination.layout
    files = Files()
    try:
        manifest, _ = stored_modules(path, list(layout.modules) or None, files)
        own = {name: spec.shape for name, spec in layout.specs.items()}
        own |= {alias: own[name] for alias, name in layout.aliases.items()}
        specs = {name: tensor.spec for name, tensor in manifest.items()}
        converted = convert(specs, destination.own_names(), own)
        target = destination.target(converted.specs, None)
        for wire, why in target.arrived().items():
            raise SpecError(
                f"{wire}: baseline: expected a function that makes the model anew, got {path}: {why}"
            )
        sources = Sources(list(manifest.values()), {}, files)
        try:
            reader = Reader(sources, destination.device, lambda: None)
            for wire in target.specs:
                wrong = total = 0
                for box, live in target.live(wire):
                    loaded = torch.empty_like(live, memory_format=torch.contiguous_format)
                    reads = [
                        Read(stored=manifest[move.wire], box=part[0], view=part[1])
                        for move in converted.moves[wire]
                        if (part := move.within(box, loaded)) is not None
                    ]
                    views = {i: read.view for i, read in enumerate(reads) if read.view is not None}
                    reader.write(pieces_of(reads), views, lambda nbytes: None)
                    wrong += _unequal(live, loaded)
                    total += live.numel()
                if wrong:
                    yield wire, f"{wrong} of {total} elements otherwise"
        finally:
            sources.close()
        yield from ((name, f"{box}: {why}") for name, box, why in target.spoiled_fills())
    finally:
        files.close()


def _differ_from(
    destination: Destination, fresh: nn.Module | Mapping[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    if not isinstance(destination.source, nn.Module | Mapping):
        raise SpecError("baseline: expected a directory for a target of (name, tensor) pairs, got a function")
    live, new = held(destination.source), held(fresh)
    for name in sorted(live.keys() | new.keys(), key=str.encode):
        if destination.is_declared(name):
            continue
        if how := difference(live.get(name), new.get(name)):
            yield name, how


def difference(live: Tensor | None, fresh: Tensor | None) -> str:
    """How a tensor is other than that of a fresh model; empty if it is not, bit for bit."""
    if live is None or fresh is None:
        return "no such tensor" if live is None else "a tensor that the fresh model has not"
    if (live.dtype, live.shape) != (fresh.dtype, fresh.shape):
        return f"{live.dtype} {list(live.shape)} instead of {fresh.dtype} {list(fresh.shape)}"
    wrong = _unequal(live, fresh.to(live.device))
    return f"{wrong} of {live.numel()} elements otherwise" if wrong else ""


def held(source: nn.Module | Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All tensors of the module tree that have memory, by name; on this rank."""
    tops = {"": source} if isinstance(source, nn.Module) else {f"{name}.": m for name, m in source.items()}
    found = {one.name: plain_view(local_tensor(one.held)) for one in tree_of(tops).found}
    return {name: tensor for name, tensor in found.items() if not tensor.is_meta}


def _unequal(one: Tensor, other: Tensor) -> int:
    """How many elements have other bits."""
    if not one.numel():
        return 0
    if one.dtype.is_complex:
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    return int((bits_of(one) != bits_of(other)).sum())
