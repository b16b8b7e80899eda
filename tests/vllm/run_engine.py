"""vLLM in a process of its own: python run_engine.py SPEC OUT. SPEC is a JSON object:

models: directories, each loaded in turn. updates: with a model, versions to take from a trainer at
``address``. tp: tensor-parallel ranks. dtype. backend: of weight transfer, or null for vLLM as it is.
OUT gets a list: of each model as loaded, or of each version, all live tensors, tokens and logprobs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))
PROMPTS = [[1, 2, 3, 4], [7, 100, 2000, 55, 9, 31], [1500] * 10]


def main(spec: dict[str, Any], out: Path) -> None:
    from vllm import LLM
    from vllm.config import WeightTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    rows = []
    for path in spec["models"]:
        begun = time.monotonic()
        llm = LLM(
            model=path,
            skip_tokenizer_init=True,
            enforce_eager=not spec.get("compile", False),
            max_model_len=128,
            dtype=spec.get("dtype", "bfloat16"),
            tensor_parallel_size=spec.get("tp", 1),
            worker_extension_cls="live.Live",
            weight_transfer_config=WeightTransferConfig(backend=spec["backend"]) if spec["backend"] else None,
            **spec.get("options", {}),
        )
        print(f"up in {time.monotonic() - begun:.1f} s", flush=True)
        if not spec.get("updates"):
            rows.append(look(llm))
        else:
            rows += updated(llm, spec)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    out.write_text(json.dumps(rows))


def updated(llm: Any, spec: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    llm.init_weight_transfer_engine({"init_info": {"address": spec["address"], **spec.get("init", {})}})
    for version in spec["updates"]:
        begun = time.monotonic()
        llm.start_weight_update()
        llm.update_weights({"update_info": {"version": version, "timeout_s": 60}})
        llm.finish_weight_update()
        llm.reset_prefix_cache()
        print(f"version {version} in {time.monotonic() - begun:.2f} s", flush=True)
        rows.append(look(llm))
    return rows


def look(llm: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    tensors = llm.collective_rpc("live_tensors")
    greedy = SamplingParams(max_tokens=8, temperature=0, detokenize=False, logprobs=0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedy, use_tqdm=False)
    return {
        "tensors": tensors,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [[next(iter(d.values())).logprob for d in o.outputs[0].logprobs] for o in outputs],
        "prompt": [
            [d[t].logprob for d, t in zip(o.prompt_logprobs[1:], p[1:], strict=True)]
            for o, p in zip(outputs, PROMPTS, strict=True)
        ],
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
