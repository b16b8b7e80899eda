"""Tensors in a message: where they lie, which module they are for, and a refusal for all else."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.errors import ProtocolError, SpecError
from weightbus.storage.payload import module_of, stored_payloads, tensors_of_payload
from weightbus.tools.http import app as http

HERE = Path("payload")
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4).to(torch.bfloat16)}


def flat(entries, data=None, dtype=torch.uint8, name="flattened_tensor", metadata="flattened_metadata"):
    raw = torch.cat([t.reshape(-1).view(torch.uint8) for t in TENSORS.values()]).view(dtype)
    return save({name: raw if data is None else data}, {metadata: json.dumps(entries)})


def entry(name="a", dtype="float32", shape=(2, 3), start=0, end=24, **more):
    return {"name": name, "dtype": dtype, "shape": shape, "start_idx": start, "end_idx": end, **more}


B = entry("b", "torch.bfloat16", (4,), 24, 32)


def read(data, format="safetensors"):
    found = tensors_of_payload(HERE, memoryview(data), format)
    return {name: bytes(data[t.begin : t.end]) for name, t in found.items()}, found


def test_plain_and_flattened_lie_where_they_should():
    want = {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in TENSORS.items()}
    assert read(save(TENSORS))[0] == want
    bucket = flat([B, entry(numel=24)])
    got, found = read(bucket, "flattened_bucket")
    assert got == want
    assert {n: (t.spec.dtype, t.spec.shape) for n, t in found.items()} == {
        "a": ("float32", (2, 3)),
        "b": ("bfloat16", (4,)),
    }
    halves = flat([entry(end=12), entry("b", "BF16", (4,), 12, 16)], dtype=torch.bfloat16)
    assert read(halves, "flattened_bucket")[0] == want  # offsets in elements of the flat tensor


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (flat([entry()]), "expected entries for 32 bytes of flattened_tensor, got 24"),
        (flat([entry(), entry("b", "bfloat16", (4,), 20, 28)]), "b: expected data from byte 24"),
        (flat([entry(), entry("b", "bfloat16", (4,), 24, 33)]), "b: expected 8 bytes for bfloat16"),
        (flat([entry(), entry("a", "bfloat16", (4,), 24, 32)]), "a: expected each name once, got it twice"),
        (flat([entry(dtype="float4"), B]), "a: expected a dtype among"),
        (flat([entry(shape=(-2, -3)), B]), "a: expected 24 bytes|a: expected"),
        (flat([entry(shape=(1 << 62, 1 << 62)), B]), "a: expected"),
        (flat([entry(start=-24, end=0), B]), "a: expected data from byte 0"),
        (flat([{**entry(), "pickle": 1}, B]), "unknown field `pickle`"),
        (flat({}), "flattened_metadata: Expected `array`"),
        (flat([], name="other"), "expected one tensor flattened_tensor"),
        (flat([], metadata="other"), "expected one tensor flattened_tensor"),
        (flat([], data=torch.zeros(2, 2)), r"expected one axis, got shape \[2, 2\]"),
        (pickle.dumps(TENSORS), "got a pickle, which is never loaded here"),
        (b"", "expected a safetensors header in 0 bytes"),
    ],
)
def test_a_bucket_that_does_not_add_up_is_refused(data, expected):
    with pytest.raises(SpecError, match=expected):
        read(data, "flattened_bucket")


def test_what_torch_save_writes_is_refused_with_the_cure(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    with pytest.raises(SpecError, match=r"got a pickle.* send safetensors.torch.save"):
        read((tmp_path / "x.pt").read_bytes())


MODULES = ("transformer", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("named", "targets", "modules", "expected"),
    [
        (None, None, (), None),
        (None, None, ("vae",), "vae"),
        (None, None, MODULES, "transformer"),
        (None, ["vae"], MODULES, "vae"),
        ("vae", None, MODULES, "vae"),
        ("vae", ["vae", "transformer"], MODULES, "vae"),
        (None, ["vae", "transformer"], MODULES, "expected {module: payload} where it could be for several"),
        (None, None, ("vae", "unet"), "expected {module: payload} where it could be for several"),
        ("unet", None, MODULES, "unet: expected a module among transformer, vae, text_encoder"),
        (None, ["unet"], MODULES, "unet: expected a module among"),
        (None, ["vae"], (), "vae: expected a module among none"),
        ("vae", ["transformer"], MODULES, "vae: expected a payload for the target modules"),
    ],
)
def test_the_module_is_known_or_the_payload_refused(named, targets, modules, expected):
    if expected is None or " " not in expected:
        assert module_of(named, targets, modules) == expected
    else:
        with pytest.raises(SpecError) as caught:
            module_of(named, targets, modules)
        assert expected in str(caught.value)


def test_two_payloads_for_one_module_are_refused():
    frames = [m.Frame(place=0, module=module, nbytes=1) for module in (None, "transformer")]
    data = save(TENSORS)
    with pytest.raises(SpecError, match="transformer: expected one payload for each module, got two"):
        stored_payloads(frames, [data, data], m.LoadTask(), MODULES, lambda where, payload: ({}, {}))


def test_payloads_must_be_those_announced():
    frame = m.Frame(place=0, module=None, nbytes=3)
    ask = m.AskTask(
        id="1", hub="h", task=m.LoadTask(), wait_s=1.0, run_s=1.0, frames=[frame], payloads=[b"abc"]
    )
    assert wire.decode_to_hub(wire.encode(ask)) == ask
    for payloads, expected in (
        ([], "expected 1 payloads of 3 bytes, got 0 of 0"),
        ([b"abc", b""], "expected 1 payloads of 3 bytes, got 2 of 3"),
        ([b"ab"], "expected 1 payloads of 3 bytes, got 1 of 2"),
    ):
        with pytest.raises(ProtocolError, match=expected):
            wire.decode_to_hub(wire.encode(msgspec.structs.replace(ask, payloads=payloads)))
    member = m.Member(peer="p", trainer=None, server=m.ServerId(replica=0, rank=0))
    offer = m.TaskOffer(update=1, task=ask.task, members=[member], run_s=1.0, frames=[frame], payloads=[b"abc"])
    sent = wire.encode(offer)
    assert len(sent) == 3
    assert wire.decode_from_hub(sent) == offer
    for frames in (sent[:2], [*sent, b""], [*sent[:2], b"ab"], [*wire.encode(m.Farewell()), b"abc"]):
        with pytest.raises(ProtocolError, match="payloads of"):
            wire.decode_from_hub(frames)


# Bytes that are nearly right find more than bytes that are not: a good payload, cut, changed or repeated.
GOOD = [save(TENSORS), flat([entry(), B])]


@st.composite
def spoiled(draw):
    data = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from("dix")):
            case "d":
                del data[at : at + draw(st.integers(1, 9))]
            case "i":
                data[at:at] = draw(st.binary(max_size=9))
            case _:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
    return bytes(data)


@st.composite
def headers(draw):
    """A header of our own making, with all lengths right."""
    text = json.dumps(draw(JSON)).encode()
    return len(text).to_bytes(8, "little") + text + draw(st.binary(max_size=16))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__", "flattened_tensor"]), inner
        )
    ),
    max_leaves=12,
)
# WEIGHTBUS_FUZZ=1000 for a long run.
FUZZ = settings(
    max_examples=int(os.environ.get("WEIGHTBUS_FUZZ", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@FUZZ
@given(
    st.one_of(spoiled(), headers(), st.binary(max_size=64)),
    st.sampled_from(["safetensors", "flattened_bucket"]),
)
def test_any_bytes_are_read_within_their_bounds_or_refused(data, format):
    try:
        found = tensors_of_payload(HERE, memoryview(data), format)
    except SpecError:
        return
    for tensor in found.values():
        assert 0 <= tensor.begin <= tensor.end <= len(data)
        assert tensor.end - tensor.begin == tensor.spec.nbytes


@FUZZ
@given(st.one_of(spoiled(), headers(), st.binary(max_size=64)))
def test_any_frame_is_decoded_or_refused(data):
    for decode in (wire.decode_to_hub, wire.decode_from_hub):
        with contextlib.suppress(ProtocolError):
            decode([wire.HEADER, data])
        with contextlib.suppress(ProtocolError):
            decode([wire.HEADER, data, data])


def test_payloads_of_a_request_become_raw_frames():
    data = save(TENSORS)
    text = base64.b64encode(data).decode()
    frames, payloads = http._frames([text, {"vae": text, "transformer": text}])
    assert [(f.place, f.module, f.nbytes) for f in frames] == [
        (0, None, len(data)),
        (1, "vae", len(data)),
        (1, "transformer", len(data)),
    ]
    assert payloads == [data] * 3
