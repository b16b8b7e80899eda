"""Headers, lists and indexes of others: what they cost is bounded by what they are long, before it is spent."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightbus.errors import SpecError
from weightbus.planning.facts import decode_facts
from weightbus.storage import bounded_json
from weightbus.storage.bounded_json import MAX_VALUES, check_values, decode
from weightbus.storage.disk import (
    DTYPES,
    MAX_AXES,
    MAX_BYTES,
    MAX_HEADER_BYTES,
    MAX_NAME,
    header_of,
    stored_spec,
)
from weightbus.storage.payload import FLAT_METADATA, FLAT_NAME, tensors_of_payload

HERE = Path("payload")


def payload(header: bytes, data: bytes = b"") -> memoryview:
    return memoryview(len(header).to_bytes(8, "little") + header + data)


def count(value):
    """Values in a parsed JSON text; names are none."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count, inner))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=40,
)


@given(values, st.sampled_from([None, 1]))
def test_the_bound_is_never_below_the_number_of_values(value, indent):
    text = json.dumps(value, indent=indent).encode()
    check_values("text", text, limit=10 * len(text))
    with pytest.raises(SpecError, match="expected JSON of at most"):
        check_values("text", text, limit=count(value) - 1)


@given(values)
def test_what_is_in_bounds_is_what_the_parser_says(value):
    assert decode("text", json.dumps(value).encode(), type(value) if value is not None else None) == value


class Work:
    """How often names are compared and hashed, and how many bits are multiplied."""

    def __init__(self):
        self.done = 0

    def name(self, text):
        work = self

        class Name(str):
            def __eq__(self, other):
                work.done += 1
                return str.__eq__(self, other)

            def __hash__(self):
                work.done += 1
                return str.__hash__(self)

        return Name(text)

    def size(self, number):
        work = self

        class Size(int):
            def __rmul__(self, other):
                work.done += other.bit_length()
                return int(self) * other

            __mul__ = __rmul__

        return Size(number)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_a_repeated_name_is_found_in_linear_work(count, data):
    names = [str(number) for number in range(count)]
    names.insert(data.draw(st.integers(0, count)), names[data.draw(st.integers(0, count - 1))])
    text = ("{" + ",".join(f'"{name}":0' for name in names) + "}").encode()
    work = Work()

    def loads(text, object_pairs_hook):
        return json_loads(
            text, object_pairs_hook=lambda p: object_pairs_hook([(work.name(n), v) for n, v in p])
        )

    json_loads = json.loads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_json.json, "loads", loads)
        with pytest.raises(SpecError, match="expected each name once, got it twice"):
            decode("text", text, dict)
    assert count < work.done <= 8 * (count + 1)


@settings(deadline=None)
@given(st.lists(st.integers(-2, 1 << 70) | st.just((1 << 63) - 1), max_size=300), st.sampled_from(list(DTYPES)))
def test_a_shape_is_bounded_before_it_is_multiplied(shape, dtype):
    work = Work()
    try:
        spec = stored_spec(HERE, "w", DTYPES[dtype], [work.size(n) for n in shape])
    except SpecError:
        assert len(shape) > MAX_AXES or min(shape) < 0 or max(shape) > 1
    else:
        assert spec.shape == tuple(shape)
        assert spec.nbytes <= MAX_BYTES
    assert work.done <= MAX_AXES * 64


BIG = (1 << 63) - 1
ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"w": {**ONE, "shape": [BIG] * 20_000}}, f"w: expected at most {MAX_AXES} axes, got 20000"),
        ({"w": {**ONE, "shape": [BIG] * MAX_AXES}}, "w: expected sizes from 0"),
        ({"w": {**ONE, "shape": [0, BIG], "data_offsets": [0, 0]}}, "w: expected sizes from 0"),
        ({"w" * (MAX_NAME + 1): ONE}, "w…: expected a name of at most"),
        ({"w": {**ONE, "dtype": "U" * 10**6}}, "w: expected a dtype among"),
        ({"w": {**ONE, "data_offsets": [0, 10**4000]}}, "w: expected 1 bytes"),
        ({"w": {**ONE, "x" * 10**6: 1}}, "w: bad entry in the header"),
        ({"x" * 10**6: 1}, "bad entry in the header"),
        ({"__metadata__": {"a": 1}}, "__metadata__: expected text by text"),
        ({"__metadata__": [{}] * MAX_VALUES}, "expected JSON of at most"),
        ({"w": [0] * MAX_VALUES}, "expected JSON of at most"),
    ],
    ids=range(11),
)
def test_errors_about_large_things_are_short(header, reason):
    data = payload(json.dumps(header).encode(), b"1")
    with pytest.raises(SpecError, match=reason) as error:
        header_of(HERE, data)
    assert len(str(error.value)) < 4 * MAX_NAME


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    with pytest.raises(SpecError, match=f"expected a header of at most {MAX_HEADER_BYTES} bytes"):
        header_of(HERE, payload(b" " * (MAX_HEADER_BYTES + 1)))


@pytest.mark.parametrize(
    "text",
    [
        b'{"__metadata__":[' + b",".join([b"{}"] * 900_000) + b"]}",
        b"{" + b",".join(b'"%d":{}' % n for n in range(400_000)) + b"}",
        b'{"w":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b'{"w":{"shape":[' + b",".join([b"9" * 19] * 500_000) + b"]}}",
    ],
    ids=["objects", "names", "depth", "numbers"],
)
def test_what_a_header_costs_in_memory(text):
    """Just below the bound of values, with the dearest there are: 120 bytes each."""
    data = payload(text)
    tracemalloc.start()
    try:
        with pytest.raises(SpecError):
            header_of(HERE, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 128 * MAX_VALUES + 4 * len(text)


def flat(entries, **extra):
    metadata = {FLAT_METADATA: entries if isinstance(entries, str) else json.dumps(entries)}
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    return payload(json.dumps({"__metadata__": metadata, FLAT_NAME: entry}).encode(), b"1234")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"shape": [BIG] * 20_000}, "expected at most 64 axes"),
        ({"shape": [BIG] * 60}, "expected sizes from 0"),
        ({"name": "n" * 5000}, "expected a name of at most"),
        ({"dtype": "torch." + "x" * 10**6}, "expected a dtype among"),
        ({"y" * 10**6: 1}, "unknown field"),
    ],
)
def test_flattened_buckets_are_bounded_alike(entry, reason):
    full = {"name": "w", "dtype": "torch.uint8", "shape": [4], "start_idx": 0, "end_idx": 4} | entry
    with pytest.raises(SpecError, match=reason) as error:
        tensors_of_payload(HERE, flat([full]), "flattened_bucket")
    assert len(str(error.value)) < 4096


def test_a_flattened_bucket_of_too_many_values():
    with pytest.raises(SpecError, match="expected JSON of at most"):
        tensors_of_payload(HERE, flat("[" + "0," * MAX_VALUES + "0]"), "flattened_bucket")


def test_facts_of_too_many_axes():
    """As a payload of shared tensors tells them."""
    row = ["w", "uint8", [BIG] * 20_000, [[[0] * 20_000, [BIG] * 20_000]], True, ""]
    with pytest.raises(SpecError, match=r"facts of here: .*length <= 64"):
        decode_facts(msgspec.msgpack.encode([row]), "here")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:0123456789\\u naw', max_size=200).map(str.encode))
def test_any_bytes_are_a_header_or_refused(text):
    try:
        found, _ = header_of(HERE, payload(text))
    except SpecError:
        return
    assert found == []  # there is no data
