"""Messages to frames and back: decoding is validation, and errors carry the field's path.

On the wire: two frames, ``HEADER`` and one msgpack map whose ``type`` names the class; and, of an offer that
carries tensors, one raw frame for each entry of its ``frames``. Nothing is ever unpickled.
"""

from __future__ import annotations

import msgspec

from weightbus import asks as a
from weightbus import messages as m
from weightbus.errors import ProtocolError

# The first frame of every message. A peer of another protocol version is told both.
HEADER = b"weightbus/2"

ToHub = (
    m.Hello | m.Beat | m.Leave | m.Piece | m.Enter | m.Facts | m.Ready | m.Refuse | m.Done | m.Sums | m.Poll
    | m.Clues | m.Probed
    | m.StoreSet | m.StoreGet | m.StoreAdd | m.StoreCheck | m.StoreDelete | m.StoreCount
    | m.AskTask | m.AskReplicas
    | a.AskStatus | a.AskUpdate | a.AskCheck | a.AskVersion | a.AskPause | a.AskResume
)  # fmt: skip
FromHub = (
    m.Welcome | m.Refused | m.Alive | m.Farewell | m.Offer | m.Gathered | m.Go | m.Detail | m.Outcome
    | m.Suspects | m.Probe
    | m.Polled | m.StoreValue
    | m.TaskOffer | m.TaskEnd | m.Replicas
    | a.Waiting | a.Answer | a.Status
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_to_hub: msgspec.msgpack.Decoder[ToHub] = msgspec.msgpack.Decoder(ToHub)
_from_hub: msgspec.msgpack.Decoder[FromHub] = msgspec.msgpack.Decoder(FromHub)


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
        message = _to_hub.decode(frames[1])
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
        message = _from_hub.decode(frames[1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{error}; {end}") from error
    announced = message.frames if isinstance(message, m.TaskOffer) else []
    _check_payloads(announced, frames[2:], type(message).__name__, end)
    if isinstance(message, m.TaskOffer):
        message.payloads = frames[2:]
    return message
