"""Of drawn module trees: no byte within reach changes unseen, unless the report had named its tensor."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightbus

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


class Table(nn.Module):
    """A constant, and a weight beside it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size + 1))
        self.register_buffer("table", torch.arange(size) / 7, persistent=False)
        self.tables = {"a": [torch.arange(size) * 3]}


class Box:
    __slots__ = ("inner",)


def value(shape, dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


SHAPES = st.sampled_from([(), (3,), (4, 5), (2, 3, 2), (0, 4)])
PLACES = ("parameter", "buffer", "persistent", "attribute", "list", "dict", "slots", "tuple")
FORMS = ("new", "tie", "view", "copy", "column", "beyond")


@st.composite
def plans(draw):
    """How to build a tree: paths of modules, and what to put where; the same for source and target."""
    paths = draw(
        st.lists(st.sampled_from(["", "a", "a.b", "c", "c.d", "c.d.e"]), min_size=1, max_size=4, unique=True)
    )
    tensors = draw(
        st.lists(
            st.tuples(
                st.sampled_from(paths),
                st.sampled_from(PLACES),
                st.sampled_from(FORMS),
                SHAPES,
                st.sampled_from(DTYPES),
            ),
            min_size=1,
            max_size=8,
        )
    )
    tables = draw(st.lists(st.sampled_from(paths), max_size=2, unique=True))
    keys = draw(st.sampled_from([None, ("m", "n"), ("m", "m.n"), ("m.n.o", "m.n")]))
    return paths, tensors, tables, keys


def made(form: str, weight: Tensor, shape, dtype, seed: int) -> Tensor:
    if form in ("tie", "view") and weight.dim() == 2:
        return weight if form == "tie" else weight[1:].t()
    if form == "column" and weight.dim() == 2:
        return weight[:, 1]
    if form == "copy":
        return weight.detach().clone() + 1
    if form == "beyond" and weight.dim() == 2:
        memory = weight.detach().untyped_storage()
        return torch.empty(0, dtype=torch.uint8).set_(memory)
    return value(shape, dtype, seed)


def put(module: nn.Module, place: str, key: str, tensor: Tensor) -> str:
    """Where it is now, within the module."""
    plain = tensor.detach() if not isinstance(tensor, nn.Parameter) else tensor
    match place:
        case "parameter":
            own = plain if isinstance(plain, nn.Parameter) else nn.Parameter(plain, requires_grad=False)
            module.register_parameter(key, own)
        case "buffer" | "persistent":
            module.register_buffer(key, plain.detach(), persistent=place == "persistent")
        case "attribute":
            module.__dict__[key] = plain
        case "list":
            module.__dict__[key] = [None, [plain]]
            return f"{key}[1][0]"
        case "dict":
            module.__dict__[key] = {"x": plain}
            return f"{key}['x']"
        case "slots":
            module.__dict__[key] = box = Box()
            box.inner = plain
            return f"{key}.inner"
        case "tuple":
            module.__dict__[key] = (plain, "name")
            return f"{key}[0]"
    return key


def build(plan, seed: int):
    """The module or mapping, and every tensor that was placed, by name."""
    paths, tensors, tables, keys = plan
    tops = [("", nn.Module())] if keys is None else [(f"{key}.", nn.Module()) for key in keys]
    held: dict[str, Tensor] = {}
    for at, (prefix, top) in enumerate(tops):
        modules = {"": top}
        for path in ["a", "c", *paths]:
            parent = top
            for key in filter(None, path.split(".")):
                if not hasattr(parent, key):
                    parent.add_module(key, nn.Module())
                parent = getattr(parent, key)
            modules[path] = parent
        memory = value((5, 6), torch.float32, seed + at)
        weight = top.weight = nn.Parameter(memory[:4])
        held[f"{prefix}weight"] = weight
        for index, (path, place, form, shape, dtype) in enumerate(tensors):
            inside = f"{path}." if path else ""
            tensor = made(form, weight, shape, dtype, seed + 10 * index + at)
            if place in ("parameter", "persistent") and form in ("view", "column", "beyond"):
                place = "attribute"  # two destinations over one memory are refused
            name = put(modules[path], place, f"t{index}", tensor)
            held[f"{prefix}{inside}{name}"] = tensor
        for path in tables:
            inside = f"{path}." if path else ""
            table = Table(3)
            modules[path].add_module("constants", table)
            held[f"{prefix}{inside}constants.table"] = table.table
            held[f"{prefix}{inside}constants.tables['a'][0]"] = table.tables["a"][0]
    model = tops[0][1] if keys is None else {key: top for key, (_, top) in zip(keys, tops, strict=True)}
    return model, {name: tensor for name, tensor in held.items() if tensor.numel()}


def flip(tensor: Tensor, element: int, byte: int, bit: int) -> None:
    """Change one bit of one element, where it lies."""
    index = torch.arange(tensor.numel()).reshape(tensor.shape).eq(element % tensor.numel()).nonzero()[0]
    offset = tensor.storage_offset() + sum(int(i) * s for i, s in zip(index, tensor.stride(), strict=True))
    data = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    data[offset * tensor.itemsize + byte % tensor.itemsize] ^= 1 << bit


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), pick=st.tuples(*[st.integers(0, 1 << 16)] * 3), bit=st.integers(0, 7))
def test_no_byte_changes_unseen(plan, pick, bit):
    (source, _), (target, held) = build(plan, 1000), build(plan, 5000)
    names = sorted(held)
    name = names[pick[0] % len(names)]
    with weightbus.colocate(source, target) as pair:
        try:
            report = pair.update(1)
        except weightbus.UpdateError as error:
            if "shares part of its storage" not in str(error):
                raise
            return
        assert report.word in ("verified", "partial")
        assert bool(report.partial) == (report.word == "partial")
        before = pair.check()
        assert (before.word, before.partial) == (report.word, report.partial)
        flip(held[name], pick[1], pick[2], bit)
        verdict = pair.check()
    if name in report.partial:
        return
    assert verdict.word == "mismatch", f"{name} has changed, and nobody says so: {verdict}"
