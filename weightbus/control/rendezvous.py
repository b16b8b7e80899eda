"""Keys through which the ranks of an epoch find each other, kept by the hub (see ``store``)."""

from __future__ import annotations

from weightbus.control import messages as m
from weightbus.errors import ProtocolError

MAX_STORE_KEYS = 100_000
MAX_STORE_BYTES = 256 << 20

# Of these, what ranks may set that are of no group yet.
MAX_STRANGE_BYTES = 16 << 20


class Rendezvous:
    """The process group's store. Keys of an older epoch are of no use to anyone, and go."""

    def __init__(self) -> None:
        self._keys: dict[str, bytes] = {}
        self._nbytes = 0
        self._epoch = 0
        self._strange = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def call(self, message: m.StoreCall, epoch: int, *, member: bool = True) -> m.StoreValue:
        """The answer to one call. member: of the group whose epoch it is. Raises ProtocolError if there are too
        many keys, or bytes in them."""
        if self._epoch != epoch:
            self._epoch = epoch
            self._keys = {key: value for key, value in self._keys.items() if key.startswith(f"{epoch}/")}
            self._nbytes = sum(len(key) + len(value) for key, value in self._keys.items())
            self._strange = 0
        if not member and isinstance(message, m.StoreSet | m.StoreAdd):
            self._strange += len(message.key) + (len(message.value) if isinstance(message, m.StoreSet) else 20)
            if self._strange > MAX_STRANGE_BYTES:
                raise ProtocolError(
                    f"store: expected at most {MAX_STRANGE_BYTES} bytes of ranks without a group"
                )
        call = message.call
        match message:
            case m.StoreGet():
                return m.StoreValue(call=call, value=self._keys.get(message.key))
            case m.StoreCheck():
                return m.StoreValue(call=call, number=int(all(key in self._keys for key in message.keys)))
            case m.StoreDelete():
                return m.StoreValue(call=call, number=int(self._delete(message.key)))
            case m.StoreCount():
                return m.StoreValue(call=call, number=len(self._keys))
            case m.StoreSet():
                self._set(message.key, message.value)
                return m.StoreValue(call=call)
            case m.StoreAdd():
                return m.StoreValue(call=call, number=self._add(message.key, message.amount))
        raise ProtocolError(f"{type(message).__name__}: not for the store")

    def _set(self, key: str, value: bytes) -> None:
        old = self._keys.get(key)
        if old is None and len(self._keys) >= MAX_STORE_KEYS:
            raise ProtocolError(f"store: expected at most {MAX_STORE_KEYS} keys")
        grown = len(value) - len(old) if old is not None else len(key) + len(value)
        if self._nbytes + grown > MAX_STORE_BYTES:
            raise ProtocolError(f"store: expected at most {MAX_STORE_BYTES} bytes")
        self._nbytes += grown
        self._keys[key] = value

    def _add(self, key: str, amount: int) -> int:
        """As torch's stores count: the value is a decimal number in text."""
        try:
            total = int(self._keys.get(key, b"0")) + amount
        except ValueError as error:
            raise ProtocolError(f"store: {key} holds no number") from error
        if not -(1 << 62) <= total < 1 << 62:
            raise ProtocolError(f"store: {key}: expected a sum of 63 bits, got {total}")
        self._set(key, str(total).encode())
        return total

    def _delete(self, key: str) -> bool:
        value = self._keys.pop(key, None)
        if value is None:
            return False
        self._nbytes -= len(key) + len(value)
        return True
