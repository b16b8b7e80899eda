"""Loading code of a test's, beside itself called with the data: what weightbus says of it must be so."""

from __future__ import annotations

import torch
from torch import nn

import weightbus
from weightbus.errors import UpdateError


class Engine(nn.Module):
    """Parameters of the given shapes, and loading code of the test's. kept: what that keeps between calls."""

    def __init__(self, shapes, load, fill=9.0, dtype=torch.float32):
        super().__init__()
        for name, shape in shapes.items():
            tensor = torch.full(shape, fill).to(dtype)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.load = load
        self.kept = {}

    def load_weights(self, weights):
        return self.load(self, weights)


def numbers(shapes, dtype=torch.float32):
    """Distinct values in every element."""
    first, found = 1.0, {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(first, first + count).view(shape).to(dtype)
        first += count
    return found


def held(engine):
    return {name: tensor.detach().clone() for name, tensor in engine.named_parameters()}


def words_of(make, sent, rounds=2, **options):
    """What each update said, ``refused`` among it: proved or partial, the engine holds what the loading code
    makes of the data, in the tensors that it had; after a refusal, what it held before."""
    engine, by_itself = make(), make()
    tensors = dict(engine.named_parameters())
    words = []
    with weightbus.colocate(list(sent.items()), engine, **options) as pair:
        for version in range(1, rounds + 1):
            before, state = held(engine), pair.state
            try:
                words.append(pair.update(version).word)
                with torch.no_grad():
                    by_itself.load_weights((name, tensor.clone()) for name, tensor in sent.items())
                assert pair.check().word == words[-1]
                expected = held(by_itself)
            except UpdateError:
                words.append("refused")
                assert pair.state == state
                expected = before
            for name, tensor in engine.named_parameters():
                assert tensor is tensors[name]
                assert torch.equal(tensor, expected[name]), f"{words[-1]}, and {name} is wrong"
            for tensor in sent.values():
                tensor.add_(version)
    return words
