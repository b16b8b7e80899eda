"""Messages to frames and back: decoding is validation, and errors carry the field's path.

On the wire: two frames, ``HEADER`` and one msgpack map whose ``type`` names the class. Nothing is
ever unpickled.
"""

from __future__ import annotations

import msgspec

from weightbus import asks as a
from weightbus import messages as m
from weightbus.errors import ProtocolError

# The first frame of every message. A peer of another protocol version is told both.
HEADER = b"weightbus/1"

ToHub = (
    m.Hello | m.Beat | m.Leave | m.Piece | m.Enter | m.Facts | m.Ready | m.Refuse | m.Done | m.Sums | m.Poll
    | m.Clues | m.Probed
    | m.StoreSet | m.StoreGet | m.StoreAdd | m.StoreCheck | m.StoreDelete | m.StoreCount
    | a.AskStatus | a.AskUpdate | a.AskCheck | a.AskVersion | a.AskPause | a.AskResume
)  # fmt: skip
FromHub = (
    m.Welcome | m.Refused | m.Alive | m.Farewell | m.Offer | m.Gathered | m.Go | m.Detail | m.Outcome
    | m.Suspects | m.Probe
    | m.Polled | m.StoreValue
    | a.Waiting | a.Answer | a.Status
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_to_hub: msgspec.msgpack.Decoder[ToHub] = msgspec.msgpack.Decoder(ToHub)
_from_hub: msgspec.msgpack.Decoder[FromHub] = msgspec.msgpack.Decoder(FromHub)


def encode(message: m.Message) -> list[bytes]:
    return [HEADER, _encoder.encode(message)]


def encode_to_hub(message: m.Message, peer: str) -> list[list[bytes]]:
    """One message of two frames, or the pieces of a long one, which the hub takes from a member only."""
    frames = encode(message)
    payload = frames[1]
    if len(payload) <= m.PIECE_BYTES:
        return [frames]
    cuts = range(0, len(payload), m.PIECE_BYTES)
    return [
        encode(m.Piece(peer=peer, blob=payload[at : at + m.PIECE_BYTES], last=at == cuts[-1])) for at in cuts
    ]


def _payload(frames: list[bytes], end: str) -> bytes:
    if not frames or frames[0] != HEADER:
        got = frames[0][:32] if frames else b""
        raise ProtocolError(f"expected protocol {HEADER.decode()}, got {got!r}; {end}")
    if len(frames) != 2:
        raise ProtocolError(f"expected 2 frames, got {len(frames)}; {end}")
    return frames[1]


def decode_to_hub(frames: list[bytes]) -> ToHub:
    """Raises ProtocolError with the field's path."""
    payload = _payload(frames, "message to the hub")
    try:
        return _to_hub.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{error}; message to the hub") from error


def decode_from_hub(frames: list[bytes]) -> FromHub:
    """Raises ProtocolError with the field's path."""
    payload = _payload(frames, "answer of the hub")
    try:
        return _from_hub.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{error}; answer of the hub") from error
