"""What a module's ``load_weights`` does: traced with all tensors, and without those with which that fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightbus.errors import SpecError
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec, castable
from weightbus.tensors.loaders.torch_taint import Reach, reaches
from weightbus.tensors.loaders.torch_trace import Traced, trace_many
from weightbus.tensors.loaders.trace import Effect, Fault, Grid, Overwritten, Piece, Untraceable, fills_of
from weightbus.tensors.loaders.twin import REPLACES, kept, twin

# A module whose load_weights fails on more tensors than this is not tried without them any further.
MAX_FAILURES = 16


@dataclass(frozen=True, slots=True)
class Loading:
    """What a module's ``load_weights`` does. effects: by parameter; pieces name their wire tensors.

    dtypes: those in which it writes wire tensors. opaque: tensors that it can't be traced with, and why.
    written: all parameters that it writes to; None where that is not known. together: sets of opaque tensors
    that it takes in one call, as it makes something of all of them.
    """

    effects: Mapping[str, Effect]
    dtypes: Mapping[str, str]
    opaque: Mapping[str, str]
    written: frozenset[str] | None = None
    together: tuple[tuple[str, ...], ...] = ()

    def by_wire(self) -> dict[str, dict[str, Effect]]:
        """Effects by wire tensor and parameter, without fills."""
        pieces: dict[str, dict[str, list[Piece]]] = {}
        for name, effect in self.effects.items():
            for piece in effect.pieces:
                pieces.setdefault(piece.wire, {}).setdefault(name, []).append(piece)
        return {
            wire: {name: Effect(tuple(found)) for name, found in by_name.items()}
            for wire, by_name in pieces.items()
        }


class Threaded(Untraceable):
    """Threads of the loading code's own do work that is not followed."""


class NotALoader(Untraceable):
    """A ``load_weights`` that does not read from an iterable of (name, tensor), so takes something else."""


def trace_module(
    label: str,
    module: nn.Module,
    given: Mapping[str, tuple[str, Spec]],
    parameters: Mapping[str, Tensor],
    ties: Mapping[str, str],
) -> Loading:
    """Runs ``load_weights`` with all tensors; if one is more than it can be traced with, without that one."""
    opaque: dict[str, str] = {}
    own = {wire: spec.dtype for wire, (_, spec) in given.items()}
    dtypes = dict(own)

    def known(effects: Mapping[str, Effect]) -> Loading:
        # What it does with other dtypes than the trainer's is known of traced tensors only.
        arriving = dtypes | {wire: own[wire] for wire in opaque}
        return _with_reach(module, given, arriving, parameters, Loading(effects, arriving, opaque))

    def unknown(text: str) -> Loading:
        opaque.update(dict.fromkeys(given, text))
        return known({})

    while True:
        left = {wire: name for wire, (name, _) in given.items() if wire not in opaque}
        asked: list[str] = []
        try:
            # Casts of the loader's show which dtype a tensor must arrive in: the sender casts.
            first = _run(module, left, given, dtypes, parameters, asked, ties, allow_casts=True)
            casts = first.casts
            written = {wire: str(dtype).removeprefix("torch.") for wire, dtype in casts.items()}
            bad = {wire: to for wire, to in written.items() if not castable(dtypes[wire], to)}
            opaque |= {w: f"{label} can't be traced: it casts {given[w][1]} to {to}" for w, to in bad.items()}
            if not bad:
                dtypes |= written
                effects = _run(module, left, given, dtypes, parameters, asked, ties).effects
                if effects != first.effects:
                    raise Untraceable("what it writes hangs on dtypes, or on what it did before")
                return known(effects)
        except NotALoader:
            raise
        except Overwritten as reason:
            raise SpecError(
                f"{asked[-1] or 'after the last tensor'}: {label}: {reason}; expected one for each destination "
                f"(tie them on the trainer too, or let name_map give None for one of them)"
            ) from reason
        except Fault as reason:
            if opaque:  # it misses those that it was tried without
                return unknown(next(iter(opaque.values())))
            tensor = f"{asked[-1]}: " if asked and asked[-1] else ""
            raise SpecError(f"{tensor}{label}: {reason}") from reason
        except Threaded as reason:
            return Loading({}, own, dict.fromkeys(given, f"{label} can't be traced: {reason}"))
        except Untraceable as reason:
            text = f"{label} can't be traced: {reason}"
            if not asked or len(asked) > len(left) or len(opaque) == MAX_FAILURES:
                # It failed after the last one, or too often: nothing is known of any.
                return unknown(text)
            opaque[asked[-1]] = text


def _run(
    module: nn.Module,
    left: Mapping[str, str],
    given: Mapping[str, tuple[str, Spec]],
    dtypes: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    asked: list[str],
    ties: Mapping[str, str],
    *,
    allow_casts: bool = False,
) -> Traced:
    """asked: filled with the names that were taken from the iterable, and a last one at its end."""
    wires = {
        wire: torch.empty(given[wire][1].shape, dtype=getattr(torch, dtypes[wire]), device="meta")
        for wire in left
    }
    asked.clear()

    def weights(look: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
        for wire, tensor in wires.items():
            asked.append(wire)
            yield left[wire], tensor
            look()
        asked.append("")

    def run(stand_ins: dict[str, Tensor], look: Callable[[], None]) -> None:
        copy = twin(module, {id(parameters[name]): tensor for name, tensor in stand_ins.items()})
        before = [id(tensor) for tensor in _held(copy)]
        # What another thread does is not followed; it writes to stand-ins, not to what is live.
        threads: list[str] = []
        try:
            with kept(module), _threads_told(threads):
                copy.load_weights(weights(look))  # type: ignore[operator]
        except Exception as error:
            if not asked:
                raise NotALoader(f"it raised {type(error).__name__}: {error}") from error
            if not threads:
                raise
        if not asked:
            raise NotALoader("it read no tensor")
        if threads:
            raise Threaded(f"it works in threads ({threads[0]})")
        if [id(tensor) for tensor in _held(copy)] != before:
            raise Fault(REPLACES)

    return trace_many(run, wires, parameters, ties=ties, allow_casts=allow_casts)


_telling = threading.Lock()


@contextlib.contextmanager
def _threads_told(names: list[str]) -> Iterator[None]:
    """Adds the names of threads and pools to which this thread gives work meanwhile."""
    start, submit, own = threading.Thread.start, ThreadPoolExecutor.submit, threading.get_ident()

    def tell(name: str) -> None:
        if threading.get_ident() == own:
            names.append(name)

    def telling_start(thread: threading.Thread) -> None:
        tell(thread.name)
        start(thread)

    def telling_submit(pool: ThreadPoolExecutor, /, *args: Any, **kwargs: Any) -> Any:
        tell(type(pool).__name__)
        return submit(pool, *args, **kwargs)

    with _telling:
        threading.Thread.start = telling_start  # type: ignore[method-assign, assignment]
        ThreadPoolExecutor.submit = telling_submit  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            threading.Thread.start = start  # type: ignore[method-assign]
            ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]


# A loader that is tried with each of more tensors alone would take too long to look at.
MAX_ALONE = 4096


def _with_reach(
    module: nn.Module,
    given: Mapping[str, tuple[str, Spec]],
    dtypes: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    loading: Loading,
) -> Loading:
    """With what is known of its opaque tensors: where they go, and which of them it needs together."""
    if not loading.opaque:
        return replace(loading, written=frozenset(loading.effects))

    def reach(wires: Iterable[str]) -> dict[str, Reach] | None:
        tensors = {
            wire: torch.empty(given[wire][1].shape, dtype=getattr(torch, dtypes[wire]), device="meta")
            for wire in wires
        }

        def run(stand_ins: dict[str, Tensor]) -> None:
            copy = twin(module, {id(parameters[name]): tensor for name, tensor in stand_ins.items()})
            with kept(module):
                copy.load_weights((given[wire][0], tensor) for wire, tensor in tensors.items())  # type: ignore

        return reaches(run, tensors, parameters)

    together = reach(given)
    if together is None or len(loading.opaque) > MAX_ALONE:
        return loading
    single = {wire: reach([wire]) for wire in loading.opaque}
    alone: dict[str, set[str]] = {}
    for name, found in (item for one in single.values() if one for item in one.items()):
        alone.setdefault(name, set()).update(found.wires)
    groups: list[set[str]] = []
    for name, wires in ((name, found.wires) for name, found in together.items()):
        needed = wires & loading.opaque.keys()
        if needed <= alone.get(name, set()):
            continue
        if needed != wires:
            traced = min(wires - loading.opaque.keys())
            raise SpecError(
                f"{name}: expected loading code that can be traced, or that takes all of {traced} and "
                f"{min(needed, default=traced)} at once, got one that makes something of both"
            )
        meeting = [group for group in groups if group & needed]
        groups = [group for group in groups if not group & needed]
        groups.append(set(needed).union(*meeting))
    grouped = set().union(*groups)
    if any(reach(group) is None for group in groups) or any(
        one is None and wire not in grouped for wire, one in single.items()
    ):
        groups = [set(loading.opaque)]  # it asks for more than it makes something of
        if reach(loading.opaque) is None:
            traced = ", ".join(sorted(given.keys() - loading.opaque.keys())[:4])
            raise SpecError(
                f"{traced}: expected loading code that works without these, which are written directly"
            )
    calls = [(min(group), reach(group) or {}) for group in groups]
    calls += [(wire, one) for wire, one in single.items() if one and not any(wire in group for group in groups)]
    for wire, written in calls:
        _check_apart(wire, written, loading.effects, parameters)
    order = {wire: place for place, wire in enumerate(given)}
    return replace(
        loading,
        written=frozenset(together) | frozenset(loading.effects),
        together=tuple(tuple(sorted(group, key=order.__getitem__)) for group in groups),
    )


def _check_apart(
    wire: str,
    written: Mapping[str, Reach],
    effects: Mapping[str, Effect],
    parameters: Mapping[str, Tensor],
) -> None:
    """Raise SpecError where a call of loading code writes over what is written directly, sooner or later."""
    for name, reach in written.items():
        pieces = effects.get(name, Effect()).pieces
        try:
            grid = Grid.like(parameters[name])
            boxes = [fill.target for view in reach.views for fill in fills_of(view, grid, 0)]
        except Untraceable:
            boxes = [Box.whole(tuple(parameters[name].shape))]
        if over := next((one for one in pieces if any(map(one.target.intersect, boxes))), None):
            raise SpecError(
                f"{over.wire}: expected {name} to be written by one of them, got {wire} beside it, which "
                f"goes over {over.target}, in code that can't be traced, so that the last can't be known"
            )


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
