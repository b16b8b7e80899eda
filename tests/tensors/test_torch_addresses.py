"""Whether tensors still lie where they did with the extension and without."""

import pytest
import torch

from weightbus.tensors import torch_addresses as addresses
from weightbus.tensors.torch_addresses import Addresses


@pytest.fixture(params=["extension", "python"])
def how(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(addresses, "_extension", None)
    elif addresses._extension is None:
        pytest.skip("the extension is not built")
    return request.param


def tensors():
    return [
        torch.zeros(3),
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.zeros(0),
        torch.zeros(8)[3:],
        *(torch.zeros(1) for _ in range(40)),
    ]


def test_the_extension_serves_where_it_is_built(how):
    assert (Addresses(tensors())._offset > 0) == (how == "extension")


@pytest.mark.parametrize("index", [0, 1, 3, 20, 43])
def test_a_tensor_with_another_storage_is_found(how, index):
    held = tensors()
    watch = Addresses(held)
    assert watch.moved(held) is None
    held[index].data = torch.zeros(5)
    assert watch.moved(held) == index


def test_a_tensor_that_moves_within_its_storage_is_found(how):
    held = tensors()
    watch = Addresses(held)
    held[3].set_(held[3].untyped_storage(), 1, (5,), (1,))
    assert watch.moved(held) == 3


def test_another_implementation_at_the_same_address_is_the_same(how):
    """As after ``swap_tensors``: the object stays, and so does the memory."""
    held = tensors()
    watch = Addresses(held)
    other = torch.empty(0).set_(held[0].untyped_storage(), 0, (3,), (1,))
    torch.utils.swap_tensors(held[0], other)
    del other
    assert watch.moved(held) is None
    torch.utils.swap_tensors(held[1], torch.nn.Parameter(torch.ones(2, 2)))
    assert watch.moved(held) == 1


def test_no_tensors_have_not_moved(how):
    assert Addresses([]).moved([]) is None
