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


MODELS: dict[str, Shapes] = {
    "tiny": {f"layer{i}.weight": (128, 512) for i in range(8)},
    "qwen3-0.6b": dict(_qwen3(28, 1024, 16, 8, 3072, tied=True)),
    "qwen3-8b": dict(_qwen3(36, 4096, 32, 8, 12288, tied=False)),
    # Qwen3-30B-A3B's 128 experts in 48 layers, its widths halved so that both ends fit one GPU each.
    "qwen3-moe-scaled": dict(_qwen3(48, 1024, 32, 4, 384, tied=False, experts=128)),
}
