"""What the proof costs within one GPU: the source digested as it is copied, and by a kernel of its own.

    python benchmarks/proof.py --json benchmarks/results/proof-h100.json

One process, Qwen3-8B's shapes, masters of bf16 or fp32, a target of bf16. Beside each other, in turns: an
update that is not verified; verified ones, ``read once`` as they are, and ``read twice``, where the digests of
the source copy nothing; and a ``memcpy`` of as many bytes as the target has. Bits first: the target is compared
with what the masters give after an update of each kind, and after the last.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import record
import torch
from shapes import MODELS
from timing import timings
from torch import Tensor

import weightbus
from weightbus.routes import peer_wave

MASTERS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def wrong(source: dict[str, Tensor], target: dict[str, Tensor]) -> int:
    """How many tensors of the target differ in a bit; then they are zeroed."""
    count = 0
    for name, found in target.items():
        count += not torch.equal(found.view(torch.int16), source[name].bfloat16().view(torch.int16))
        found.zero_()
    return count


def case(model: str, masters: str, rounds: int) -> list[dict[str, Any]]:
    shapes = MODELS[model]
    torch.manual_seed(0)
    source = {name: torch.randn(shape, device="cuda").to(MASTERS[masters]) for name, shape in shapes.items()}
    target = {name: torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for name, shape in shapes.items()}
    nbytes = sum(tensor.nbytes for tensor in target.values())
    one, other = (torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    pairs = {"read once": weightbus.colocate(list(source.items()), list(target.items()))}
    with mock.patch.object(peer_wave, "why_not_copied", return_value="read twice"):
        pairs["read twice"] = weightbus.colocate(list(source.items()), list(target.items()))
        pairs["read twice"].update()

    def update(kind: str, *, verify: bool) -> None:
        report = pairs[kind].update(verify=verify)
        if report.word != ("verified" if verify else "unverified"):
            raise SystemExit(f"expected an update, got {report.word}")

    def memcpy() -> None:
        for _ in range(2):
            one.copy_(other)

    kinds: dict[str, Callable[[], None]] = {
        "memcpy": memcpy,
        "update": lambda: update("read once", verify=False),
        "update, verified, read once": lambda: update("read once", verify=True),
        "update, verified, read twice": lambda: update("read twice", verify=True),
    }
    bad = {}
    for what, run in kinds.items():
        run()
        if what != "memcpy":
            bad[what] = wrong(source, target)
    seconds: dict[str, list[float]] = {what: [] for what in kinds}
    for number in range(rounds):
        for what in kinds if number % 2 == 0 else list(kinds)[::-1]:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            kinds[what]()
            torch.cuda.synchronize()
            seconds[what].append(time.perf_counter() - begun)
    update("read once", verify=True)
    bad["update, verified, read once"] += wrong(source, target)
    rows = []
    for what, times in seconds.items():
        row = timings(times, seconds["update"])
        row["of_update"], row["of_update_95"] = row.pop("of_raw"), row.pop("of_raw_95")
        rows.append({"masters": masters, "what": what, "nbytes": nbytes, **row, "wrong": bad.get(what, 0)})
    for pair in pairs.values():
        pair.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for masters in MASTERS:
        rows += case(args.model, masters, args.rounds)
        gc.collect()
        torch.cuda.empty_cache()
        record.write(args.json, "proof", rows, model=args.model)
    for row in rows:
        low, high = row["of_update_95"]
        print(
            f"{row['masters']} {row['what']:30} {row['p50_s'] * 1e3:7.2f} ms, {row['of_update']:.3f} "
            f"({low:.3f} to {high:.3f}) of an update; {row['wrong']} wrong"
        )
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
