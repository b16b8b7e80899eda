"""Tiny models of transformers' classes, each version with random weights of its own."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
GEMMA = {
    "sliding_window": 64,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}

# Kind: names of transformers' configuration and class, and what the configuration has besides SIZES.
KINDS = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**EXPERTS, "tie_word_embeddings": False}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
    "mla": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**LATENT, "tie_word_embeddings": False}),
}


def build(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    config, cls, more = KINDS[kind]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**{**SIZES, **more}))
    return model.to(dtype).eval()


@torch.no_grad()
def fill(model: nn.Module, version: int) -> nn.Module:
    """Random weights of ``version``, the same in every process."""
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(version * 1_000_003 + sum(name.encode()) * 31 + len(name))
        drawn = torch.randn(parameter.shape, generator=generator) * 0.05
        parameter.copy_(drawn + 1 if "norm" in name else drawn)
    return model


def save(folder: Path, kind: str, version: int) -> Path:
    """A checkpoint as transformers writes it, of bfloat16."""
    path = folder / f"{kind}-{version}"
    if not path.exists():
        fill(build(kind), version).save_pretrained(path)
    return path
