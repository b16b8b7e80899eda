"""Tiny, random Hugging Face models, one of each class that ``make test-models`` tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _deepseek() -> nn.Module:
    sizes = {name: size for name, size in TEXT.items() if name != "head_dim"}
    heads = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    routing = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
    }
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **heads, **routing, **groups))


def _gpt_oss() -> nn.Module:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = hf.GptOssConfig(**TEXT, **rope, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    return hf.GptOssForCausalLM(config)


def _qwen2_5_vl() -> nn.Module:
    vision = {**VISION, "fullatt_block_indexes": [1], "window_size": 16}
    config = hf.Qwen2_5_VLConfig(text_config={**TEXT, **MROPE}, vision_config=vision)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl_moe() -> nn.Module:
    vision = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**TEXT, **MOE, **MROPE, "decoder_sparse_step": 1}
    return hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def _clip() -> nn.Module:
    text = {**ENCODER, **TOKENS, "vocab_size": 96, "max_position_embeddings": 32, "projection_dim": 16}
    vision = {**ENCODER, "image_size": 16, "patch_size": 4, "projection_dim": 16}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _mamba2() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8}
    config = hf.Mamba2Config(vocab_size=96, **sizes, **TOKENS, expand=2, n_groups=2, chunk_size=8)
    return hf.Mamba2ForCausalLM(config)


def _whisper() -> nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    lengths = {"max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(vocab_size=96, d_model=32, **layers, **heads, **lengths, **TOKENS)
    return hf.WhisperForConditionalGeneration(config)


def _qwen3_next() -> nn.Module:
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 32}
    layers = ["linear_attention", "full_attention"]
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**TEXT, **MOE, **linear, **heads, layer_types=layers))


def _wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = hf.Wav2Vec2Config(
        vocab_size=32, **ENCODER, **TOKENS, **convolutions, **positions, num_feat_extract_layers=2
    )
    return hf.Wav2Vec2ForCTC(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3-tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, tie_word_embeddings=False)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **MOE, decoder_sparse_step=1)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt-oss": _gpt_oss,
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT)),
    "deepseek-v3": _deepseek,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl-moe": _qwen3_vl_moe,
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "clip": _clip,
    "mamba2": _mamba2,
    "whisper": _whisper,
    "qwen3-next": _qwen3_next,
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=96, **ENCODER, max_position_embeddings=32)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32, **TOKENS)
    ),
    "wav2vec2": _wav2vec2,
}


def make(name: str, seed: int) -> nn.Module:
    """The model, with random weights in every parameter: those that start as ones or zeros too."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors by name, buffers of all kinds included; collective where some are DTensors."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: _full(tensor.detach()) for name, tensor in named.items()}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ, or that only one of the two has."""
    names = one.keys() | other.keys()
    return sorted(n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n]))
