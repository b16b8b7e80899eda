"""One rank of replicas.py: a trainer rank that holds the whole model, or a server rank. It does as it is told.

Started with the ``weightbus`` to be timed first on its path, so it imports nothing of benchmarks that imports
another, and uses only what versions have in common. Orders come as lines of JSON on stdin, each is answered by
one on stdout; between them the process waits in a read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from shapes import MODELS
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import weightbus

# Linear layers whose input is split where a model is tensor-parallel; all others' output is.
SPLIT_INPUT = ("o_proj.weight", "down_proj.weight")


class Rank:
    """role: ``trainer`` or ``server``. rank, size: in its job; the server ranks are one replica's.

    device: where its tensors lie. store: where the server ranks find each other, if there are several.
    """

    def __init__(self, *, role: str, rank: int, size: int, device: str, model: str, store: str) -> None:
        self.trains, self.rank, self.size = role == "trainer", rank, size
        self.device = torch.device(device)
        self.shapes = MODELS[model]
        self.end: Any = None
        mesh = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not self.trains and size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
            mesh = init_device_mesh(self.device.type, (size,))
        self.local = {
            name: drawn(i, shape, self.device)
            if self.trains
            else torch.zeros(self._shard(name, shape), dtype=torch.bfloat16, device=self.device)
            for i, (name, shape) in enumerate(self.shapes.items())
        }
        self.tensors = list(self.local.items())
        if mesh is not None:
            self.tensors = [(name, self._placed(name, tensor, mesh)) for name, tensor in self.tensors]

    def _split(self, name: str) -> int | None:
        """The dimension in which the server ranks split a tensor; None if each has all of it."""
        if self.trains or self.size == 1 or len(self.shapes[name]) < 2:
            return None
        return 1 if name.endswith(SPLIT_INPUT) else 0

    def _shard(self, name: str, shape: tuple[int, ...]) -> list[int]:
        split = self._split(name)
        return [n // self.size if i == split else n for i, n in enumerate(shape)]

    def _placed(self, name: str, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        split = self._split(name)
        placement = Replicate() if split is None else Shard(split)
        return DTensor.from_local(tensor, mesh, [placement], run_check=False)

    def open(self, *, address: str, route: Any) -> dict[str, Any]:
        if self.trains:
            self.end = weightbus.Publisher(
                self.tensors, address=address, rank=self.rank, size=self.size, route=route, join_timeout_s=60.0
            )
        else:
            self.end = weightbus.Subscriber(
                self.tensors, address=address, rank=self.rank, replica_size=self.size, connect_timeout_s=60.0
            )
        return {
            "weightbus": os.path.dirname(weightbus.__file__),
            "nbytes": sum(tensor.nbytes for tensor in self.local.values()),
        }

    def update(self, *, version: int, verify: bool) -> dict[str, Any]:
        """cpu_s: of all of its threads. A trainer's seconds are its own, from its call to the commit."""
        cpu_s = time.process_time()
        told = self._update(version, verify)
        return told | {"cpu_s": time.process_time() - cpu_s}

    def _update(self, version: int, verify: bool) -> dict[str, Any]:
        if not self.trains:
            while not self.end.poll(timeout_s=1.0):
                pass
            return {"state": self.end.state}
        try:
            report = self.end.update(version, verify=verify)
        except weightbus.WeightbusError as error:
            return {"error": type(error).__name__, "text": str(error)}
        return {
            "seconds": report.seconds,
            "stages": dict(report.stages),
            "word": report.word,
            "route": report.route,
        }

    def flip(self) -> dict[str, Any]:
        """One bit of one tensor; the same call puts it back."""
        self.tensors[len(self.tensors) // 2][1].view(-1).view(torch.uint8)[0] ^= 1
        return {}

    def compare(self) -> dict[str, Any]:
        """How many of a server rank's tensors differ in some bit from what the trainer ranks drew, and how many
        have any bit set."""
        wrong = written = 0
        for i, (name, found) in enumerate(self.local.items()):
            whole, split = drawn(i, self.shapes[name], self.device), self._split(name)
            expected = whole if split is None else whole.chunk(self.size, split)[self.rank].contiguous()
            wrong += not torch.equal(found.view(torch.int16), expected.view(torch.int16))
            written += bool(found.view(torch.int16).any())
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {"wrong": wrong, "written": written}

    def close(self) -> dict[str, Any]:
        self.end.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        return {}


def drawn(index: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random bits, others for each tensor; the same on devices of one kind."""
    count = torch.Size(shape).numel()
    generator = torch.Generator(device=device).manual_seed(index)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.bfloat16)[:count].view(shape)


def main() -> None:
    """The first order says which rank this is; the end of stdin ends the process."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed
    logging.getLogger("weightbus").setLevel(logging.CRITICAL)  # a refusal is asked for
    rank: Rank | None = None
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("do")
        if rank is None:
            rank, answer = Rank(**order), {}
        else:
            answer = getattr(rank, what)(**order)
        print(json.dumps(answer), file=answers, flush=True)
