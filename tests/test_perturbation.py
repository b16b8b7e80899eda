"""``perturb``: every element changes, nothing else does."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import Toy, fill, values
from torch import Tensor, nn

from weightbus import SpecError, perturb, perturbation
from weightbus.spec import ITEMSIZE

SHAPES = [(), (1,), (70,), (5, 7), (0, 3), (2, 3, 4)]


def everything(device: str = "cpu") -> dict[str, Tensor]:
    """Each dtype in several shapes, also strided; zeros and ones."""
    tensors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that complex32 is young
        for name in ITEMSIZE:
            dtype = getattr(torch, name)
            for shape in SHAPES:
                tensors[f"{name}{list(shape)}"] = torch.zeros(shape, dtype=dtype, device=device)
            wide = torch.zeros(6, 10, dtype=dtype, device=device)
            tensors[f"{name} strided"] = wide.t()[::3, 1:4]
            tensors[f"{name} ones"] = torch.zeros(4, device=device).exp().to(dtype)
    return tensors


def bits(tensor: Tensor) -> Tensor:
    """Bytes of each element along a last axis."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
        tensor.itemsize, tensor.dtype
    )
    flat = tensor.detach().view(integers).cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), flat.itemsize)


def check_every_element_changes(device: str) -> None:
    tensors = everything(device)
    for _ in range(3):  # the same draw again must be told from what it left
        before = {name: bits(tensor) for name, tensor in tensors.items()}
        places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        perturb(tensors.items(), seed=5)
        for name, tensor in tensors.items():
            same = (bits(tensor) == before[name]).all(1)
            assert not same.any(), name
            assert tensor.data_ptr() == places[name]
            if tensor.dtype.is_floating_point and tensor.numel():
                size = tensor.cpu().double().abs()
                assert size.isfinite().all(), name
                assert size.ge(0.0078).all(), name
                assert size.le(256).all(), name


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
