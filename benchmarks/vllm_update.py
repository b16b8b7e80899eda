"""The vLLM adapter beside a plain gloo broadcast and ``model.load_weights``, on the same tensors, on the CPU.

    .venv-vllm/bin/python benchmarks/vllm_update.py --json benchmarks/results/vllm-update-cpu.json

One process trains; one runs vLLM's engine and its worker. Both know the names, shapes and dtypes of a Qwen3
checkpoint. In a round each scheme takes its turn, in an order that rotates:

- ``broadcast and load_weights``: one gloo broadcast of all bytes in one buffer, then vLLM's ``load_weights``
- ``adapter, unverified`` and ``adapter, verified``: start_weight_update, update_weights, finish_weight_update

Timed is from a barrier of both to the end on both; of the adapter this is also what an engine is paused for.
Bits first: each scheme brings weights of its own, and all live parameters are compared with what vLLM's
``load_weights`` makes of them, before the timed rounds and after them. Exits with 1 if a bit is wrong or the
unverified adapter surely takes over 1.1 of the plain way, with 77 where there is no vLLM.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import record
import torch
import torch.distributed as dist
from timing import timings
from torch import Tensor
from update import free_ports

import weightbus

SCHEMES = ("broadcast and load_weights", "adapter, unverified", "adapter, verified")
LIMIT = 1.1
SIZES = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def model_of(layers: int) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, num_hidden_layers=layers)
    return transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)


@torch.no_grad()
def fill(tensors: dict[str, Tensor], version: int) -> None:
    generator = torch.Generator().manual_seed(version)
    for tensor in tensors.values():
        tensor.copy_(torch.randint(-1000, 1000, tensor.shape, generator=generator, dtype=torch.int16))
        tensor.mul_(1e-4)


class Peer:
    """One of the two processes: a gloo group beside the adapter's, a buffer for all bytes, and views of it."""

    def __init__(self, rank: int, args: argparse.Namespace, tensors: dict[str, Tensor]) -> None:
        store = dist.TCPStore("127.0.0.1", args.group_port, 2, is_master=rank == 0)
        self.group = dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=300))
        self.buffer = torch.empty(sum(t.numel() for t in tensors.values()), dtype=torch.bfloat16)
        self.views, at = {}, 0
        for name, tensor in tensors.items():
            self.views[name] = self.buffer[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()

    def meet(self) -> float:
        self.group.barrier().wait()
        return time.monotonic()

    def broadcast(self) -> None:
        self.group.broadcast(self.buffer, 0).wait()


def turns(args: argparse.Namespace) -> list[tuple[int, str]]:
    """Version and scheme of each step, alike in both processes: bits, warm-up and rounds, bits."""
    rounds = range(args.rounds + 3)
    order = [SCHEMES[(i + number) % 3] for number in rounds for i in range(3)]
    return list(enumerate(order, 1))


def train(args: argparse.Namespace) -> None:
    model = model_of(args.layers)
    tensors = {name: p.data for name, p in model.named_parameters()}
    peer = Peer(0, args, tensors)
    with weightbus.Publisher(
        list(tensors.items()), address=args.address, rank=0, size=1, retries=0
    ) as publisher:
        for version, scheme in turns(args):
            fill(tensors, version)
            for name, view in peer.views.items():  # the plain way sends from the buffer, the adapter in place
                view.copy_(tensors[name])
            peer.meet()
            if scheme == SCHEMES[0]:
                peer.broadcast()
            else:
                publisher.update(version, verify=scheme == SCHEMES[2])
            peer.meet()


def serve(args: argparse.Namespace, folder: str) -> None:
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        dtype="bfloat16",
        weight_transfer_config=WeightTransferConfig(backend="weightbus"),
    )
    (live,) = llm.apply_model(lambda model: model)
    tensors = {name: p.data for name, p in model_of(args.layers).named_parameters()}
    peer = Peer(1, args, tensors)
    llm.init_weight_transfer_engine({"init_info": {"address": args.address, "require_proof": False}})
    spent: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    wrong = 0
    everything = turns(args)
    for number, (version, scheme) in enumerate(everything):
        begun = peer.meet()
        if scheme == SCHEMES[0]:
            peer.broadcast()
            live.load_weights(iter(peer.views.items()))
        else:
            llm.start_weight_update()
            llm.update_weights({"update_info": {"version": version, "timeout_s": 120.0}})
            llm.finish_weight_update()
        spent[scheme].append(peer.meet() - begun)
        if number < 3 or number >= len(everything) - 3:
            held = {name: p.detach().clone() for name, p in live.named_parameters()}
            fill(tensors, version)
            live.load_weights(iter(tensors.items()))
            wrong += sum(not torch.equal(held[name], p) for name, p in live.named_parameters())
    nbytes = peer.buffer.numel() * peer.buffer.element_size()
    rows = []
    for scheme in SCHEMES:
        timed, raw = spent[scheme][2:-1], spent[SCHEMES[0]][2:-1]
        rows.append({"scheme": scheme, "nbytes": nbytes, "wrong": wrong, **timings(timed, raw)})
    args.out.write_text(json.dumps(rows))
    llm.collective_rpc("shutdown_weight_transfer_engine")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("there is no vLLM in this environment")
        return 77
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    hub_port, args.group_port = free_ports(2)
    args.address = f"tcp://127.0.0.1:{hub_port}"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder) / "rows.json"
        model_of(args.layers).save_pretrained(f"{folder}/model")
        both = [
            context.Process(target=train, args=(args,)),
            context.Process(target=serve, args=(args, f"{folder}/model")),
        ]
        for one in both:
            one.start()
        for one in both:
            one.join(1200)
        if any(one.exitcode != 0 for one in both):
            print([one.exitcode for one in both])
            for one in both:
                one.kill()
            return 1
        rows = json.loads(args.out.read_text())
    for row in rows:
        low, high = row["of_raw_95"]
        print(
            f"{row['scheme']:28} {1000 * row['p50_s']:8.1f} ms  {row['of_raw']:.3f} ({low:.3f} to {high:.3f})"
            f" of {SCHEMES[0]}; {row['wrong']} tensors wrong"
        )
    import vllm

    record.write(args.json, "vllm_update", rows, vllm=vllm.__version__, layers=args.layers)
    return int(any(row["wrong"] for row in rows) or rows[1]["of_raw_95"][0] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
