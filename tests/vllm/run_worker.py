"""A worker's weight transfer without an engine around it, behind vLLM's routes: python run_worker.py KIND PORT.

For a vLLM of which only the Python files are there. It ends when the transfer is shut down, and prints for each
update whether the model is that version's.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import tiny
import torch
import vllm
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from weightbus.engines.vllm import plugin


def engine_of(model: torch.nn.Module) -> object:
    parallel = SimpleNamespace(
        rank=0,
        world_size=1,
        data_parallel_size=1,
        data_parallel_index=0,
        data_parallel_rank=0,
        enable_eplb=False,
    )
    config = SimpleNamespace(
        parallel_config=parallel,
        model_config=SimpleNamespace(model="/nowhere", revision=None),
        load_config=SimpleNamespace(load_format="dummy"),
        compilation_config=SimpleNamespace(static_forward_context={}, static_all_moe_layers=[]),
        quant_config=None,
        lora_config=None,
    )
    transfer = SimpleNamespace(backend="weightbus")
    return WeightTransferEngineFactory.create_engine(transfer, config, torch.device("cpu"), model)


def main(kind: str, port: int) -> None:
    plugin.register()
    plugin.register()  # the factories refuse a second one: it is none
    plugin.support(vllm.__version__).keep_layouts()  # all that it takes hold of is there
    for factory in (WeightTransferEngineFactory, WeightTransferTrainerFactory):
        cls = factory._registry["weightbus"]()
        print(vllm.__version__, cls.__name__, sorted(cls.__abstractmethods__), flush=True)
    model = tiny.build(kind)
    engine, done = engine_of(model), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            if self.path == "/init_weight_transfer_engine":
                engine.init_transfer_engine(engine.parse_init_info(body["init_info"]))
            elif self.path == "/start_weight_update":
                engine.start_weight_update()
            elif self.path == "/update_weights":
                engine.update_weights(body["update_info"])
            elif self.path == "/finish_weight_update":
                engine.finish_weight_update()
                expected = dict(tiny.fill(tiny.build(kind), int(body["weight_version"])).named_parameters())
                same = all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
                print("version", body["weight_version"], "equal" if same else "differs", flush=True)
                done.append(body["weight_version"])
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        while len(done) < 2:
            server.handle_request()
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
