"""What engines' classes have about them: schemas of their settings, steps that take a dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightbus
from weightbus.inventory.tree import MAX_DEPTH, tree_of


def model(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def test_a_schema_of_a_class_of_settings_is_not_looked_into():
    class Settings:
        __pydantic_core_schema__: list[object]

    nest: list[object] = []
    Settings.__pydantic_core_schema__ = nest
    for _ in range(MAX_DEPTH + 3):
        nest.append([])
        nest = nest[0]  # type: ignore[assignment]
    target = model(2)
    target.settings = Settings()
    assert tree_of({"": target}).unseen == {}
    with weightbus.colocate(model(1), target, require_proof=True) as pair:
        assert pair.update(1).word == "verified"


@pytest.mark.parametrize("key", ["__shared__", "shared", "_shared"])
def test_other_names_of_a_class_are_looked_into(key):
    class Settings:
        pass

    setattr(Settings, key, [torch.ones(3)])
    target = model(2)
    target.settings = Settings()
    with weightbus.colocate(model(1), target) as pair:
        report = pair.update(1)
    assert report.word == "partial"
    assert [name for name in report.partial if key in name]


class Attention(nn.Module):
    """As vLLM's: its step after loading takes the dtype of activations."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        assert act_dtype is torch.get_default_dtype()


class Block(nn.Module):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config["size"], config["size"])
        self.attention = Attention()
        self.register_buffer("normalizer", torch.tensor(config["size"] ** 0.5), persistent=False)


def test_a_constant_beside_a_layer_whose_step_takes_a_dtype():
    with weightbus.colocate(Block({"size": 4}), Block({"size": 4}), require_proof=True) as pair:
        assert pair.update(1).word == "verified"
