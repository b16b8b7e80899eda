"""Loading code that goes another way on tensors without data, or out of sight: never proved and wrong."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import Engine, held, numbers, words_of
from torch import nn

import weightbus
from weightbus.errors import UpdateError

SHAPES = {"a": (4, 4), "b": (4, 4)}


def each(write):
    """Loading code that gives each tensor to ``write(engine, name, tensor)``."""

    def load(engine, weights):
        for name, tensor in weights:
            write(engine, name, tensor)

    return load


def put(engine, name, tensor):
    getattr(engine, name).data.copy_(tensor)


def words(load, shapes=SHAPES, own=None, dtype=torch.float32, into=None, **options):
    sent = numbers(shapes, dtype)
    return words_of(lambda: Engine(own or shapes, load, dtype=into or dtype), sent, **options)


# -- what raises for lack of data only, and is caught ------------------------------------------------------


ASKS = {
    "computes": lambda t: t * 2,
    "item": lambda t: t.max().item(),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "asarray": np.asarray,
    "bool": lambda t: bool(t.any()),
    "dlpack": torch.from_dlpack,
    "nonzero": lambda t: t.nonzero().shape,
    "equal": lambda t: torch.equal(t, t),
    "pointer": lambda t: 1 / t.data_ptr(),
    "foreach": lambda t: torch._foreach_mul([t], 2),
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ASKS)),
    st.sampled_from([Exception, BaseException, (RuntimeError, TypeError, ValueError, ZeroDivisionError)]),
    st.sampled_from(["a", "b", "ab"]),
)
def test_what_loading_code_catches_is_not_lost(ask, caught, where):
    def write(engine, name, tensor):
        flip = name in where
        if flip:
            try:
                ASKS[ask](tensor)
            except caught:
                flip = False
        put(engine, name, tensor.t() if flip else tensor)

    assert words(each(write)) == ["partial", "partial"]


def test_what_raises_with_data_too_is_right():

    def write(engine, name, tensor):
        try:
            put(engine, name, tensor)
        except RuntimeError:
            put(engine, name, tensor.t())

    assert words(each(write), {"a": (2, 5), "b": (3, 3)}, {"a": (5, 2), "b": (3, 3)}) == ["partial"] * 2


# -- what it asks of tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda p, t: t.device.type == "cpu",
        lambda p, t: p.is_cpu,
        lambda p, t: p.device == torch.device("cpu"),
        lambda p, t: t[:2].t().contiguous().device.type != "meta",
        lambda p, t: not t.is_cuda,
        lambda p, t: torch.empty_like(t).device.type == "cpu",
    ],
)
def test_the_devices_that_loading_code_sees_are_those_of_the_engine(ask):
    def write(engine, name, tensor):
        put(engine, name, tensor.t() if ask(getattr(engine, name), tensor) else tensor)

    assert words(each(write)) == ["verified"] * 2


@pytest.mark.parametrize(
    "move",
    [
        lambda p, t: t.to(p.device),
        lambda p, t: t.to(device=p.device, dtype=p.dtype, non_blocking=True),
        lambda p, t: t.to(p),
        lambda p, t: torch.empty(t.shape, device=p.device).copy_(t),
        lambda p, t: t.new_empty(t.shape, device=t.device).copy_(t),
        lambda p, t: t if t.device == p.device else t * 2,
    ],
)
def test_moves_to_the_engines_device_are_traced(move):
    assert words(each(lambda e, n, t: put(e, n, move(getattr(e, n), t)))) == ["verified"] * 2


@pytest.mark.parametrize("computes", [False, True])
def test_another_way_for_another_dtype(computes):
    """The trainer's tensors would arrive in the engine's dtype if they were only copied."""

    def write(engine, name, tensor):
        if tensor.dtype != torch.float32:
            tensor = tensor * 2 if computes else tensor.t()
        put(engine, name, tensor)

    assert words(each(write), into=torch.bfloat16) == ["partial"] * 2


@pytest.mark.parametrize("end", ["source", "target"])
@pytest.mark.parametrize("view", [torch.conj, torch._neg_view], ids=["conj", "neg"])
def test_views_whose_bytes_are_not_their_values(end, view):
    def write(engine, name, tensor):
        if end == "source":
            put(engine, name, view(tensor))
        else:
            view(getattr(engine, name).data).copy_(tensor)

    sent = {name: t * (1 + 2j) for name, t in numbers(SHAPES).items()}
    assert words_of(lambda: Engine(SHAPES, each(write), dtype=torch.complex64), sent) == ["partial"] * 2


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.int64, 2**53 + 1), (torch.int64, -(2**63)), (torch.complex64, 1j), (torch.bool, True)],
)
def test_fills_keep_their_numbers(dtype, value):
    def write(engine, name, tensor):
        own = getattr(engine, name).data
        own[:4].copy_(tensor)
        own[4:].fill_(value)

    def make():
        return Engine(dict.fromkeys(SHAPES, (5, 4)), each(write), dtype=dtype)

    if dtype is torch.bool:
        engine = make()
        with weightbus.colocate([(n, t > 9) for n, t in numbers(SHAPES).items()], engine) as pair:
            assert pair.update(1).word == "verified"
        assert engine.a[4:].all()
    else:
        assert words_of(make, numbers(SHAPES, dtype)) == ["verified"] * 2


def test_tied_tensors_that_are_written_in_two_ways():
    """The second one counts, though it lies in the same boxes."""
    tied = numbers({"a": (4, 4)})["a"]

    def load(engine, weights):
        for name, tensor in weights:
            engine.w.data.copy_(tensor.t() if name == "b" else tensor)

    engine = Engine({"w": (4, 4)}, load)
    with weightbus.colocate([("a", tied), ("b", tied)], engine) as pair:
        try:
            assert pair.update(1).word in ("verified", "partial")
            assert torch.equal(engine.w, tied.t())
        except UpdateError:
            assert pair.state == "empty"


# -- what it keeps, and where else it writes ---------------------------------------------------------------


def once_cached(engine, weights):
    if not engine.kept:
        engine.kept.update(engine.named_parameters())
    for name, tensor in weights:
        engine.kept[name].data.copy_(tensor)


def marks(engine, weights):
    done = engine.kept.setdefault("done", set())
    for name, tensor in weights:
        if name in done:
            raise ValueError(f"{name} comes twice")
        done.add(name)
        put(engine, name, tensor)
    if len(done) == len(SHAPES):
        done.clear()


def listed(engine, weights):
    for (_, tensor), own in zip(weights, engine.kept["list"], strict=True):
        own.data.copy_(tensor)


@pytest.mark.parametrize("load", [once_cached, marks, listed])
@pytest.mark.parametrize("scale", [None, 1, 2])
def test_what_loading_code_keeps_in_the_module(load, scale):
    """scale: None copies as it is; else it computes, and is called with data."""

    def scaled(engine, weights):
        load(engine, ((name, tensor if scale is None else tensor * scale) for name, tensor in weights))

    def make():
        engine = Engine(SHAPES, scaled)
        if load is listed:
            engine.kept["list"] = [engine.a, engine.b]
        return engine

    if load is listed and scale is not None:
        return  # it needs all tensors in one call, which only a run without data shows
    assert words_of(make, numbers(SHAPES)) == ["verified" if scale is None else "partial"] * 2


@pytest.mark.parametrize("how", ["new", "in place", "on the module", "list"])
@pytest.mark.parametrize("code", ["load_weights", "weight_loader", "trusted"])
def test_places_that_have_changed_since_the_last_update(how, code):
    """As of experts that are moved: where the loading code writes now is where the model reads."""

    def place(engine, name):
        if how == "on the module":
            return engine.first if name == "a" else 1 - engine.first
        return engine.kept["places"]["ab".index(name)] if how == "list" else engine.kept[name]

    def load(engine, weights):
        for name, tensor in weights:
            engine.w.data[place(engine, name)].copy_(tensor)

    engine = Engine({"w": (2, 4, 4)}, load)
    engine.first, engine.kept = 0, {"a": 0, "b": 1, "places": [0, 1]}
    options = {}
    if code != "load_weights":
        engine.load_weights = None
        engine.w.weight_loader = lambda own, loaded, name: own.data[place(engine, name)].copy_(loaded)
        options = {"name_map": lambda name: ("w", name), "trust_traces": code == "trusted"}
    sent = numbers(SHAPES)
    with weightbus.colocate(list(sent.items()), engine, **options) as pair:
        for version in range(1, 5):
            assert (pair.update(version).word, pair.check().word) == ("verified", "verified")
            assert all(torch.equal(engine.w[place(engine, name)], sent[name]) for name in SHAPES)
            if version == 2:  # twice the same places, then others
                if how == "new":
                    engine.kept = {"a": 1, "b": 0}
                engine.kept.update({"a": 1, "b": 0})
                engine.first, engine.kept["places"] = 1, [1, 0]
            sent["a"].add_(1)


def test_loading_code_that_fails_later_stays_refused_until_it_does_not():
    def load(engine, weights):
        for name, tensor in weights:
            engine.w.data[engine.kept[name]].copy_(tensor)

    engine = Engine({"w": (2, 4, 4)}, load)
    engine.kept = {"a": 0, "b": 1}
    sent = numbers(SHAPES)
    with weightbus.colocate(list(sent.items()), engine) as pair:
        assert pair.update(1).word == "verified"
        del engine.kept["b"]
        for version in (2, 3):
            with pytest.raises(UpdateError, match=r"b: load_weights of Engine: it raised KeyError: 'b'"):
                pair.update(version)
        engine.kept |= {"a": 1, "b": 0}
        assert pair.update(4).word == "verified"
    assert torch.equal(engine.w, torch.stack([sent["b"], sent["a"]]))


@pytest.mark.parametrize("scale", [1, 2])
def test_what_loading_code_keeps_elsewhere_is_the_engines(scale):
    cache = {}

    def load(engine, weights):
        cache.setdefault("own", dict(engine.named_parameters()))
        for name, tensor in weights:
            cache["own"][name].data.copy_(tensor if scale == 1 else tensor * scale)

    sent, engine = numbers(SHAPES), Engine(SHAPES, load)
    with weightbus.colocate(list(sent.items()), engine) as pair:
        for version in (1, 2):
            assert pair.update(version).word in ("verified", "partial")
            assert all(torch.equal(getattr(engine, name), sent[name] * scale) for name in SHAPES)
            sent["a"].add_(1)
    assert all(cache["own"][name].data_ptr() == getattr(engine, name).data_ptr() for name in SHAPES)


def copies(engine, weights):
    each(put)(engine, weights)


def loads_a_state(engine, weights):
    nn.Module.load_state_dict(engine, dict(weights))


def rebinds(engine, weights):
    for name, tensor in weights:
        getattr(engine, name).data = tensor.clone()


def assigns(engine, weights):
    nn.Module.load_state_dict(engine, dict(weights), assign=True)


def replaces(engine, weights):
    for name, tensor in weights:
        setattr(engine, name, nn.Parameter(tensor.clone(), requires_grad=False))


def clears(engine, weights):
    for name, tensor in weights:
        getattr(engine, name).zero_()
        getattr(engine, name).add_(tensor)


def deletes(engine, weights):
    each(put)(engine, weights)
    del engine.b


@pytest.mark.parametrize(
    "load", [copies, loads_a_state, rebinds, assigns, replaces, clears, deletes], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("bound", ["partial", "method", "closure"])
def test_loading_code_that_is_bound_to_the_live_engine(load, bound):
    """Looked at, it must not reach what is live."""
    engine = Engine(SHAPES, None)
    engine.load_weights = {
        "partial": functools.partial(load, engine),
        "method": load.__get__(engine),
        "closure": lambda weights: load(engine, weights),
    }[bound]
    before, tensors = held(engine), dict(engine.named_parameters())
    with weightbus.colocate(list(numbers(SHAPES).items()), engine) as pair:
        try:
            assert pair.update(1).word in ("verified", "partial")
            assert load in (copies, loads_a_state, clears)
            before = numbers(SHAPES)
        except UpdateError:
            assert pair.state == "empty"
    assert all(getattr(engine, name) is tensors[name] for name in SHAPES)
    assert all(torch.equal(getattr(engine, name), before[name]) for name in SHAPES)


# -- how it takes its tensors, and who does the work -------------------------------------------------------


def test_loading_code_that_takes_tensors_one_by_one():
    def load(engine, weights):
        while (pair := next(weights, None)) is not None:
            put(engine, pair[0], pair[1] * 2)

    assert words(load) == ["partial"] * 2


def test_several_written_by_one_operation():
    def load(engine, weights):
        names, tensors = zip(*weights, strict=True)
        torch._foreach_copy_([getattr(engine, name).data for name in names], list(tensors))

    assert words(load) == ["partial"] * 2


_pool = ThreadPoolExecutor(1)
_pool.submit(lambda: None).result()


def by_a_thread(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    thread.join()


def by_a_pool(work, *arguments):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work, *arguments)


def by_an_old_pool(work, *arguments):
    _pool.submit(work, *arguments).result()


@pytest.mark.parametrize("give", [by_a_thread, by_a_pool, by_an_old_pool], ids=lambda f: f.__name__)
@pytest.mark.parametrize("all_of_it", [False, True])
def test_work_that_is_given_away(give, all_of_it):
    def write(engine, name, tensor):
        if all_of_it:
            give(put, engine, name, tensor)
        else:
            put(engine, name, tensor)
            give(getattr(engine, name).data.mul_, 2)

    assert words(each(write)) == ["partial"] * 2
    assert threading.Thread.start.__module__ == "threading"
