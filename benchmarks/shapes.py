"""Shapes of real models, so that nothing needs to be downloaded. Sources: the models' config.json."""

from __future__ import annotations

from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]


def _qwen3(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    tied: bool,
    experts: int = 0,
    vocab: int = 151936,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    head = 128
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (heads * head, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv_heads * head, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv_heads * head, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, heads * head)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        if experts:
            yield f"{layer}.mlp.gate.weight", (experts, hidden)
        for mlp_name in [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]:
            yield f"{layer}.{mlp_name}.gate_proj.weight", (mlp, hidden)
            yield f"{layer}.{mlp_name}.up_proj.weight", (mlp, hidden)
            yield f"{layer}.{mlp_name}.down_proj.weight", (hidden, mlp)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def _z_image() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp, head, caption, condition = 3840, 10240, 128, 2560, 256
    yield "all_x_embedder.2-1.weight", (hidden, 64)
    yield "all_x_embedder.2-1.bias", (hidden,)
    yield "all_final_layer.2-1.linear.weight", (64, hidden)
    yield "all_final_layer.2-1.linear.bias", (64,)
    yield "all_final_layer.2-1.adaLN_modulation.1.weight", (hidden, condition)
    yield "all_final_layer.2-1.adaLN_modulation.1.bias", (hidden,)
    yield "t_embedder.mlp.0.weight", (1024, condition)
    yield "t_embedder.mlp.0.bias", (1024,)
    yield "t_embedder.mlp.2.weight", (condition, 1024)
    yield "t_embedder.mlp.2.bias", (condition,)
    yield "cap_embedder.0.weight", (caption,)
    yield "cap_embedder.1.weight", (hidden, caption)
    yield "cap_embedder.1.bias", (hidden,)
    yield "x_pad_token", (1, hidden)
    yield "cap_pad_token", (1, hidden)
    for stack, layers in (("noise_refiner", 2), ("context_refiner", 2), ("layers", 30)):
        for i in range(layers):
            layer = f"{stack}.{i}"
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{layer}.attention.{name}.weight", (hidden, hidden)
            yield f"{layer}.attention.norm_q.weight", (head,)
            yield f"{layer}.attention.norm_k.weight", (head,)
            yield f"{layer}.feed_forward.w1.weight", (mlp, hidden)
            yield f"{layer}.feed_forward.w2.weight", (hidden, mlp)
            yield f"{layer}.feed_forward.w3.weight", (mlp, hidden)
            for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                yield f"{layer}.{name}.weight", (hidden,)
            if stack != "context_refiner":
                yield f"{layer}.adaLN_modulation.0.weight", (4 * hidden, condition)
                yield f"{layer}.adaLN_modulation.0.bias", (4 * hidden,)


MODELS: dict[str, Shapes] = {
    "1mb": {f"layer{i}.weight": (128, 512) for i in range(8)},
    "toy": dict(_qwen3(2, 256, 4, 2, 512, tied=True, vocab=4000)),
    # Nine of its layers, 283 MB in bf16.
    "qwen3-0.6b-few": dict(_qwen3(9, 1024, 16, 8, 3072, tied=True, vocab=1024)),
    "qwen3-0.6b": dict(_qwen3(28, 1024, 16, 8, 3072, tied=True)),
    "qwen3-8b": dict(_qwen3(36, 4096, 32, 8, 12288, tied=False)),
    # The transformer of the diffusion pipeline, 6.2 billion parameters.
    "z-image-turbo": dict(_z_image()),
    # Qwen3-30B-A3B's 128 experts in 48 layers, its widths halved so that both ends fit one GPU each.
    "qwen3-moe-scaled": dict(_qwen3(48, 1024, 32, 4, 384, tied=False, experts=128)),
}
