"""A trainer in a process of its own: python run_trainer.py KIND ADDRESS VERSIONS [DTYPE]; prints reports."""

from __future__ import annotations

import sys

import tiny
import torch

import weightbus


def main(kind: str, address: str, versions: list[int], dtype: str) -> None:
    model = tiny.build(kind, getattr(torch, dtype))
    with weightbus.Publisher(model, address=address, retries=0, join_timeout_s=120) as publisher:
        for version in versions:
            tiny.fill(model, version)
            print(publisher.update(version), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(v) for v in sys.argv[3].split(",")], (*sys.argv, "bfloat16")[4])
