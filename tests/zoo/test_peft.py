"""Real PEFT models: what is sent computes what the model computes, merged or disabled; else it is refused."""

from __future__ import annotations

import peft
import pytest
import torch
from zoo import different, make, state

import weightbus

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("default")]

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "lora": peft.LoraConfig(**LORA),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "head": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "embedding": peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices=[1, 2, 3]),
    "parameters": peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
TOKENS = torch.arange(12)[None]


def adapted(config):
    """With adapters that are not at their beginning, where they change nothing."""
    model = peft.get_peft_model(make("qwen3", 1), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same(model, target):
    return torch.equal(model(TOKENS).logits, target(TOKENS).logits)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_model_with_adapters(name):
    model, target = adapted(CONFIGS[name]), make("qwen3", 2).eval()
    with weightbus.colocate(model, target) as pair:
        before = state(target)
        with pytest.raises(
            weightbus.UpdateError, match=r"the adapter 'default' is not merged; merge_adapter\(\)"
        ):
            pair.update(1)
        assert different(state(target), before) == []
        model.merge_adapter()
        report = pair.update(2)
        assert report.word == "verified"
        assert same(model, target)
        assert {n for n in report.skipped if "base_layer" in n or "base_model" in n} == set()
        assert report.skipped
        model.unmerge_adapter()
        with pytest.raises(weightbus.UpdateError, match="is not merged"):
            pair.update(3)
        with model.disable_adapter():
            assert pair.update(4).word == "verified"
            assert same(model, target)
        assert not same(model, target)
        assert pair.check().word == "verified"


def test_kinds_of_adapters_that_can_not_be_merged():
    target = make("qwen3", 2)
    prompted = peft.get_peft_model(
        make("qwen3", 1), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )
    with weightbus.colocate(prompted, target) as pair:
        with pytest.raises(weightbus.UpdateError, match="a learnt prompt is no weight of the model"):
            pair.update(1)
        with prompted.disable_adapter():
            assert pair.update(2).word == "verified"
    with weightbus.colocate(prompted.get_base_model(), target) as pair:
        assert pair.update(1).word == "verified"


def test_a_server_with_adapters():
    model = adapted(CONFIGS["head"])
    with weightbus.colocate(make("qwen3", 2), model) as pair:
        with pytest.raises(weightbus.UpdateError, match="is not merged"):
            pair.update(1)
        model.merge_adapter()
        partial = pair.update(2).partial
    assert partial
    assert all("lora_" in name or "original_module" in name for name in partial)
