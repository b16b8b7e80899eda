"""Loader hooks of the kinds that engines have, traced to boxes, against what they do to real tensors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightbus.planning.box import Box, less
from weightbus.tensors.loaders.torch_trace import trace
from weightbus.tensors.loaders.trace import Untraceable

RANKS = 4


class Column:
    """Rows split over ranks."""

    def load(self, param, loaded, rank):
        rows = param.data.shape[0]
        param.data.copy_(loaded.narrow(0, rank * rows, rows))


class Row:
    """Columns split over ranks; a cast and a contiguous copy on the way, as loaders like to do."""

    def load(self, param, loaded, rank):
        data = param.data
        shard = loaded.chunk(RANKS, 1)[rank].to(data.dtype).contiguous()
        assert shard.shape == data.shape
        data.copy_(shard)


class Merged:
    """gate and up stacked in one parameter."""

    def load(self, param, loaded, rank, which):
        half = param.data.shape[0] // 2
        param.data.narrow(0, which * half, half).copy_(loaded.chunk(RANKS, 0)[rank])


class QKV:
    """Rows of q, k and v; the key's and value's heads are fewer than ranks, so that ranks share one."""

    HEAD, KV = 8, 2
    ROWS: ClassVar[dict[str, tuple[int, int]]] = {"q": (0, 16), "k": (16, 8), "v": (24, 8)}

    def load(self, param, loaded, rank, which):
        start, rows = self.ROWS[which]
        piece = rank if which == "q" else rank // (RANKS // self.KV)
        param[start : start + rows].data.copy_(loaded[piece * rows : (piece + 1) * rows])


class Vocabulary:
    """A vocabulary padded to a multiple of the ranks; the tail is zeros."""

    WORDS = 37

    def load(self, param, loaded, rank):
        rows = param.shape[0]
        low, high = rank * rows, min((rank + 1) * rows, self.WORDS)
        param.data[: high - low].copy_(loaded[low:high])
        param.data[high - low :].fill_(0)


class FilledFirst:
    """Zeros everywhere, then the part that there is."""

    def load(self, param, loaded, rank):
        param.data.zero_()
        param.data[3:9, 2:7].copy_(loaded[rank : rank + 6, :5])


class Experts:
    """w1 and w3 stacked, w2 transposed, for one expert at a time."""

    def load(self, param, loaded, rank, expert, which):
        data = param.data[expert]
        if which == "w2":
            data.copy_(loaded.chunk(RANKS, 1)[rank].t())
            return
        half = data.shape[0] // 2
        data[half * (which == "w3") :][:half].copy_(loaded.chunk(RANKS, 0)[rank])


class Heads:
    """Viewed as heads, which change places: still boxes, one for each head."""

    def load(self, param, loaded, rank):
        heads = loaded.view(4, 2, 6, -1).transpose(0, 1).reshape(8, 6, -1)
        param.data.view(8, 6, -1).copy_(heads)


class Interleaved:
    """Every other row."""

    def load(self, param, loaded, rank, which):
        param.data[which::2].copy_(loaded)


class Flat:
    """By one flat view of both."""

    def load(self, param, loaded, rank):
        flat = loaded.reshape(-1)
        param.data.view(-1).copy_(flat.narrow(0, rank * param.numel(), param.numel()))


CASES = [
    ("column", Column(), (10, 12), (40, 12), ()),
    ("column-1d", Column(), (10,), (40,), ()),
    ("row", Row(), (12, 10), (12, 40), ()),
    ("gate", Merged(), (20, 12), (40, 12), (0,)),
    ("up", Merged(), (20, 12), (40, 12), (1,)),
    ("q", QKV(), (32, 12), (64, 12), ("q",)),
    ("k", QKV(), (32, 12), (16, 12), ("k",)),
    ("v", QKV(), (32, 12), (16, 12), ("v",)),
    ("vocabulary", Vocabulary(), (10, 12), (37, 12), ()),
    ("filled first", FilledFirst(), (10, 12), (9, 5), ()),
    ("w1", Experts(), (3, 10, 12), (20, 12), (1, "w1")),
    ("w3", Experts(), (3, 10, 12), (20, 12), (2, "w3")),
    ("w2", Experts(), (3, 5, 12), (12, 20), (0, "w2")),
    ("heads", Heads(), (48, 5), (48, 5), ()),
    ("interleaved", Interleaved(), (20, 7), (10, 7), (1,)),
    ("flat", Flat(), (10, 12), (40, 12), ()),
]

# Loaders that view a parameter as flat can't have one whose storage is transposed.
BOTH = [(False, *case) for case in CASES]
BOTH += [(True, *case) for case in CASES if len(case[2]) > 1 and case[0] not in ("flat", "heads")]


def numbered(shape, first=1):
    count = torch.Size(shape).numel()
    return torch.arange(first, first + count, dtype=torch.float64).view(shape)


def run(loader, parameter, wire, rank, arguments):
    """The loader on real tensors that hold their elements' numbers."""
    with torch.no_grad():
        loader.load(parameter, wire, rank, *arguments)


def traced(loader, parameter, shape, rank, arguments):
    def hook(parameters, loaded):
        loader.load(parameters["p"], loaded, rank, *arguments)

    return trace(hook, tuple(shape), parameter.dtype, {"p": parameter})["p"]


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(("transposed", "name", "loader", "shape", "wire_shape", "arguments"), BOTH)
def test_boxes_are_what_the_loader_does(transposed, name, loader, shape, wire_shape, arguments, rank):
    wire = numbered(wire_shape)
    fresh = numbered(shape, -1000)
    if transposed:
        fresh = fresh.transpose(0, -1).contiguous().transpose(0, -1)
    parameter = nn.Parameter(fresh.clone(memory_format=torch.preserve_format))
    before = parameter.detach().clone()
    effect = traced(loader, parameter, wire_shape, rank, arguments)
    assert torch.equal(parameter, before), "tracing touches nothing"
    run(loader, parameter, wire, rank, arguments)

    assert effect.pieces
    mine = before.clone(memory_format=torch.preserve_format)
    count = torch.zeros(shape)
    for fill in effect.fills:
        mine[fill.target.within(Box.whole(shape))] = fill.value
        count[fill.target.within(Box.whole(shape))] += 1
    for piece in effect.pieces:
        piece.view.of(mine).copy_(wire[piece.box.within(Box.whole(wire_shape))])
        count[piece.target.within(Box.whole(shape))] += 1
        held = mine[piece.target.within(Box.whole(shape))]
        assert torch.equal(
            held.flatten().sort().values, wire[piece.box.within(Box.whole(wire_shape))].flatten().sort().values
        )
    assert torch.equal(mine, parameter.detach())
    changed = parameter.detach() != before
    assert torch.equal(count, changed.float()), "each element that the loader writes is in one box"


class Parameter(nn.Parameter):
    """A parameter class with a loader of its own, as some engines have them."""

    def load_shard(self, loaded, rank):
        self.data.copy_(loaded.narrow(self.output_dim, rank * self.shape[0], self.shape[0]))


def test_a_parameter_class_with_attributes():
    parameter = Parameter(torch.zeros(10, 12))
    parameter.output_dim = 0
    effect = trace(lambda p, loaded: p["w"].load_shard(loaded, 2), (40, 12), torch.float32, {"w": parameter})[
        "w"
    ]
    assert [(piece.box, piece.target) for piece in effect.pieces] == [
        (Box((20, 0), (10, 12)), Box.whole((10, 12)))
    ]


OTHER = torch.ones(4, 3)
OPAQUE = {
    "computes": (lambda p, w: p.data.copy_(w * 2), "computes with weights"),
    "casts": (lambda p, w: p.data.copy_(w.to(torch.bfloat16)), "casts from torch.bfloat16"),
    "reinterprets": (
        lambda p, w: p.data.copy_(w.view(torch.int32)),
        "computes with weights, by aten.view.dtype",
    ),
    "looks": (lambda p, w: p.data.copy_(w if w.sum() > 0 else -w), "computes with weights, by aten.sum"),
    "adds": (lambda p, w: p.data.add_(w), "changes tensors by aten.add_"),
    "constants": (lambda p, w: p.data.copy_(OTHER), "not of the tensor that arrived"),
    "elsewhere": (lambda p, w: OTHER.copy_(w), "writes to a tensor that is no parameter"),
    "twice": (lambda p, w: (p.data[:2].copy_(w[:2]), p.data[1:3].copy_(w[:2])), "writes an element twice"),
    "broadcasts": (lambda p, w: p.data.copy_(w[:1]), "one element to several places"),
    "doubles": (lambda p, w: (p.data[:2].copy_(w[:2]), p.data[2:].copy_(w[:2])), "an element to two places"),
    "rebinds": (lambda p, w: setattr(p, "data", w), "another storage"),
    "numpy": (lambda p, w: w.numpy(), "asks for values, by numpy"),
    "raises": (lambda p, w: {}["q"], "raised KeyError"),
    "clears": (lambda p, w: (p.data.copy_(w), p.data[1].zero_()), "overwrites what it has copied"),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_what_cannot_be_traced_says_why_and_changes_nothing(kind):
    hook, reason = OPAQUE[kind]
    parameter = nn.Parameter(torch.full((4, 3), 5.0))
    with pytest.raises(Untraceable, match=reason):
        trace(lambda p, w: hook(p["w"], w), (4, 3), torch.float32, {"w": parameter})
    assert torch.equal(parameter, torch.full((4, 3), 5.0))
    assert torch.equal(OTHER, torch.ones(4, 3))


def boxes(shape):
    spans = [
        st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(
            lambda pair, n=n: (pair[0], min(pair[1], n - pair[0]))
        )
        for n in shape
    ]
    return st.tuples(*spans).map(lambda found: Box(tuple(o for o, _ in found), tuple(n for _, n in found)))


@settings(max_examples=200, deadline=None)
@given(boxes((5, 4, 3)), boxes((5, 4, 3)))
def test_less(one, other):
    marks = torch.zeros(5, 4, 3)
    for box in less(one, other):
        marks[box.within(Box.whole((5, 4, 3)))] += 1
    expected = torch.zeros(5, 4, 3)
    expected[one.within(Box.whole((5, 4, 3)))] = 1
    expected[other.within(Box.whole((5, 4, 3)))] = 0
    assert torch.equal(marks, expected)
