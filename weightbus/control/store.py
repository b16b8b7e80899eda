"""Rendezvous of the process group through the hub, so that no other address is opened for it."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

from weightbus.control import messages as m
from weightbus.control.link import Link
from weightbus.errors import HubError

_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.05
_ANSWER_S = 30.0


class HubStore(dist.Store):  # type: ignore[misc, name-defined]
    """A ``torch.distributed.Store`` whose keys live in the hub, under the epoch's prefix.

    The process group's threads may call it at any time, so each call holds a lock for one exchange
    of messages only; a wait is a series of short calls. Keep a reference for as long as the group
    lives: the group itself keeps none to the Python object.
    """

    def __init__(self, link: Link, epoch: int, timeout_s: float) -> None:
        super().__init__()
        self._link = link
        self._calls = 0
        self._prefix = f"{epoch}/"
        self._header = link.rounds.header._replace(epoch=epoch, update=0)
        self._limit = timedelta(seconds=timeout_s)
        self._lock = threading.Lock()
        self._connection = link.connect()
        self._closed = False
        self.values: dict[str, bytes] = {}  # all that this rank has set and got: where members can be reached

    def _call(self, message: m.StoreCall) -> m.StoreValue:
        with self._lock:
            if self._closed:
                raise HubError("the process group's store is closed")
            self._calls += 1
            message.peer, message.call = self._link.peer, self._calls
            message.stamp(self._header)
            self._connection.send(message)
            deadline = time.monotonic() + _ANSWER_S
            while True:
                # In short waits: a hub that is gone answers nothing, and its keys are gone with it.
                answer = self._connection.receive(min(0.5, max(0.0, deadline - time.monotonic())))
                if isinstance(answer, m.StoreValue) and answer.call != self._calls:
                    continue  # late, to a call that was given up
                if answer is not None:
                    break
                if self._link.lost or time.monotonic() > deadline:
                    break
        if not isinstance(answer, m.StoreValue):
            reason = self._link.lost or f"got {answer}"
            raise HubError(f"rendezvous: expected a value from {self._connection.address}: {reason}")
        return answer

    def _key(self, key: str) -> str:
        return self._prefix + key

    def set(self, key: str, value: str | bytes) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self.values[key] = value
        self._call(m.StoreSet(peer="", call=0, key=self._key(key), value=value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        value = self._call(m.StoreGet(peer="", call=0, key=self._key(key))).value or b""
        self.values[key] = value
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        # torch's own timeout is meant for connections; that others are late is not for it to end.
        deadline = time.monotonic() + max(timeout or self._limit, self._limit).total_seconds()
        pause = _FIRST_PAUSE_S
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"rendezvous: expected keys {keys} in time, got none")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def add(self, key: str, amount: int) -> int:
        return self._call(m.StoreAdd(peer="", call=0, key=self._key(key), amount=amount)).number

    def check(self, keys: list[str]) -> bool:
        return bool(self._call(m.StoreCheck(peer="", call=0, keys=[self._key(key) for key in keys])).number)

    def delete_key(self, key: str) -> bool:
        return bool(self._call(m.StoreDelete(peer="", call=0, key=self._key(key))).number)

    def num_keys(self) -> int:
        return self._call(m.StoreCount(peer="", call=0)).number

    def set_timeout(self, timeout: timedelta) -> None:
        self._limit = timeout

    @property
    def timeout(self) -> timedelta:
        return self._limit

    def close(self) -> None:
        """Whoever waits for a key gets HubError."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._connection.close()
