"""A rank's connections to the hub: one for messages, one for heartbeats from a thread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from typing import Any

import zmq

from weightbus import messages as m
from weightbus.errors import HubError, ProtocolError
from weightbus.hub import DEAD_AFTER_S, check_loopback, host_and_port


def ensure_hub(address: str, *, dead_after_s: float = DEAD_AFTER_S) -> None:
    """Start a hub at ``address``, in a process of its own, unless something listens there.

    Returns once it listens. The hub leaves with its last peer. Called by trainer rank 0.
    Raises HubError with the hub's own words if it ends at once.
    """
    check_loopback(address)
    if listens(address):
        return
    command = [sys.executable, "-m", "weightbus.hub", "--address", address, "--ephemeral"]
    with tempfile.TemporaryFile() as words:
        # A session of its own: a signal to the trainer's process group must not end the hub before
        # the server ranks have heard of the trainer's end.
        hub = subprocess.Popen(
            [*command, "--dead-after", str(dead_after_s)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_HUB_S
        while not listens(address):
            if hub.poll() is not None:
                words.seek(0)
                said = words.read().decode(errors="replace").strip()
                raise HubError(f"no hub could be started at {address}: {said}")
            if time.monotonic() > deadline:
                hub.kill()
                raise HubError(f"the hub started at {address} did not listen within {START_HUB_S:.0f} s")
            time.sleep(0.02)


def listens(address: str) -> bool:
    try:
        socket.create_connection(host_and_port(address), timeout=2.0).close()
    except OSError:
        return False
    return True


START_HUB_S = 30.0

# A hello may have gone to a hub that was just leaving.
HELLO_AGAIN_S = 3.0


class Connection:
    """One DEALER socket to the hub. For one thread at a time."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.address = address
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.connect(address)

    def send(self, message: m.Message) -> None:
        try:
            self._socket.send_multipart(m.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise HubError(f"could not send {type(message).__name__} to {self.address}: {error}") from error

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> m.FromHub | None:
        """The next message, or None after ``timeout_s``. Raises ProtocolError.

        spin_s: how long to look again and again before waiting, which is woken up late.
        """
        if spin_s:
            until = time.monotonic() + min(spin_s, timeout_s)
            while not self._socket.poll(0) and time.monotonic() < until:
                pass
        if not self._socket.poll(max(0, round(timeout_s * 1000))):
            return None
        return m.decode_from_hub(self._socket.recv_multipart())

    def close(self) -> None:
        self._socket.close()


class Link:
    """One process's membership of the hub at ``address``."""

    def __init__(self, address: str) -> None:
        check_loopback(address)
        self.address = address
        self.peer = ""
        self.process = uuid.uuid4().hex
        self.context: zmq.Context[Any] = zmq.Context()
        self._connection = Connection(self.context, address)
        self._inbox: deque[m.FromHub] = deque()
        self._lost = ""
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def join(
        self,
        *,
        role: m.Role,
        rank: int,
        size: int,
        replica: int,
        device: str,
        timeout_s: float,
        start_hub_dead_after_s: float | None = None,
    ) -> None:
        """Take a role; given ``start_hub_dead_after_s``, start a hub as long as none listens.

        Raises HubError with the hub's reason, or if none answers in ``timeout_s``.
        """
        hello = m.Hello(
            process=self.process,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=device,  # type: ignore[arg-type]
            role=role,
            rank=rank,
            size=size,
            replica=replica,
        )
        deadline = time.monotonic() + timeout_s
        first = 0.0
        while True:
            if start_hub_dead_after_s is not None:
                ensure_hub(self.address, dead_after_s=start_hub_dead_after_s)
            self._connection.send(hello)
            answer = self._await_answer(min(deadline, time.monotonic() + HELLO_AGAIN_S))
            if isinstance(answer, m.Welcome):
                break
            now = time.monotonic()
            if answer is None:
                if now > deadline:
                    raise HubError(f"no hub answered at {self.address} for {timeout_s:.0f} s")
                continue
            first = first or now
            # The place may be held by a process that has died, which the hub learns only with time;
            # unless it has been heard since we first asked.
            alive = answer.silent_s is None or now - answer.silent_s > first + 1.0
            if alive or now + 0.5 > deadline:
                raise HubError(f"the hub at {self.address} refused: {answer.reason}")
            time.sleep(0.5)
        self.peer = answer.peer
        if self._beats is None:
            self._beats = threading.Thread(
                target=self._beat, args=(answer.beat_s,), name="weightbus-beat", daemon=True
            )
            self._beats.start()

    def _await_answer(self, deadline: float) -> m.Welcome | m.Refused | None:
        while True:
            answer = self._connection.receive(min(0.5, max(0.0, deadline - time.monotonic())))
            if isinstance(answer, m.Welcome | m.Refused):
                return answer
            if answer is not None:
                self._inbox.append(answer)
            elif time.monotonic() > deadline:
                return None

    def send(self, message: m.Message) -> None:
        self._connection.send(message)

    def receive(self, timeout_s: float, *, spin_s: float = 0.0) -> m.FromHub | None:
        """The next message, or None after ``timeout_s``. Raises HubError once the hub is lost."""
        if self._inbox:
            return self._inbox.popleft()
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            answer = self._connection.receive(min(0.5, max(0.0, left)), spin_s=spin_s)
            spin_s = 0.0
            if isinstance(answer, m.Refused):
                raise ProtocolError(f"the hub at {self.address} refused a message: {answer.reason}")
            if isinstance(answer, m.Welcome):
                continue  # to a hello that was said again
            if answer is not None:
                return answer
            if self._lost:
                raise HubError(self._lost)
            if left <= 0:
                return None

    def push_back(self, message: m.FromHub) -> None:
        """The next ``receive`` returns ``message``."""
        self._inbox.appendleft(message)

    def leave(self, role: m.Role) -> None:
        if self.peer and not self._lost:
            self._connection.send(m.Leave(peer=self.peer, role=role))

    def close(self) -> None:
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
        self._connection.close()
        self.context.term()

    def _beat(self, beat_s: float) -> None:
        """Heartbeats, from a thread: a rank that is busy is not dead."""
        connection = Connection(self.context, self.address)
        heard = time.monotonic()
        try:
            while not self._stop.is_set():
                connection.send(m.Beat(peer=self.peer))
                answer = connection.receive(beat_s)
                now = time.monotonic()
                if isinstance(answer, m.Alive):
                    heard = now
                    if not answer.known:
                        self._lost = f"the hub at {self.address} has dropped this rank"
                        return
                elif now - heard > DEAD_AFTER_S:
                    self._lost = f"the hub at {self.address} has not answered for {now - heard:.1f} s"
                    return
                self._stop.wait(beat_s)
        except (HubError, ProtocolError) as error:
            self._lost = str(error)
        finally:
            connection.close()
