"""vLLM 0.32: where its factories are, its packing for the CPU, and where its processes take requests."""

from __future__ import annotations

from http import HTTPStatus

from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.platforms import current_platform

from weightbus.engines.vllm import gate, layouts
from weightbus.engines.vllm.plugin import NAME
from weightbus.errors import TornError

BACKEND = "weightbus.engines.vllm.backend"


def register() -> None:
    """Register both ends; nothing changes for engines that don't ask for this backend."""
    WeightTransferEngineFactory.register_engine(NAME, BACKEND, "WorkerEngine")
    WeightTransferTrainerFactory.register_engine(NAME, BACKEND, "TrainerEngine")
    shut_gates()
    if current_platform.is_cpu():
        keep_layouts()


def asked() -> bool:
    """Whether the engine that is being loaded uses this backend."""
    return gate.asked(get_current_vllm_config_or_none())


def keep_layouts() -> None:
    """Weights stay as they were loaded (``layouts``)."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    utils.dispatch_cpu_unquantized_gemm = layouts.keep_linear(utils.dispatch_cpu_unquantized_gemm, asked)
    CPUUnquantizedExperts.process_weights_after_loading = layouts.keep_experts(
        CPUUnquantizedExperts.process_weights_after_loading, asked
    )
    CPUUnquantizedExperts.apply = layouts.use_packed(CPUUnquantizedExperts.apply)


def shut_gates() -> None:
    """A torn engine serves nobody (``gate``). In all processes, as vLLM does not say which one this is."""
    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    def unavailable(reason: str) -> Exception:
        error: Exception = GracefulHTTPError(reason, HTTPStatus.SERVICE_UNAVAILABLE)
        return error

    EngineCore.collective_rpc = gate.guard(EngineCore.collective_rpc)
    EngineCore.sleep = gate.lose(EngineCore.sleep)
    AsyncLLM.collective_rpc = gate.Door.watch_async(AsyncLLM.collective_rpc)
    AsyncLLM.check_admission = gate.Door.refuse(AsyncLLM.check_admission, unavailable)
    AsyncLLM.check_health = gate.Door.refuse(AsyncLLM.check_health, unavailable)
    LLMEngine.collective_rpc = gate.Door.watch(LLMEngine.collective_rpc)
    LLMEngine.add_request = gate.Door.refuse(LLMEngine.add_request, TornError)
