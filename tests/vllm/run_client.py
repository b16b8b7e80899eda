"""A trainer that knows vLLM's own client only: python run_client.py KIND ADDRESS URL VERSIONS."""

from __future__ import annotations

import sys

import tiny
from vllm.distributed.weight_transfer import (
    HTTPVLLMWeightSyncClient,
    ModuleSource,
    WeightTransferTrainerFactory,
)
from vllm.plugins import load_general_plugins


def main(kind: str, address: str, url: str, versions: list[int]) -> None:
    load_general_plugins()
    from weightbus.engines.vllm.backend import TrainerInit

    model = tiny.build(kind)
    trainer = WeightTransferTrainerFactory.trainer_init(
        TrainerInit(rank=0, size=1, address=address),
        client=HTTPVLLMWeightSyncClient(url),
        source=ModuleSource(model),
    )
    for version in versions:
        tiny.fill(model, version)
        print(trainer.send_weights(), flush=True)
    trainer.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:4], [int(v) for v in sys.argv[4].split(",")])
