"""Messages to frames and back: decoding is validation, errors carry the field's path, text is ``visible``.

On the wire: two frames, ``HEADER`` and one msgpack map whose ``type`` names the class; and, of an offer that
carries tensors, one raw frame for each entry of its ``frames``. Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import inspect

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.errors import ProtocolError, visible

# The first frame of every message. A peer of another protocol version is told both.
HEADER = b"weightbus/2"

ToHub = (
    m.Hello | m.Beat | m.Leave | m.Piece | m.Enter | m.Facts | m.Ready | m.Refuse | m.Done | m.Sums | m.Poll
    | m.Clues | m.Probed | m.Later | m.Await | m.Cancel
    | m.StoreSet | m.StoreGet | m.StoreAdd | m.StoreCheck | m.StoreDelete | m.StoreCount
    | m.AskTask | m.AskReplicas
    | a.AskStatus | a.AskUpdate | a.AskCheck | a.AskVersion | a.AskPause | a.AskResume
)  # fmt: skip
FromHub = (
    m.Welcome | m.Refused | m.Alive | m.Farewell | m.Offer | m.Gathered | m.Go | m.Detail | m.Outcome
    | m.Suspects | m.Probe
    | m.Polled | m.Waited | m.Cancelled | m.Missing | m.Known | m.StoreValue
    | m.TaskOffer | m.TaskEnd | m.Replicas
    | a.Waiting | a.Answer | a.Status
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_to_hub: msgspec.msgpack.Decoder[ToHub] = msgspec.msgpack.Decoder(ToHub)
_from_hub: msgspec.msgpack.Decoder[FromHub] = msgspec.msgpack.Decoder(FromHub)


def _clean_of(kind: inspect.Type) -> Any:
    """A function that makes all text of a type ``visible``; None where there is none or a pattern bounds it."""
    match kind:
        case inspect.Metadata():
            return _clean_of(kind.type)
        case inspect.StrType(pattern=None):
            return visible
        case inspect.ListType() if each := _clean_of(kind.item_type):
            return lambda values: list(map(each, values))
        case inspect.VarTupleType() if each := _clean_of(kind.item_type):
            return lambda values: tuple(map(each, values))
        case inspect.TupleType() if all(items := [_clean_of(item) for item in kind.item_types]):
            return lambda values: tuple(item(value) for item, value in zip(items, values, strict=True))
        case inspect.DictType() if each := _clean_of(kind.value_type):
            key_of = _clean_of(kind.key_type) or (lambda key: key)
            return lambda values: {key_of(key): each(value) for key, value in values.items()}
        case inspect.DictType() if _clean_of(kind.key_type):
            return _with_visible_names
        case inspect.UnionType() if options := list(filter(None, map(_clean_of, kind.types))):
            return lambda value: value if value is None else options[0](value)
        case inspect.StructType() if _texts(kind.cls):
            return _cleaned
    return None


@functools.cache
def _texts(kind: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    """The fields of a struct that bear text."""
    info: Any = inspect.type_info(kind)
    return [(field.name, clean) for field in info.fields if (clean := _clean_of(field.type))]


def _with_visible_names(values: dict[str, Any]) -> dict[str, Any]:
    if "".join(values).isprintable():  # at once, as there may be thousands
        return values
    return {visible(name): value for name, value in values.items()}


def _cleaned(struct: Any) -> Any:
    kind: Any = type(struct)
    for name, clean in _texts(kind):
        setattr(struct, name, clean(getattr(struct, name)))
    return struct


def encode(message: m.Message) -> list[bytes]:
    if isinstance(message, m.TaskOffer) and message.payloads:
        bare = msgspec.structs.replace(message, payloads=[])
        return [HEADER, _encoder.encode(bare), *message.payloads]
    return [HEADER, _encoder.encode(message)]


def encode_to_hub(message: m.Message, peer: str) -> list[list[bytes]]:
    """One message of two frames, or the pieces of a long one. peer: empty for a client, of which the hub takes
    requests that carry tensors only, as far as it has room."""
    frames = encode(message)
    payload = frames[1]
    if len(payload) <= m.PIECE_BYTES:
        return [frames]
    cuts = range(0, len(payload), m.PIECE_BYTES)
    job = message.job
    return [
        encode(m.Piece(job=job, peer=peer, blob=payload[at : at + m.PIECE_BYTES], last=at == cuts[-1]))
        for at in cuts
    ]


def _header(frames: list[bytes], end: str) -> None:
    if not frames or frames[0] != HEADER:
        got = frames[0][:32] if frames else b""
        raise ProtocolError(f"expected protocol {HEADER.decode()}, got {got!r}; {end}")
    if len(frames) < 2:
        raise ProtocolError(f"expected 2 frames, got {len(frames)}; {end}")


def _check_payloads(announced: list[m.Frame], payloads: list[bytes], kind: str, end: str) -> None:
    sizes = [frame.nbytes for frame in announced]
    if sizes != [len(payload) for payload in payloads]:
        raise ProtocolError(
            f"{kind}: expected {len(sizes)} payloads of {sum(sizes)} bytes, "
            f"got {len(payloads)} of {sum(map(len, payloads))}; {end}"
        )


def decode_to_hub(frames: list[bytes]) -> ToHub:
    """Raises ProtocolError with the field's path."""
    end = "message to the hub"
    _header(frames, end)
    if len(frames) != 2:
        raise ProtocolError(f"expected 2 frames, got {len(frames)}; {end}")
    try:
        message: ToHub = _cleaned(_to_hub.decode(frames[1]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{error}; {end}") from error
    if isinstance(message, m.AskTask):
        _check_payloads(message.frames, message.payloads, "AskTask", end)
    return message


def decode_from_hub(frames: list[bytes]) -> FromHub:
    """Raises ProtocolError with the field's path."""
    end = "answer of the hub"
    _header(frames, end)
    try:
        message: FromHub = _cleaned(_from_hub.decode(frames[1]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{error}; {end}") from error
    announced = message.frames if isinstance(message, m.TaskOffer) else []
    _check_payloads(announced, frames[2:], type(message).__name__, end)
    if isinstance(message, m.TaskOffer):
        message.payloads = frames[2:]
    return message
