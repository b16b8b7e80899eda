"""``perturb``: every element changes, nothing else does."""

from __future__ import annotations

import pytest
import torch
from models import Toy, fill, values
from perturbed import bits, check_every_element_changes
from torch import Tensor, nn

from weightbus import SpecError, perturb
from weightbus.tensors import perturbation


def test_every_element_changes() -> None:
    check_every_element_changes("cpu")


def test_what_lies_between_is_left_alone() -> None:
    wide = torch.zeros(6, 10)
    perturb([("view", wide[1:3, ::2])])
    untouched = torch.ones(6, 10, dtype=torch.bool)
    untouched[1:3, ::2] = False
    assert torch.equal(wide == 0, untouched)


def test_a_seed_decides() -> None:
    def drawn(seed: int, version: int = 1) -> dict[str, Tensor]:
        model = Toy()
        fill(model, values(version))
        perturb(model, seed=seed)
        return {name: bits(tensor) for name, tensor in model.state_dict().items()}

    one, again, other, from_other = drawn(1), drawn(1), drawn(2), drawn(1, version=2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["big"], other["big"])
    assert torch.equal(one["big"], from_other["big"])
    assert not torch.equal(one["up.weight"][:100], one["big"][:100])


def test_global_random_state_is_left_alone() -> None:
    model = Toy()
    state = torch.get_rng_state()
    perturb(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_once_and_buffers_as_asked() -> None:
    model = Toy()
    fill(model, values(1))
    weight, scratch = model.embed.weight.detach().clone(), model.scratch.clone()
    perturb(model)
    assert model.head.weight is model.embed.weight
    assert (model.embed.weight != weight).all()
    assert torch.equal(model.scratch, scratch)
    perturb(model, persistent_only=False)
    assert (model.scratch != scratch).all()


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbation, "CHUNK_ELEMENTS", 100)
    tensor = torch.zeros(7, 90, dtype=torch.int16)
    perturb([("t", tensor.t())])
    assert (tensor != 0).all()
    assert len(tensor.unique()) > 500


def test_autograd_knows() -> None:
    """A weight that changes between forward and backward is an error, as for any write in place."""
    layer = nn.Linear(3, 3)
    loss = layer(torch.ones(2, 3, requires_grad=True)).sum()
    perturb(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shared_memory_is_refused_before_a_write() -> None:
    tensor = torch.zeros(10)
    with pytest.raises(SpecError, match="b: expected memory of its own, got some that c has too"):
        perturb([("a", torch.zeros(3)), ("b", tensor[:6]), ("c", tensor[4:])])
    with pytest.raises(SpecError, match="e: expected memory of its own"):
        perturb([("d", tensor), ("e", torch.zeros(1).expand(5))])
    assert not tensor.any()
