"""Loading code of any make: what it would write is written, bit for bit, or the update is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import Engine, held, numbers, words_of
from torch import nn

import weightbus
from weightbus.errors import SpecError, UpdateError

# -- programs that only move elements ------------------------------------------------------------------


@st.composite
def programs(draw):
    """Wire shapes, and steps that put all of their elements into one parameter, in some order."""
    rows = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    width = draw(st.sampled_from([2, 4, 6]))
    shapes = {f"w{i}": (n, width) for i, n in enumerate(rows)}
    how = draw(st.sampled_from(["cat", "columns", "stack", "scratch", "interleave", "halves", "pieces"]))
    if how in ("stack", "interleave", "columns"):
        shapes = {name: (rows[0], width) for name in shapes}
    return shapes, how, draw(st.booleans()), draw(st.booleans())


def joined(how, tensors):
    if how == "stack":
        return torch.stack(tensors)
    if how == "columns":
        return torch.cat(tensors, dim=1)
    if how == "interleave":
        return torch.stack(tensors, dim=1).reshape(-1, tensors[0].shape[1])
    if how == "halves":
        whole = torch.cat(tensors)
        left, right = whole.chunk(2, dim=1)
        return torch.cat([right, left], dim=1)
    if how == "scratch":
        whole = tensors[0].new_empty(sum(t.shape[0] for t in tensors), tensors[0].shape[1])
        at = 0
        for tensor in tensors:
            whole[at : at + tensor.shape[0]] = tensor
            at += tensor.shape[0]
        return whole
    return torch.cat([row for tensor in tensors for row in tensor.split(1)])


@settings(max_examples=80, deadline=None)
@given(programs())
def test_what_is_put_together_is_traced(program):
    shapes, how, transposed, reads_all = program

    def load(engine, weights):
        found = []
        for _, tensor in dict(weights).items() if reads_all else weights:
            found.append(tensor)
            if len(found) == len(shapes):
                whole = joined(how, found)
                engine.whole.data.copy_(whole.t() if transposed and whole.dim() == 2 else whole)

    sent = numbers(shapes)
    expected = joined(how, list(sent.values()))
    expected = expected.t() if transposed and expected.dim() == 2 else expected
    engine = Engine({"whole": tuple(expected.shape)}, load)
    with weightbus.colocate(list(sent.items()), engine) as pair:
        report = pair.update(1)
        assert (report.word, pair.check().word) == ("verified", "verified")
    assert torch.equal(engine.whole, expected)


# -- programs that compute -----------------------------------------------------------------------------


def test_what_is_computed_of_several_gets_them_together():
    """Of more layers than are tried one by one, each needs two tensors at the same time."""
    layers = 24

    def load(engine, weights):
        found = dict(weights)
        for i in range(layers):
            if {f"q{i}", f"s{i}"} <= found.keys():
                getattr(engine, f"w{i}").data.copy_(found[f"q{i}"] * found[f"s{i}"])

    sent = numbers({f"{k}{i}": ((3, 2) if k == "q" else (1,)) for i in range(layers) for k in "qs"})
    engine = Engine({f"w{i}": (3, 2) for i in range(layers)}, load)
    with weightbus.colocate(list(sent.items()), engine) as pair:
        for version in (1, 2):
            for tensor in sent.values():
                tensor.add_(version)
            report = pair.update(version)
            assert report.word == "partial"
            assert all(
                torch.equal(getattr(engine, f"w{i}"), sent[f"q{i}"] * sent[f"s{i}"]) for i in range(layers)
            )


def test_a_parameter_that_no_call_writes_is_refused():
    def load(engine, weights):
        for name, tensor in weights:
            if name != "b":
                getattr(engine, name).data.copy_(tensor * 2)

    engine = Engine({"a": (2,), "b": (2,)}, load)
    with weightbus.colocate(list(numbers({"a": (2,), "b": (2,)}).items()), engine) as pair:
        with pytest.raises(UpdateError, match="b: missing name"):
            pair.update(1)
        assert pair.state == "empty"
    assert torch.equal(engine.a, torch.full((2,), 9.0))


@pytest.mark.parametrize("how", ["clone", "cat", "chunk", "stack", "to"])
@pytest.mark.parametrize("keeps", ["none", "all", "first"])
def test_scratch_memory_that_is_used_again(how, keeps):
    """keeps: what of what was made of it is copied on only after it holds something else; the first one's
    memory then holds what goes nowhere."""
    make = {
        "clone": lambda scratch: scratch.clone(),
        "cat": lambda scratch: torch.cat([scratch, scratch[:0]]),
        "chunk": lambda scratch: torch.cat(scratch.chunk(2, dim=0)[::-1]),
        "stack": lambda scratch: torch.stack([scratch, scratch])[0],
        "to": lambda scratch: scratch.to(scratch.dtype, copy=True),
    }[how]

    def load(engine, weights):
        scratch, made = torch.empty(4, 2), {}
        for name, tensor in weights:
            scratch.copy_(tensor)
            made[name] = make(scratch)
            if keeps == "none":
                getattr(engine, name).data.copy_(made[name])
        for name in {"none": "", "all": "abc", "first": "a"}[keeps]:
            getattr(engine, name).data.copy_(made[name])

    shapes = {"a": (4, 2), "b": (4, 2), "c": (4, 2)}
    own = {"a": (4, 2)} if keeps == "first" else shapes
    words = words_of(lambda: Engine(own, load), numbers(shapes))
    assert set(words) <= ({"refused"} if keeps == "first" else {"verified", "partial"})


@pytest.mark.parametrize("name", ["meta_head.weight", "meta", "a", "metadata"])
def test_an_error_of_the_loading_code_is_no_lack_of_data(name):
    def load(engine, weights):
        for told, tensor in weights:
            if told != "a":
                raise KeyError(name)
            engine.a.data.copy_(tensor)

    sent = numbers({"a": (2,), "b": (2,)})
    assert words_of(lambda: Engine({"a": (2,)}, load), sent) == ["refused"] * 2


@pytest.mark.parametrize("first", ["traced", "computed"])
@pytest.mark.parametrize("rows", [slice(None), slice(1), slice(2, 4)])
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_what_is_traced_and_what_is_not_in_one_place(first, rows, names):
    """Of one place both in one call: which comes last counts, so it is not to be guessed."""

    def load(engine, weights):
        for name, tensor in weights:
            if (name == names[0]) == (first == "traced"):
                engine.w.data[rows if name == names[1] else slice(None)] = tensor[
                    rows if name == names[1] else slice(None)
                ]
            else:
                part = rows if name == names[1] else slice(None)
                engine.w.data[part].copy_(tensor[part] * 2)

    sent = numbers(dict.fromkeys(names, (4, 2)))
    words = words_of(lambda: Engine({"w": (4, 2)}, load), sent)
    assert set(words) <= {"partial", "refused"}


@pytest.mark.parametrize("make", [torch.empty, torch.zeros], ids=["empty", "zeros"])
def test_memory_that_is_made_for_several_that_are_asked_for_at_once(make):
    def load(engine, weights):
        found = dict(weights)
        whole = make(4, 2)
        whole[:2] = found["a"]
        whole[2:] = found["b"]
        engine.w.data.copy_(whole * 2)

    shapes = {"a": (2, 2), "b": (2, 2)}
    assert words_of(lambda: Engine({"w": (4, 2)}, load), numbers(shapes)) == ["partial"] * 2


def test_threads_of_the_loading_code():
    def load(engine, weights):
        with ThreadPoolExecutor(2) as pool:
            for name, tensor in weights:
                pool.submit(getattr(engine, name).data.copy_, tensor)

    sent = numbers({f"w{i}": (3,) for i in range(4)})
    engine = Engine({name: (3,) for name in sent}, load)
    with weightbus.colocate(list(sent.items()), engine) as pair:
        report = pair.update(1)
        assert report.word == "partial"
        assert "threads" in str(report)
    for name, tensor in sent.items():
        assert torch.equal(getattr(engine, name), tensor)


# -- programs that fail --------------------------------------------------------------------------------


def raises(engine, weights):
    for name, tensor in weights:
        if name == "b":
            raise KeyError(name)
        getattr(engine, name).data.copy_(tensor)


def swaps(engine, weights):
    for name, tensor in weights:
        getattr(engine, name).data = tensor.clone()


def replaces(engine, weights):
    for name, tensor in weights:
        setattr(engine, name, nn.Parameter(tensor.clone(), requires_grad=False))


def deletes(engine, weights):
    for name, tensor in weights:
        getattr(engine, name).data.copy_(tensor)
    del engine.b


def adds(engine, weights):
    for name, tensor in weights:
        getattr(engine, name).data.copy_(tensor)
    engine.extra = nn.Parameter(torch.zeros(1))


def cuts(engine, weights):
    for name, tensor in weights:
        getattr(engine, name).data.copy_(tensor[:1].expand(7))


@pytest.mark.parametrize("load", [raises, swaps, replaces, deletes, adds, cuts], ids=lambda f: f.__name__)
def test_what_would_go_wrong_is_refused(load):
    engine = Engine({"a": (2,), "b": (2,)}, load)
    before, kept = held(engine), [engine.a, engine.b]
    closed = []
    with weightbus.colocate(
        list(numbers({"a": (2,), "b": (2,)}).items()), engine, on_refused=closed.append, on_torn=closed.append
    ) as pair:
        with pytest.raises(UpdateError, match=r"load_weights of Engine: it (raised|gives|replaces)"):
            pair.update(1)
        assert pair.state == "empty"
    assert [engine.a, engine.b] == kept or all(a is b for a, b in zip([engine.a, engine.b], kept, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in held(engine).items())
    assert len(closed) == 1


@pytest.mark.parametrize("how", ["data", "set_", "raise"])
def test_hooks_that_would_go_wrong_are_refused(how):
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    def hook(parameter, loaded):
        if how == "data":
            parameter.data = loaded.clone()
        elif how == "set_":
            parameter.data.set_(loaded.clone())  # of an alias: the parameter keeps what it has
        else:
            raise ValueError(f"{tuple(loaded.shape)} does not fit")

    model.w.weight_loader = hook
    with weightbus.colocate([("w", torch.ones(3, 3))], model) as pair:
        with pytest.raises(UpdateError, match="w: weight_loader of w"):
            pair.update(1)
        assert pair.state == "empty"
    assert not model.w.any()


# -- memory of other kinds -----------------------------------------------------------------------------


def hooked(model):
    for parameter in model.parameters():
        parameter.weight_loader = lambda own, loaded: own.data.copy_(loaded)
    return model


@pytest.mark.parametrize("kind", ["plain", "hooked", "computing"])
@pytest.mark.parametrize("both", [False, True])
def test_tensors_of_inference_mode(kind, both):
    source = nn.Linear(5, 3)
    with torch.inference_mode():
        if both:
            source = nn.Linear(5, 3)
        target = nn.Linear(5, 3)
        if kind == "hooked":
            hooked(target)
        if kind == "computing":
            for parameter in target.parameters():
                parameter.weight_loader = lambda own, loaded: own.data.copy_(loaded * 1)
        pair = weightbus.colocate(source, target)
        pair.update(1)
    with torch.inference_mode():
        source.weight.add_(1) if both else None
    pair.update(2)
    assert pair.check().word in ("verified", "partial")
    before = weightbus.snapshot(target)
    weightbus.perturb(target)
    assert not before.compare(target).unchanged
    pair.update(3)
    pair.close()
    assert torch.equal(source.weight, target.weight)
    assert torch.equal(source.bias, target.bias)


@pytest.mark.parametrize("end", ["source", "target", "snapshot", "digest"])
def test_storage_that_was_given_up_is_named(end):
    bad, good = nn.Linear(4, 4), nn.Linear(4, 4)
    bad.weight.untyped_storage().resize_(0)
    use = {
        "source": lambda: weightbus.colocate(bad, good),
        "target": lambda: weightbus.colocate(good, bad),
        "snapshot": lambda: weightbus.snapshot(bad),
        "digest": lambda: weightbus.tensor_digest(bad.weight),
    }[end]
    with pytest.raises(SpecError, match=r"expected storage of at least 64 bytes, got one of 0"):
        use()


@pytest.mark.parametrize("end", ["source", "target"])
def test_storage_that_is_given_up_later_is_named(end):
    source, target = nn.Linear(4, 4), nn.Linear(4, 4)
    with weightbus.colocate(source, target) as pair:
        pair.update(1)
        {"source": source, "target": target}[end].weight.untyped_storage().resize_(0)
        with pytest.raises(UpdateError, match=r"weight: expected storage of at least 64 bytes, got one of 0"):
            pair.update(2)


@pytest.mark.parametrize("how", ["rebound", "replaced", "moved"])
def test_pairs_whose_module_has_gone_on_are_noticed(how):
    source, target = nn.Linear(4, 4), nn.Linear(4, 4)
    with weightbus.colocate(source.state_dict().items(), target) as pair:
        assert pair.update(1).word == "verified"
        with torch.no_grad():
            source.weight.add_(1)
        assert pair.update(2).word == "verified"
        if how == "rebound":
            source.weight.data = source.weight.data.clone()
        elif how == "replaced":
            source.weight = nn.Parameter(torch.zeros(4, 4))
        else:
            source.to(torch.float64)
        with pytest.raises(UpdateError, match=r"weight: expected the memory of Linear.weight"):
            pair.update(3)
    assert target.weight.dtype is torch.float32


def test_pairs_that_nobody_else_holds_are_theirs():
    target = nn.Linear(4, 4)
    pairs = list(nn.Linear(4, 4).state_dict().items())
    with weightbus.colocate(pairs, target) as pair:
        assert pair.update(1).word == "verified"
        assert pair.update(2).word == "verified"


def test_loading_code_that_asks_for_all_of_its_tensors_gets_them():
    def load(engine, weights):
        found = dict(weights)
        for name in ("a", "b", "c"):
            getattr(engine, name).data.copy_(found[name] * 2)

    sent = numbers({"a": (2,), "b": (3,), "c": (4,)})
    engine = Engine({"a": (2,), "b": (3,), "c": (4,)}, load)
    with weightbus.colocate(list(sent.items()), engine) as pair:
        for version in (1, 2):
            sent["b"].add_(version)
            assert pair.update(version).word == "partial"
            assert all(torch.equal(getattr(engine, name), tensor * 2) for name, tensor in sent.items())
