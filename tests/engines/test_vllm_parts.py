"""What the backend for vLLM decides without vLLM: places, versions, layouts, which models it takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weightbus.engines.vllm import layouts, plugin
from weightbus.engines.vllm.admission import admit, checkpoint_of
from weightbus.engines.vllm.apart import apart
from weightbus.engines.vllm.placement import Place, place_of
from weightbus.errors import SpecError


def parallel(**changes):
    usual = {
        "rank": 0,
        "world_size": 1,
        "data_parallel_size": 1,
        "data_parallel_rank": 0,
        "data_parallel_index": 0,
        "enable_eplb": False,
    }
    made = SimpleNamespace(**usual | changes)
    made.world_size_across_dp = made.world_size * made.data_parallel_size
    return made


@pytest.mark.parametrize(
    ("changes", "first", "expected"),
    [
        ({}, 0, (0, 1, 0)),
        ({"rank": 3, "world_size": 4}, 2, (3, 4, 2)),
        ({"rank": 1, "world_size": 2, "data_parallel_index": 3}, 4, (1, 2, 7)),
        ({"rank": 1, "world_size": 2, "data_parallel_size": 4, "data_parallel_rank": 3}, 5, (7, 8, 5)),
    ],
    ids=["one", "tensor parallel", "a dense copy for each data rank", "experts over data ranks"],
)
def test_places(changes, first, expected):
    rank, size, replica = expected
    assert place_of(parallel(**changes), first) == Place(rank=rank, size=size, replica=replica)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "1.0"])
def test_another_version_is_refused_by_name(version):
    with pytest.raises(SpecError, match=rf"expected version 0.32 or 0.33, got {version}"):
        plugin.support(version)


def test_nothing_is_registered_with_another_version(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "installed", lambda: "0.31.2")
    plugin.register()
    assert "got 0.31.2" in caplog.text


class UnquantizedLinearMethod:
    pass


class Fp8LinearMethod:
    pass


class UnquantizedFusedMoEMethod:
    def __init__(self, backend):
        self.unquantized_backend = SimpleNamespace(name=backend)


def config(**changes):
    usual = {"quant_config": None, "lora_config": None, "parallel_config": parallel()}
    return SimpleNamespace(**usual | changes)


def layer(method=None, **tensors):
    made = nn.Module()
    for name, tensor in {"weight": torch.ones(2, 2), **tensors}.items():
        made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    if method is not None:
        made.quant_method = method
    return nn.ModuleDict({"layer": made})


REFUSED = [
    (
        layer(UnquantizedLinearMethod()),
        config(quant_config=object()),
        "quantization: expected none, got object",
    ),
    (layer(UnquantizedLinearMethod()), config(lora_config=object()), "enable_lora: expected False"),
    (layer(), config(parallel_config=parallel(enable_eplb=True)), "enable_eplb: expected False"),
    (layer(Fp8LinearMethod()), config(), "layer: expected a method .* got Fp8LinearMethod"),
    (layer(weight=torch.empty(0)), config(), r"layer.weight: expected the weight .* got shape \[0\]"),
    (
        layer(UnquantizedFusedMoEMethod("FLASHINFER_TRTLLM")),
        config(),
        "FLASHINFER_TRTLLM, .* moe_backend='triton'",
    ),
    (layer(UnquantizedFusedMoEMethod("CPU")), config(), "layer: expected experts that were kept as loaded"),
]


@pytest.mark.parametrize(("model", "vllm_config", "text"), REFUSED, ids=[text[:20] for _, _, text in REFUSED])
def test_what_can_not_be_kept_right_is_refused_by_name(model, vllm_config, text):
    with pytest.raises(SpecError, match=text):
        admit(model, vllm_config)


def test_scales_and_caches_are_local():
    model = layer(UnquantizedLinearMethod())
    model["layer"].register_buffer("_k_scale", torch.ones(()))
    model["layer"].kv_cache = [torch.zeros(2)]
    assert set(admit(model, config()).local) == {"layer._k_scale", "layer.kv_cache", "layer.kv_cache[[]*"}


class Latent(nn.Module):
    def __init__(self, copied):
        super().__init__()
        self.kv_b_proj = nn.Linear(4, 6, bias=False)
        view = self.kv_b_proj.weight.data.t().view(4, 2, 3)[..., :1]
        self.W_UV = nn.Parameter(view.clone() if copied else view, requires_grad=False)


def test_views_of_latent_attention_are_local_and_copies_refused():
    assert admit(nn.ModuleDict({"a": Latent(copied=False)}), config()).local == ("a.W_UV",)
    with pytest.raises(SpecError, match=r"a.W_UV: expected a view of kv_b_proj"):
        admit(nn.ModuleDict({"a": Latent(copied=True)}), config())


class Experts:
    """As vLLM's for the CPU: packs into others of the same shape, and computes with what it is given."""

    def process(self, held):
        for name in ("w13_weight", "w2_weight"):
            held._parameters[name] = nn.Parameter(
                held._parameters[name].data.flip(0).clone(), requires_grad=False
            )

    def apply(self, output, hidden_states, w1, w2, scale):
        output.copy_(scale * (w1.sum() + 10 * w2[0].sum()) * hidden_states)


def test_experts_keep_their_weights_and_compute_with_a_packed_copy():
    held, experts = nn.Module(), Experts()
    for name in ("w13_weight", "w2_weight"):
        held.register_parameter(name, nn.Parameter(torch.arange(4.0).reshape(2, 2), requires_grad=False))
    plain = held.w13_weight
    layouts.keep_experts(Experts.process, lambda: True)(experts, held)
    assert held.w13_weight is plain
    assert torch.equal(plain, torch.arange(4.0).reshape(2, 2))
    assert torch.equal(held.weightbus_packed_w2, torch.tensor([[2.0, 3.0], [0.0, 1.0]]))
    out = torch.zeros(1)
    layouts.use_packed(Experts.apply)(experts, out, torch.ones(1), held.w13_weight, held.w2_weight, scale=1)
    assert out.item() == 6 + 10 * 5, "the packed w2 is used"

    plain.fill_(7.0)
    made = layouts.derived(held)
    assert set(made) == set(layouts.PACKED.values())
    assert torch.equal(made["weightbus_packed_w13"](held)["weightbus_packed_w13"], torch.full((2, 2), 7.0))
    assert layouts.is_packed(held)
    assert admit(nn.ModuleDict({"e": held}), config()).derived.keys() == {f"e.{name}" for name in made}


def test_experts_whose_bias_is_padded_are_refused():
    class Padded(Experts):
        def process(self, held):
            held.bias.data = torch.zeros(3)

    held = nn.Module()
    held.register_parameter("bias", nn.Parameter(torch.zeros(2)))
    with pytest.raises(
        SpecError, match="bias: expected experts of which only w13_weight, w2_weight are packed"
    ):
        layouts.keep_experts(Padded.process, lambda: True)(Padded(), held)
    assert held.bias.shape == (2,)


@pytest.mark.parametrize("asked", [True, False])
def test_linear_layers_are_packed_only_for_others(asked):
    packed = []
    keep = layouts.keep_linear(lambda layer, remove_weight: packed.append(layer), lambda: asked)
    one = nn.Linear(2, 2)
    keep(one, remove_weight=True)
    assert layouts.is_kept(one) is asked
    assert packed == ([] if asked else [one])
    if asked:
        assert torch.equal(one.cpu_linear(torch.ones(1, 2), one.weight, None), one.weight.sum(1)[None])


def test_the_checkpoint_that_was_loaded(tmp_path):
    model, auto = SimpleNamespace(model=str(tmp_path)), SimpleNamespace(load_format="auto")
    assert checkpoint_of(model, auto) is None
    (tmp_path / "model.safetensors").touch()
    assert checkpoint_of(model, auto) == tmp_path
    assert checkpoint_of(model, SimpleNamespace(load_format="dummy")) is None


def test_what_stands_in_for_registries_is_the_same_each_time_and_stays_empty():
    """Else each update would find the model's tree changed (docs/tree.md), and look into all of it again."""
    own = SimpleNamespace(static_forward_context={"a": 1}, static_all_moe_layers=["b"])
    before, seen = vars(own).copy(), []
    for _ in range(2):
        with apart(SimpleNamespace(compilation_config=own)):
            own.static_forward_context["c"] = 2
            own.static_all_moe_layers.append("d")
            seen.append([id(value) for value in vars(own).values()])
            assert [len(value) for value in vars(own).values()] == [0, 0]
            own.static_forward_context.update(e=3)  # which does not ask ``__setitem__``
            own.static_all_moe_layers.extend("f")
    assert seen[0] == seen[1]
    assert vars(own) == before == {"static_forward_context": {"a": 1}, "static_all_moe_layers": ["b"]}
