"""The inference job: starts with random weights and serves whatever the trainer sends.

Started by run.py as: torchrun server.py --address ... --folder ... --deadline S
"""

from __future__ import annotations

import argparse
import faulthandler
import os
from pathlib import Path

import minilm
import snapshot
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import weightbus


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    faulthandler.dump_traceback_later(args.deadline, exit=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    encode = minilm.SentenceEncoder(minilm.random_tp(mesh), device)

    def show(version: int) -> None:
        with torch.no_grad():
            embeddings = encode(minilm.SENTENCES)
        weights = snapshot.full_weights(encode.model)
        if dist.get_rank() == 0:
            snapshot.write(snapshot.path(args.folder, "servers", version), weights, embeddings)

    show(0)
    subscriber = weightbus.Subscriber(encode.model, address=args.address, replica=0, on_commit=show)
    with subscriber:
        subscriber.serve()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
