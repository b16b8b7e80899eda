"""Conversions of tensors as moves of boxes: what they give is what running them gives, on any shard."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightbus.planning.box import Box
from weightbus.planning.spec import Spec
from weightbus.storage import conversion
from weightbus.storage.conversion import convert, unchanged
from weightbus.tensors.loaders.torch_joins import trace_conversion
from weightbus.tensors.loaders.trace import Untraceable

STEPS = ["stack", "cat", "transpose", "chunk", "narrow", "contiguous", "unsqueeze", "clone", "interleave"]


def step(kind, tensors, data):
    """One step of a conversion, over a list of tensors of one shape."""
    first = tensors[0]
    dim = data.draw(st.integers(0, first.dim() - 1), label="dim")
    if kind in ("stack", "cat"):
        count = data.draw(st.integers(1, len(tensors)), label="count")
        join = getattr(torch, kind)
        groups = [tensors[i : i + count] for i in range(0, len(tensors) - count + 1, count)]
        return [join(group, dim=dim) for group in groups]
    if kind == "transpose":
        return [
            t.transpose(dim, data.draw(st.integers(0, first.dim() - 1), label="other")) for t in tensors[:1]
        ]
    if kind == "chunk":
        count = data.draw(st.integers(1, 3))
        if first.shape[dim] % count:
            return tensors
        return [part for t in tensors for part in t.chunk(count, dim=dim)]
    if kind == "narrow":
        return [t.narrow(dim, 1, t.shape[dim] - 1) for t in tensors] if first.shape[dim] > 1 else tensors
    if kind == "unsqueeze":
        return [t.unsqueeze(dim) for t in tensors] if first.dim() < 4 else tensors
    if kind == "interleave":
        if first.shape[dim] % 2:
            return tensors
        shape = [*first.shape[:dim], first.shape[dim] // 2, 2, *first.shape[dim + 1 :]]
        return [t.reshape(shape).transpose(dim, dim + 1).reshape(first.shape) for t in tensors]
    return [getattr(t, kind)() for t in tensors]


def place(moves, tensors, held, view):
    for move in moves:
        if (part := move.within(held, view)) is not None:
            box, target = part
            source = tensors[move.wire]
            assert box.inside(source.shape)
            target.copy_(source[box.within(Box.whole(source.shape))])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_moves_give_what_the_conversion_gives(data):
    """Whole, and on a shard of it, whose memory lies in any strides."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    count = data.draw(st.integers(1, 4))
    kinds = data.draw(st.lists(st.sampled_from(STEPS), max_size=5))
    numbers = torch.arange(float(count * torch.Size(shape).numel())).view(count, *shape)
    tensors = {f"t{i}": numbers[i].clone() for i in range(count)}
    drawn = []

    class Replay:
        """The same draws, on data and without."""

        def __init__(self):
            self.left = list(drawn)

        def draw(self, strategy, label=None):
            if self.left:
                return self.left.pop(0)
            value = data.draw(strategy, label=label)
            drawn.append(value)
            return value

    def run(given):
        left, draws = list(given.values()), Replay()
        for kind in kinds:
            left = step(kind, left, draws)
        return {f"m{i}": tensor for i, tensor in enumerate(left)}

    expected = run(tensors)
    try:
        found = trace_conversion(run, {name: (tuple(t.shape), "float32") for name, t in tensors.items()})
    except Untraceable:
        assert "interleave" in kinds  # reshapes of reshapes may cut rows; all else is boxes
        return
    assert found.keys() == expected.keys()
    for name, (made, dtype, moves) in found.items():
        assert (made, dtype) == (tuple(expected[name].shape), "float32")
        assert sum(move.box.volume for move in moves) == expected[name].numel()
        whole = torch.full(made, -1.0)
        place(moves, tensors, Box.whole(made), whole)
        assert torch.equal(whole, expected[name])
        offsets = [data.draw(st.integers(0, n - 1)) for n in made]
        sizes = [data.draw(st.integers(1, n - o)) for n, o in zip(made, offsets, strict=True)]
        held = Box(tuple(offsets), tuple(sizes))
        shard = torch.full(sizes[::-1], -1.0).permute(*range(len(sizes))[::-1])
        place(moves, tensors, held, shard)
        assert torch.equal(shard, expected[name][held.within(Box.whole(made))])


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda t: {"m": t["a"] + 1}, "it computes with weights"),
        (lambda t: {"m": t["a"].half()}, "casts|computes|not of those"),
        (lambda t: {"m": torch.zeros(2, 3)}, "not of those that it was given"),
        (
            lambda t: {"m": torch.cat([t["a"], torch.zeros(1, 3, device="meta")])},
            "joins weights with what is none",
        ),
        (lambda t: {"m": torch.cat([t["a"], t["b"]])}, "joins weights .* another dtype"),
        (lambda t: {"m": t["a"].add_(1)}, "it changes tensors"),
        (lambda t: {"m": t["missing"]}, "raised KeyError"),
        (lambda t: {"m": t["a"].expand(4, 2, 3)}, "one element to several places"),
    ],
)
def test_what_is_more_than_moving_is_refused(run, reason):
    with pytest.raises(Untraceable, match=reason):
        trace_conversion(run, {"a": ((2, 3), "float32"), "b": ((2, 3), "float16")})


def test_names_that_a_class_leaves_out():
    """As of a model of transformers, by its attribute, and of any by what older versions saved."""
    base = type("PreTrainedModel", (nn.Linear,), {"__module__": "transformers.modeling_utils"})
    model = type("Mine", (base,), {"_keys_to_ignore_on_load_unexpected": [r"^mtp\."]})(2, 3)
    model.register_buffer("inv_freq", torch.zeros(1), persistent=False)
    names = ["weight", "mtp.0.weight", "model.rotary_emb.inv_freq", "other"]
    specs = {f"m.{n}": Spec(name=f"m.{n}", dtype="float32", shape=(3, 2)) for n in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_grouped", lambda model, given, own: {n: (None, [(n, n)]) for n in given})
        found = convert(specs, {"m.": model}, {"m.weight": (3, 2)})
    assert found.ignored == {"m.mtp.0.weight", "m.model.rotary_emb.inv_freq"}
    assert list(found.specs) == ["m.weight", "m.other"]  # the last one is for others to refuse


def test_models_of_no_library_take_tensors_as_they_are():
    specs = {
        "m.x": Spec(name="m.x", dtype="float32", shape=(2, 3)),
        "s": Spec(name="s", dtype="int64", shape=()),
    }
    found = convert(specs, {"m.": nn.Linear(2, 3)}, {"m.weight": (3, 2)})
    assert found == unchanged(specs)
    ((move,), (scalar,)) = found.moves.values()
    view = torch.zeros(2, 3)
    assert move.within(Box((0, 1), (2, 2)), view[:, 1:]) is not None
    assert move.within(Box((0, 0), (0, 3)), view[:0]) is None
    box, part = scalar.within(Box.whole(()), torch.zeros(()))
    assert (box, part.shape) == (Box.whole(()), ())
