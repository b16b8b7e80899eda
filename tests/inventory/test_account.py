"""What a model computes with besides its parameters: found, told, made again, and checked."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from unittest.mock import Mock

import msgspec
import pytest
import torch
from processes import Job, free_address, run_jobs
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import weightbus
from weightbus.control import messages as m
from weightbus.hub import server as hub
from weightbus.inventory.audit import Audit
from weightbus.inventory.constants import MAX_ENCLOSING
from weightbus.inventory.derived import STEPS
from weightbus.inventory.tree import MAX_DEPTH, tree_of
from weightbus.storage.digest_list import NAME as LIST
from weightbus.storage.digest_list import saved_of
from weightbus.tensors.install import Target
from weightbus.tensors.layout import layout_of
from weightbus.tools import load_command

SIZE = 6


def weights(seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)))


class Scale(nn.Module):
    """Computes from 1 + weight, made when it was built."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = weights(seed)
        self.one_plus = 1 + self.weight.detach()


@dataclass
class Packed:
    scales: dict[str, torch.Tensor] = field(default_factory=dict)


class Slotted:
    __slots__ = ("missing", "table")

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def look(self) -> torch.Tensor:
        return self.table


Pair = namedtuple("Pair", "left right")


def hold_attribute(module, tensor):
    module.copy = tensor
    return "copy"


def hold_buffer(module, tensor):
    module.register_buffer("copy", tensor, persistent=False)
    return "copy"


def hold_list(module, tensor):
    module.cache = [None, 3, tensor]
    return "cache[2]"


def hold_dataclass(module, tensor):
    module.quant = Packed({"w": tensor})
    return "quant.scales['w']"


def hold_slots(module, tensor):
    module.quant = Slotted(tensor)
    return "quant.table"


def hold_named_tuple(module, tensor):
    module.pair = (Pair(0, tensor),)
    return "pair[0].right"


def hold_partial(module, tensor):
    module.function = partial(torch.add, other=tensor)
    return "function.keywords['other']"


def hold_bound_method(module, tensor):
    module.apply_packed = Slotted(tensor).look
    return "apply_packed.__self__.table"


def hold_read_only_mapping(module, tensor):
    module.tables = MappingProxyType({"w": tensor})
    return "tables['w']"


def hold_values(module, tensor):
    module.tables = {"w": tensor}.values()
    return "tables[0]"


def hold_set(module, tensor):
    module.held = OrderedDict(deep={tensor})
    return "held['deep'][0]"


def hold_on_parameter(module, tensor):
    module.weight.scale = tensor
    return "weight.scale"


def hold_cycle(module, tensor):
    loop: list[object] = [tensor]
    loop.append({"back": loop, "module": module})
    module.loop = loop
    return "loop[0]"


def hold_unregistered_module(module, tensor):
    inner = nn.Module()
    inner.copy = tensor
    module.others = (inner,)
    return "others[0].copy"


def hold_on_class(module, tensor):
    module.__class__ = type("Own", (type(module),), {"TABLE": [tensor]})
    return "TABLE[0]"


PLACES = [value for name, value in globals().items() if name.startswith("hold_")]


@pytest.mark.parametrize("hold", PLACES, ids=lambda hold: hold.__name__.removeprefix("hold_"))
def test_copy_of_a_weight_is_named_wherever_it_is_held(hold):
    target = nn.Sequential(Scale(), nn.Linear(2, 2))
    del target[0].one_plus
    name = "0." + hold(target[0], target[0].weight.detach().t().contiguous())
    source = nn.Sequential(Scale(seed=1), nn.Linear(2, 2))
    with weightbus.colocate(source, target) as pair:
        report, verdict = pair.update(1), pair.check()
    assert (report.word, list(report.partial)) == ("partial", [name])
    assert (verdict.word, list(verdict.partial)) == ("partial", [name])
    assert name in str(report)
    assert name in str(verdict)


def test_what_is_nested_too_deep_is_named():
    target = Scale()
    target.one_plus = nest = []
    for _ in range(MAX_DEPTH + 3):
        nest.append([])
        nest = nest[0]
    nest.append(torch.ones(2))
    assert tree_of({"": target}).found[0].name == "weight"
    (reason,) = tree_of({"": target}).unseen.values()
    assert f"deeper than {MAX_DEPTH}" in reason


VIEWS = {
    "same": (lambda w: w, True),
    "transposed": (lambda w: w.t(), True),
    "diagonal": (lambda w: w.diagonal(), True),
    "other dtype": (lambda w: w.view(torch.int16), True),
    "bytes of all of the storage": (
        lambda w: torch.empty(0, dtype=torch.uint8).set_(w.untyped_storage()),
        False,
    ),
    "beyond": (lambda w: w.as_strided((SIZE + 1, SIZE), (SIZE, 1)), False),
    "next to it": (lambda w: w.as_strided((SIZE,), (1,), SIZE * SIZE), False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view_of_fed_storage_is_fed_as_far_as_it_goes(name):
    view, fed = VIEWS[name]
    source, target = Scale(1), Scale(2)
    memory = torch.randn(2 * SIZE, SIZE)
    target.weight = nn.Parameter(memory[:SIZE])
    target.one_plus = view(target.weight.detach())
    del source.one_plus
    with weightbus.colocate(source, target) as pair:
        assert list(pair.update(1).partial) == ([] if fed else ["one_plus"])


@pytest.mark.parametrize("step", [2, 3])
def test_view_between_rows_of_a_fed_column(step):
    """Both have gaps: the bytes are compared, not the extents."""
    memory = torch.randn(SIZE, 6)
    source, target = nn.Module(), nn.Module()
    source.weight = nn.Parameter(torch.randn(SIZE, 2))
    target.weight = nn.Parameter(memory[:, 0::step][:, :2])
    target.inside, target.between = memory[1:, step], memory[:, 1]
    with weightbus.colocate(source, target) as pair:
        assert list(pair.update(1).partial) == ["between"]


# -- constants -------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    def __init__(self, dim: int, base: float = 1e4, device: torch.device | None = None) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        frequencies = 1 / base ** (torch.arange(0, dim, 2, device=device).float() / dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mask = torch.full((dim, dim), -math.inf).triu(1)


class Block(nn.Module):
    """Its rotary's arguments are not kept by that; its own are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.randn(dim, dim))
        self.forgetful = Forgetful(dim + 2)
        self.rotary = Rotary(dim)


class Forgetful(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(length)[None], persistent=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_need_no_declaration(dtype):
    source, target = nn.Sequential(Block(4), Block(8)), nn.Sequential(Block(4), Block(8)).to(dtype)
    state = torch.random.get_rng_state()
    before = {name: id(module) for name, module in target.named_modules()}
    with weightbus.colocate(source, target, require_proof=True) as pair:
        assert pair.update(1).word == "verified"
        assert pair.check().word == "verified"
        with torch.no_grad():
            target[1].rotary.mask[2, 3] = 1
        verdict = pair.check()
    assert verdict.word == "mismatch"
    assert [(m.tensor, m.kind) for m in verdict.mismatches] == [("1.rotary.mask", "constant")]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert before == {name: id(module) for name, module in target.named_modules()}


class Deep(nn.Module):
    """Made of a configuration, and holds what is not, three modules down."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        for layer in range(config["layers"]):
            inner = nn.Sequential(Forgetful(config["length"] + layer), nn.Linear(2, 2))
            self.layers.append(nn.Sequential(inner))


def test_constants_are_found_by_a_module_far_around_that_is_made_of_a_config():
    config = {"layers": 3, "length": 5}
    with weightbus.colocate(Deep(config), Deep(config)) as pair:
        assert pair.update(1).word == "verified"


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("wrap", ["compiled", "sequential"])
def test_constants_and_copies_of_wrapped_models(wrap):
    source, target = nn.Sequential(Block(4), Scale(1)), nn.Sequential(Block(4), Scale(2))
    wrapped = {"compiled": torch.compile, "sequential": nn.Sequential}[wrap]
    with weightbus.colocate(wrapped(source), wrapped(target)) as pair:
        assert list(pair.update(1).partial) == ["1.one_plus" if wrap == "compiled" else "0.1.one_plus"]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_inside_of_wrapper_subclasses_are_looked_at():
    target = Scale(2)
    target.one_plus = TwoTensor(target.weight.detach(), target.weight.detach() + 1)
    target.sparse = (target.weight.detach() > 1).float().to_sparse()
    target.row = target.weight.detach().to_sparse_csr()
    with weightbus.colocate(Scale(1), target) as pair:
        partial = pair.update(1).partial
    assert set(partial) == {"one_plus.b", "sparse.indices", "sparse.values", "row"}
    assert "sparse_csr" in partial["row"]


def test_target_that_was_made_in_inference_mode():
    with torch.inference_mode():
        target = nn.Sequential(Rotary(4), Scale(2))
        target[1].weight = nn.Parameter(target[1].weight.clone(), requires_grad=False)
    source = nn.Sequential(Rotary(4), Scale(1))
    derived = {"1.one_plus": lambda scale: 1 + scale.weight}
    layout = layout_of(target)
    manifest = {name: spec for name, spec in layout.specs.items()}
    audit = Audit(target, local=(), derived=derived, require_proof=True, inputs=None)
    feeds = Target(layout, None, manifest, name_map=None, local=(), derived=tuple(derived), traces={})
    audit.begin(feeds)
    with torch.inference_mode():
        target[1].weight.copy_(source[1].weight)
    assert audit.derive(feeds, prove=True) == audit.check(feeds) == []
    assert torch.equal(target[1].one_plus, 1 + source[1].weight)


class Zeros(nn.Module):
    """Weights that start as zeros, so that what is made of them has the same bits in a second instance."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        weight = torch.zeros(SIZE)
        if way == "numpy before":
            self.made = torch.from_numpy(weight.numpy() + 1.5)
        self.weight = nn.Parameter(weight)
        match way:
            case "sum":
                self.made = self.weight.detach() + 1.5
            case "value":
                self.made = torch.full((SIZE,), self.weight.max().item() + 1.5)
            case "list":
                self.made = torch.tensor([w + 1.5 for w in self.weight.tolist()])
            case "numpy":
                self.made = torch.from_numpy(self.weight.detach().numpy() + 1.5)
            case "in place":
                self.made = torch.full((SIZE,), 1.5)
                self.made += self.weight.detach()
            case "again":
                nn.init.zeros_(self.weight)
                self.made = torch.tensor([w + 1.5 for w in self.weight.tolist()])
            case "buffer":
                self.register_buffer("scale", torch.full((SIZE,), 0.5))
                self.made = self.scale + 1
            case "given":
                self.made = 1.5 + GIVEN
            case "argument":
                self.made = torch.full((SIZE,), 2.5)
            case "no weight":
                self.made = torch.full((SIZE,), 2.5)


GIVEN = torch.zeros(SIZE)


@pytest.mark.parametrize(
    "way",
    ["sum", "value", "list", "numpy", "numpy before", "in place", "again", "buffer", "given", "no weight"],
)
def test_what_flowed_out_of_a_weight_is_no_constant(way):
    with weightbus.colocate(Zeros("no weight") if way != "buffer" else Zeros(way), Zeros(way)) as pair:
        assert list(pair.update(1).partial) == ([] if way == "no weight" else ["made"])


class Stepped(nn.Module):
    """Its post-load step makes ``packed`` of the weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = weights(seed)
        self.packed = torch.full((SIZE, SIZE), 0.5)

    def process_weights_after_loading(self) -> None:
        self.packed.copy_(self.weight.t())


def test_what_a_post_load_step_writes_is_no_constant():
    source, target = Stepped(1), Stepped(2)
    with weightbus.colocate(source, target) as pair:
        assert list(pair.update(1).partial) == ["packed"]


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
def test_place_that_code_fills_is_named_once_it_may_hold_something(fill):
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weights(0)
            self.cache = fill(3, 4)
            self.packed = fill(SIZE * SIZE)

    target = Cached()
    with weightbus.colocate(Cached(), target) as pair:
        assert list(pair.update(1).partial) == ["packed"], "as many elements as the weight has"
        assert list(pair.check().partial) == ["packed"]
        target.cache[1, 2] = 3
        for verdict in (pair.check(), pair.check()):
            assert (verdict.word, sorted(verdict.partial)) == ("partial", ["cache", "packed"])
    with weightbus.colocate(Cached(), Cached(), local=["cache", "packed"]) as pair:
        assert pair.update(1).word == "verified"


class Meddling(nn.Module):
    """A constructor that writes to what it is given, or to what it finds."""

    shared = torch.zeros(3)

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.weight = nn.Parameter(torch.zeros(SIZE))
        names.append("again")
        self.table = torch.arange(3.0)
        self.shared.add_(1)


def test_second_construction_changes_nothing_of_the_first():
    target = Meddling([])
    before = target.shared.clone()
    with weightbus.colocate(Zeros("no weight"), target) as pair:
        assert set(pair.update(1).partial) == {"table", "shared"}
    assert target.names == ["again"]
    assert torch.equal(target.shared, before)


# -- derived -------------------------------------------------------------------------------------------------


def test_function_makes_a_derived_tensor_again():
    source, target = nn.Sequential(Scale(1)), nn.Sequential(Scale(2))
    address = target[0].one_plus.data_ptr()
    with weightbus.colocate(source, target, derived={"*.one_plus": lambda scale: 1 + scale.weight}) as pair:
        assert pair.update(1).word == "verified"
        assert torch.equal(target[0].one_plus, 1 + source[0].weight)
        assert target[0].one_plus.data_ptr() == address
        assert pair.check().word == "verified"
        target[0].one_plus[1, 2] += 1
        verdict = pair.check()
    assert [(m.tensor, m.kind) for m in verdict.mismatches] == [("0.one_plus", "derived")]


@pytest.mark.parametrize("name", ["process_weights_after_loading", "weightbus_refresh"])
def test_post_load_step_makes_derived_tensors_again(name):
    class Engine(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = weights(seed)
            self.quant = Packed()
            self.steps = 0
            getattr(self, name)()

        def step(self) -> None:
            self.quant.scales["w"] = self.weight.detach().amax(0)
            self.steps += 1

    setattr(Engine, name, Engine.step)
    source, target = Engine(1), Engine(2)
    address = target.quant.scales["w"].data_ptr()
    with weightbus.colocate(source, target, derived=["quant.*"], require_proof=True) as pair:
        assert pair.update(1).word == "verified"
        assert pair.update(2).word == "verified"
    assert torch.equal(target.quant.scales["w"], source.quant.scales["w"])
    assert (target.quant.scales["w"].data_ptr(), target.steps) == (address, 1)


def test_function_may_make_several_tensors_of_a_module():
    target = Scale(2)
    target.halves = [target.weight.detach() / 2, target.weight.detach() * 2]
    derived = {"halves*": lambda m: {"halves[0]": m.weight / 2, "halves[1]": m.weight * 2}, "one_plus": None}
    with weightbus.colocate(Scale(1), target, derived=derived) as pair:
        report = pair.update(1)
    assert list(report.partial) == ["one_plus"]
    assert "without a function" in report.partial["one_plus"]
    assert torch.equal(target.halves[1], target.weight * 2)


def test_derived_tensors_may_be_made_of_each_other():
    source, target = Scale(1), Scale(2)
    target.a_double = target.one_plus * 2
    derived = {"a_double": lambda m: m.one_plus * 2, "one_plus": lambda m: 1 + m.weight}
    source.one_plus = None
    with weightbus.colocate(source, target, derived=derived) as pair:
        assert pair.update(1).word == "verified"
    assert torch.equal(target.a_double, (1 + source.weight) * 2)


class Hostile(list):
    def __iter__(self):
        raise RuntimeError("not now")


def test_object_that_can_not_be_looked_at_is_named():
    target = Scale(2)
    target.one_plus = Hostile([torch.ones(2)])
    with weightbus.colocate(Scale(1), target) as pair:
        assert pair.update(1).partial == {"one_plus": "looking at it raised RuntimeError"}


def test_scale_that_a_weight_gets_later_is_named_by_the_next_update():
    target = Scale(2)
    target.one_plus = None
    with weightbus.colocate(Scale(1), target) as pair:
        assert pair.update(1).word == "verified"
        target.weight.scale = torch.rand(2)
        assert list(pair.update(2).partial) == ["weight.scale"]


def fails(module):
    raise RuntimeError("no such kernel")


BAD = {
    "raises": (fails, "RuntimeError: no such kernel"),
    "shape": (lambda m: m.weight[:1] + 1, r"expected torch.float32 \[6, 6\]"),
    "dtype": (lambda m: (m.weight + 1).double(), "got torch.float64"),
    "nothing": (lambda m: None, "got a NoneType"),
    "the live one": (lambda m: m.one_plus, "expected a new tensor"),
    "writes": (lambda m: m.one_plus.add_(1), "writes to live tensors"),
    "another name": (lambda m: {"two_plus": m.weight + 1}, "expected a tensor from"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_function_is_refused_before_a_byte_moves(name):
    function, reason = BAD[name]
    source, target = Scale(1), Scale(2)
    before = target.weight.detach().clone(), target.one_plus.clone()
    with weightbus.colocate(source, target, derived={"one_plus": function}) as pair:
        with pytest.raises(weightbus.UpdateError, match=f"one_plus.*{reason}"):
            pair.update(1)
        assert pair.state == "empty"
    assert torch.equal(target.weight, before[0])
    assert torch.equal(target.one_plus, before[1])


def test_function_that_fails_later_leaves_the_rank_torn():
    calls = []

    def make(module):
        calls.append(module)
        if len(calls) > 1:
            raise RuntimeError("out of luck")
        return module.weight + 1

    with weightbus.colocate(Scale(1), Scale(2), derived={"one_plus": make}) as pair:
        with pytest.raises(weightbus.TornError, match=r"one_plus.*out of luck"):
            pair.update(1)
        assert pair.state == "torn"


def test_function_that_is_not_repeatable_proves_nothing():
    with (
        weightbus.colocate(
            Scale(1), Scale(2), derived={"one_plus": lambda m: m.weight * torch.rand(1)}
        ) as pair,
        pytest.raises(weightbus.TornError, match=r"one_plus.*other bytes"),
    ):
        pair.update(1)


def test_derived_parameter_is_made_again():
    class Engine(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = weights(seed)
            self.turned = nn.Parameter(self.weight.detach().t().contiguous())

    source, target = Engine(1), Engine(2)
    del source.turned
    with weightbus.colocate(source, target, derived={"turned": lambda m: m.weight.t().contiguous()}) as pair:
        assert pair.update(1).word == "verified"
    assert torch.equal(target.turned, source.weight.t())


# -- words -----------------------------------------------------------------------------------------------------


def test_proof_can_be_required():
    source, target = Scale(1), Scale(2)
    before = target.weight.detach().clone()
    with weightbus.colocate(source, target, require_proof=True) as pair:
        with pytest.raises(weightbus.UpdateError, match=r"one_plus: expected proof.*derived="):
            pair.update(1)
        assert torch.equal(target.weight, before)
        target.one_plus = None
        with pytest.raises(weightbus.UpdateError, match="verify: expected an update with proof"):
            pair.update(1, verify=False)
        assert pair.update(1).word == "verified"
        with pytest.raises(weightbus.UpdateError, match="verify: expected an update with proof"):
            pair.update(2, verify=False)
        assert pair.version == 1


def test_names_that_are_not_proved_are_cut_and_counted():
    target = Scale(2)
    target.tables = [torch.rand(2) for _ in range(1000)]
    with weightbus.colocate(Scale(1), target) as pair:
        report = pair.update(1)
    assert report.word == "partial"
    assert len(report.partial) == weightbus.control.messages.MAX_PARTIAL + 1
    assert report.partial["more names"].startswith(f"{1001 - weightbus.control.messages.MAX_PARTIAL} more")


def test_tensor_that_appears_later_is_found_by_a_check():
    source, target = Scale(1), Scale(2)
    target.one_plus = None
    with weightbus.colocate(source, target) as pair:
        assert pair.update(1).word == "verified"
        target.one_plus = 1 + target.weight.detach()
        verdict = pair.check()
    assert (verdict.word, list(verdict.partial)) == ("partial", ["one_plus"])


def test_pattern_may_be_a_name_with_brackets():
    target = Scale(2)
    target.one_plus = [torch.rand(2), torch.rand(2)]
    with weightbus.colocate(Scale(1), target, local=["one_plus[1]"]) as pair:
        assert list(pair.update(1).partial) == ["one_plus[0]"]


def test_copy_that_a_forward_makes_is_named_by_the_next_update():
    """Not only by a check: the plan is replayed, but the tree is looked at."""

    class Lazy(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = weights(seed)
            self.cache: list[torch.Tensor] = []
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if not self.cache:
                self.cache.append(self.weight.detach().t().contiguous())
            return x @ self.cache[0]

    target = Lazy(2)
    with weightbus.colocate(Lazy(1), target) as pair:
        assert pair.update(1).word == "verified"
        target(torch.ones(SIZE))
        assert list(pair.update(2).partial) == ["cache[0]"]
        target.cache.clear()
        assert pair.update(3).word == "verified"
    target = Lazy(2)
    with weightbus.colocate(Lazy(1), target, require_proof=True) as pair:
        assert pair.update(1).word == "verified"
        target(torch.ones(SIZE))
        before = target.weight.detach().clone()
        for _ in range(2):
            with pytest.raises(weightbus.UpdateError, match=r"cache\[0\]: expected proof"):
                pair.update(2)
        assert torch.equal(target.weight, before)


def test_derived_tensor_that_was_rebound_is_still_made_again():
    source, target = Scale(1), Scale(2)
    with weightbus.colocate(source, target, derived={"one_plus": lambda scale: 1 + scale.weight}) as pair:
        pair.update(1)
        target.one_plus = torch.zeros(SIZE, SIZE)
        assert pair.update(2).word == "verified"
    assert torch.equal(target.one_plus, 1 + source.weight)


# -- example inputs ---------------------------------------------------------------------------------------


def closed_over(weight):
    """A module whose forward reads a tensor that only a closure holds."""
    copy = weight.detach().t().contiguous()

    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())
            self.register_buffer("positions", torch.arange(SIZE), persistent=False)
            self.calls, self.seen = 0, []
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x, *, scale=1.0):
            self.calls += 1
            self.seen.append(torch.rand(3))
            self.count += 1
            return (x * scale) @ copy + self.weight[0] + self.positions + torch.tensor([0.5]) + torch.rand(SIZE)

    return Closed()


INPUTS = {
    "tensor": torch.ones(SIZE),
    "tuple": (torch.ones(SIZE),),
    "dict": {"x": torch.ones(SIZE), "scale": torch.tensor(2.0)},
    "function": None,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_forward_shows_what_no_module_holds(kind):
    source, target = closed_over(weights(1)), closed_over(weights(2))
    inputs = INPUTS[kind] if kind != "function" else lambda: target(torch.ones(SIZE))
    state, before = torch.random.get_rng_state(), target.count.clone()
    with weightbus.colocate(source, target) as pair:
        assert pair.update(1).word == "verified", "nothing beyond the tree is claimed"
    with weightbus.colocate(source, target, example_inputs=inputs) as pair:
        (name,) = pair.update(1).partial
        assert name.startswith("storage read by aten.")
        assert f"torch.float32 [{SIZE}" in name
        assert list(pair.update(2).partial) == list(pair.check().partial) == [name]
    assert (target.calls, target.seen) == (0, [])
    assert torch.equal(target.count, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_forward_that_reads_nothing_else_leaves_the_word():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.GELU())
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.GELU())
    with weightbus.colocate(
        model, {"a": other}["a"], example_inputs=torch.ones(3, 4), require_proof=True
    ) as pair:
        assert pair.update(1).word == "verified"
    assert other[1].num_batches_tracked == 0


def test_forward_of_modules_by_name():
    target = {"a": closed_over(weights(2)), "b": nn.Linear(2, 2)}
    source = {"a": closed_over(weights(1)), "b": nn.Linear(2, 2)}
    with weightbus.colocate(source, target, example_inputs={"a": torch.ones(SIZE)}) as pair:
        assert len(pair.update(1).partial) == 1


def test_forward_that_fails_refuses_the_update():
    with (
        weightbus.colocate(nn.Linear(2, 2), nn.Linear(2, 2), example_inputs=torch.ones(3)) as pair,
        pytest.raises(weightbus.UpdateError, match="example_inputs: the forward raised RuntimeError"),
    ):
        pair.update(1)


# -- loads ---------------------------------------------------------------------------------------------------


def serve_hub(rank, size, *, address):
    hub.Hub(address).serve()


def load_with_copies(rank, size, *, address, path):
    """The words of a load, of one whose derived tensor is made again, and of two where proof is required."""
    told = []
    for options in (
        {},
        {"derived": {"one_plus": lambda scale: 1 + scale.weight}},
        {"require_proof": True},
        {"require_proof": True, "local": ["one_plus"]},
    ):
        target = Scale(2)
        before = target.weight.detach().clone()
        with weightbus.Subscriber(target, address=address, rank=0, replica_size=1, **options) as subscriber:
            try:
                loaded = subscriber.update_from_disk(path)
                told.append((loaded.word, sorted(loaded.partial), "one_plus" in str(loaded)))
            except weightbus.UpdateError as error:
                told.append(str(error))
                assert torch.equal(target.weight, before)
        if "derived" in options:
            assert torch.equal(target.one_plus, 1 + target.weight)
    return told


def test_words_of_loads(address, tmp_path):
    tensors = {"weight": weights(1).detach()}
    for name in ("listed", "plain"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    saved = saved_of({name: weightbus.tensor_digest(tensor) for name, tensor in tensors.items()})
    (tmp_path / "listed" / LIST).write_bytes(msgspec.json.encode(saved))
    found = {}
    for name in ("listed", "plain"):
        address = free_address()
        found[name], _ = run_jobs(
            Job(run=load_with_copies, arguments={"address": address, "path": tmp_path / name}),
            Job(run=serve_hub, arguments={"address": address}, never_ends=True),
        )
    (bare, derived, refused, declared) = found["listed"][0]
    assert bare == ("partial", ["one_plus"], True)
    assert derived == declared == ("verified", [], False)
    assert "one_plus: expected proof" in refused
    (bare, derived, refused, unlisted) = found["plain"][0]
    assert bare == ("unverified", ["one_plus"], True)
    assert derived == ("unverified", [], False)
    assert "one_plus: expected proof" in refused
    assert "expected a digest list of every module" in unlisted


def test_command_prints_what_a_load_does_not_prove(monkeypatch, capsys, tmp_path):
    end = m.TaskEnd(
        id="x", ok=True, verdict="partial", partial={f"copy{i}": "not fed" for i in range(20)}, ranks=1
    )
    monkeypatch.setattr(
        load_command, "Client", lambda *a, **k: nullcontext(Mock(update_from_disk=lambda *a, **k: end))
    )
    assert load_command.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("partial load of ")
    assert "not proved: copy0: not fed" in told
    assert "12 more names" in told


# -- real ranks ----------------------------------------------------------------------------------------------


def publish(rank, size, *, address):
    with weightbus.Publisher(Sharded(1), address=address, rank=rank, size=size) as publisher:
        report, verdict = publisher.update(1), publisher.check()
    return [(told.word, sorted(told.partial)) for told in (report, verdict)]


class Sharded(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = weights(seed)
        self.rotary = Rotary(4)


def subscribe(rank, size, *, address):
    """A copy of its own shard, on one rank only; views of the shard, and the DTensor once more."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (size,))
    model = Sharded(2)
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)]), requires_grad=False)
    model.again = [model.weight, model.weight.to_local().t()]
    if rank == 1:
        model.copy = model.weight.to_local().clone()
    with weightbus.Subscriber(model, address=address, rank=rank, replica_size=size) as subscriber:
        subscriber.serve()
        assert subscriber.state == "ready", subscriber.error


def test_copy_on_one_rank_of_a_sharded_model_is_told_to_the_trainer(address):
    (told,), _ = run_jobs(
        Job(run=publish, arguments={"address": address}),
        Job(run=subscribe, size=2, arguments={"address": address}),
    )
    assert told == [("partial", ["copy"])] * 2


def test_figures_in_the_docs_are_the_codes():
    text = " ".join((Path(__file__).parents[2] / "docs" / "tree.md").read_text().split())
    assert f"({MAX_DEPTH} levels deep" in text
    assert MAX_ENCLOSING == 2
    assert "the two modules around it are tried" in text
    for step in STEPS:
        assert f"`{step}(self)`" in text
