"""``weightbus digest``: digests of a checkpoint's tensors, read once and never held as a whole."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from weightbus.digest import STABLE_SEED, Digest, Digester, P
from weightbus.errors import SpecError, visible
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.spec import Spec
from weightbus.progress import Bar
from weightbus.storage.digest_list import Saved, differences, load_saved, saved_of
from weightbus.storage.disk import Stored, byte_shape, stored_tensors
from weightbus.storage.opened import Files, OpenFile

BATCH_BYTES = 16 << 20
BUFFERS = 4  # one is digested while the others are read


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A contiguous piece of a tensor. box: in axes of which the last one is in bytes."""

    tensor: Stored
    box: Box
    begin: int
    end: int


def digest_files(
    tensors: Mapping[str, Stored],
    files: Files | None = None,
    *,
    seed: bytes = STABLE_SEED,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Digest]:
    """Digest of each tensor, by name. Reads and digests at the same time, with BUFFERS * BATCH_BYTES of memory.

    files: where they are open already. progress: called with the bytes done and in all. Raises SpecError where
    a file has become shorter, or has changed meanwhile.
    """
    if files is None:
        with Files() as files:
            return digest_files(tensors, files, seed=seed, progress=progress)
    sums = {name: (0, 0) for name in tensors}
    done, total = 0, sum(tensor.spec.nbytes for tensor in tensors.values())
    opened = {tensor.path: files.file(tensor.path) for tensor in tensors.values()}
    for batch, buffer in _read_ahead(_batches(tensors.values()), opened):
        parts = [_part(piece, buffer[piece.begin - batch[0].begin :]) for piece in batch]
        for piece, (lane0, lane1) in zip(batch, Digester(parts).sums(seed).tolist(), strict=True):
            name = piece.tensor.spec.name
            sums[name] = (sums[name][0] + lane0) % P, (sums[name][1] + lane1) % P
        done += batch[-1].end - batch[0].begin
        progress(done, total)
    for file in opened.values():
        file.check_unchanged()
    return {
        name: Digest(
            sums=sums[name],
            dtype=tensor.spec.dtype,
            shape=tensor.spec.shape,
            boxes=(Box.whole(tensor.spec.shape),),
            seed=seed,
        )
        for name, tensor in tensors.items()
    }


def _batches(tensors: Iterable[Stored]) -> Iterator[list[_Piece]]:
    """Pieces in the order of the files, in neighboring runs of at most BATCH_BYTES of one file."""
    batch: list[_Piece] = []
    for tensor in sorted(tensors, key=lambda tensor: (tensor.path, tensor.begin)):
        begin = tensor.begin
        for box in Box.whole(byte_shape(tensor.spec)).split(BATCH_BYTES):
            piece = _Piece(tensor=tensor, box=box, begin=begin, end=begin + box.volume)
            begin = piece.end
            if batch and (tensor.path != batch[0].tensor.path or piece.end - batch[0].begin > BATCH_BYTES):
                yield batch
                batch = []
            batch.append(piece)
    if batch:
        yield batch


def _read_ahead(
    batches: Iterable[list[_Piece]], opened: Mapping[Path, OpenFile]
) -> Iterator[tuple[list[_Piece], Tensor]]:
    """Each batch with a buffer of its bytes, which is good until the next batch is asked for."""
    buffers = cycle([torch.empty(BATCH_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)])
    waiting: deque[tuple[list[_Piece], Tensor, Future[None]]] = deque()

    def take() -> tuple[list[_Piece], Tensor]:
        batch, buffer, reading = waiting.popleft()
        reading.result()
        return batch, buffer

    with ThreadPoolExecutor(BUFFERS - 1, "weightbus-read") as pool:
        for batch in batches:
            buffer = next(buffers)
            waiting.append((batch, buffer, pool.submit(_read, opened[batch[0].tensor.path], batch, buffer)))
            if len(waiting) == BUFFERS:
                yield take()
        while waiting:
            yield take()


def _read(file: OpenFile, batch: list[_Piece], buffer: Tensor) -> None:
    at, end = batch[0].begin, batch[-1].end
    into = buffer.numpy().data[: end - at]
    try:
        while into:
            count = os.preadv(file.descriptor, [into], at)
            if not count:
                name = next(piece.tensor.spec.name for piece in batch if piece.end > at)
                raise SpecError(
                    f"{file.path}: {name}: expected data up to byte {end}, got a file of {at}; truncated"
                )
            into, at = into[count:], at + count
    except OSError as error:
        name = batch[0].tensor.spec.name
        text = f"{file.path}: {name}: expected a readable file, got {error.strerror or error}"
        raise SpecError(text) from error


def _part(piece: _Piece, memory: Tensor) -> Part:
    spec = piece.tensor.spec
    return Part(
        spec=Spec(name=spec.name, dtype="uint8", shape=byte_shape(spec)),
        box=piece.box,
        tensor=memory[: piece.box.volume].view(piece.box.sizes),
    )


def main(arguments: list[str]) -> int:
    """0: done, and as the checked list says. 1: it differs. 2: something can't be read."""
    parser = argparse.ArgumentParser(
        prog="weightbus digest",
        description="grid61 digests of the tensors in safetensors files (docs/digest.md)",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL_DIR", help="directory, safetensors file or index file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, as --save writes it")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the digests to FILE")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the digests saved in FILE")
    options = parser.parse_args(arguments)
    try:
        expected = load_saved(options.check) if options.check else None
        with Files() as files:
            tensors = stored_tensors(options.model, files)
            begun, bar = time.monotonic(), Bar(f"digesting {options.model.resolve().name}")
            try:
                got = saved_of(digest_files(tensors, files, progress=bar))
            finally:
                bar.close()
        seconds = time.monotonic() - begun
        if options.save:
            options.save.write_text(_json(msgspec.to_builtins(got)))
    except (SpecError, OSError) as error:
        print(f"weightbus digest: {error}", file=sys.stderr)
        return 2
    found = differences(expected, got) if expected else {}
    if options.json:
        print(_json(msgspec.to_builtins(got) | ({"differences": found} if expected else {})), end="")
    elif expected:
        for line in _lines(found, expected, got):
            print(visible(line))  # names as the list has them
    else:
        for name, tensor in got.tensors.items():
            print(f"{tensor}  {name}")
        print(f"model {got.model}")
    nbytes = sum(tensor.spec.nbytes for tensor in tensors.values())
    verdict = "" if expected is None else ", differs" if any(found.values()) else ", as saved"
    print(
        f"{len(tensors)} tensors, {nbytes / 1e9:.3f} GB in {seconds:.1f} s, "
        f"{nbytes / seconds / 1e9:.2f} GB/s{verdict}",
        file=sys.stderr,
    )
    return 1 if any(found.values()) else 0


def _lines(found: Mapping[str, list[str]], expected: Saved, got: Saved) -> Iterator[str]:
    for name in found["missing"]:
        yield f"{name}: expected {expected.tensors[name]}, got no such tensor"
    for name in found["unexpected"]:
        yield f"{name}: expected no such tensor, got {got.tensors[name]}"
    for name in found["mismatching"]:
        yield f"{name}: expected {expected.tensors[name]}, got {got.tensors[name]}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
