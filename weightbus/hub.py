"""The hub: the one address that all ranks and tools talk to. A process of its own, without torch.

``python -m weightbus.hub --address tcp://127.0.0.1:5757``. It owns one ROUTER socket, decodes what
comes in, lets ``Coordinator`` decide, keeps the rendezvous keys of the process group, and sends.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import secrets
import signal
import time
from urllib.parse import urlsplit

import zmq

from weightbus import messages as m
from weightbus.errors import HubError, ProtocolError
from weightbus.protocol import Coordinator
from weightbus.roster import Peer

log = logging.getLogger("weightbus.hub")

BEAT_S = 0.5
DEAD_AFTER_S = 10.0

# An ephemeral hub stays this long after its last peer, for those who are just coming.
LINGER_S = 2.0

# A hub that nobody has joined for this long after its start has no one to serve.
UNUSED_S = 60.0

MAX_STORE_KEYS = 100_000

# In a round, the hub and its ranks look for the next message so long before they wait for it: being woken
# up costs more than all else that they do. Only where there are cores to spare.
SPIN_S = 0.001 if (os.cpu_count() or 1) >= 8 else 0.0
HUB_SPIN_S = 100 * SPIN_S


def host_and_port(address: str) -> tuple[str, int]:
    """Of ``tcp://host:port``. Raises HubError for anything else."""
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or not port:
        raise HubError(f"address: expected tcp://host:port, got {address!r}")
    return parts.hostname, port


def check_loopback(address: str) -> None:
    """Raises HubError unless only this host can reach ``address``: the channel has no keys."""
    host, _ = host_and_port(address)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise HubError(f"address: expected a loopback address, got {address!r}")


class Hub:
    """Serves one address until it is stopped or, if ``ephemeral``, until its last peer has left."""

    def __init__(self, address: str, *, ephemeral: bool = False, dead_after_s: float = DEAD_AFTER_S) -> None:
        check_loopback(address)
        self.coordinator = Coordinator(dead_after_s=dead_after_s)
        self.ephemeral = ephemeral
        self.refused = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.IPV6, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise HubError(f"address: can't listen on {address}: {error}") from error
        self._identities: dict[str, bytes] = {}
        self._store: dict[str, bytes] = {}
        self._store_epoch = 0
        self._started = time.monotonic()
        self._joined = False
        self._last_peer = 0.0
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    def serve(self) -> None:
        try:
            next_tick = 0.0
            while not self._stopping and not self._deserted():
                if self._arrives(0.05):
                    # Bounded, so that a flood does not keep the clock from ticking.
                    for _ in range(1000):
                        try:
                            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                        except zmq.Again:
                            break
                        self._receive(identity, frames)
                now = time.monotonic()
                if now >= next_tick:
                    next_tick = now + 0.05
                    for peer in self.coordinator.roster.silent(now):
                        self._drop(peer, f"died: not heard for {now - peer.heard:.1f} s", now)
                    self.coordinator.advance(now)
                    self._flush()
        finally:
            self._socket.close()
            self._context.term()

    def _arrives(self, timeout_s: float) -> bool:
        """Whether a message is there, or comes in time."""
        until = time.monotonic() + (HUB_SPIN_S if self.coordinator.round is not None else 0.0)
        while not self._socket.poll(0):
            if time.monotonic() >= until:
                return bool(self._socket.poll(round(timeout_s * 1000)))
        return True

    def _deserted(self) -> bool:
        now = time.monotonic()
        if not self.ephemeral:
            return False
        if self.coordinator.roster.peers:
            self._last_peer = now
            return False
        return now - self._last_peer > LINGER_S if self._joined else now - self._started > UNUSED_S

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            message = m.decode_to_hub(frames)
            answer = self._handle(identity, message, time.monotonic())
        except ProtocolError as error:
            self.refused += 1
            log.warning("refused: %s", error)
            answer = m.Refused(reason=str(error))
        if answer is not None:
            self._send(identity, answer)
        self._flush()

    def _handle(self, identity: bytes, message: m.ToHub, now: float) -> m.Message | None:
        coordinator = self.coordinator
        peers = coordinator.roster.peers
        match message:
            case m.Hello():
                return self._hello(identity, message, now)
            case m.Beat():
                if message.peer in peers:
                    peers[message.peer].heard = now
                return m.Alive(known=message.peer in peers)
            case (
                m.Leave() | m.Enter() | m.Facts() | m.Ready() | m.Refuse()
                | m.Done() | m.Sums() | m.Clues() | m.Probed()
            ):  # fmt: skip
                if self._identities.get(message.peer) != identity:
                    raise ProtocolError(f"{type(message).__name__}: peer {message.peer!r} is not known here")
                peers[message.peer].heard = now
                if isinstance(message, m.Leave):
                    self._leave(peers[message.peer], message.role, now)
                elif isinstance(message, m.Enter):
                    coordinator.enter(message, now)
                elif not coordinator.answer(message, now):
                    log.info("late: %s for update %d", type(message).__name__, message.update)
                return None
            case m.AskTask():
                coordinator.tasks.ask(identity, message, now)
                coordinator.advance(now)
                return None
            case m.AskReplicas():
                return coordinator.tasks.replicas(message.id, coordinator.round is not None)
            case _:
                return self._rendezvous(message)

    def _hello(self, identity: bytes, hello: m.Hello, now: float) -> m.Message:
        token = next((p for p, i in self._identities.items() if i == identity), secrets.token_hex(8))
        admitted = self.coordinator.roster.admit(hello, token, now)
        if isinstance(admitted, m.Refused):
            return admitted
        if admitted.id != token:
            return m.Refused(reason=f"{admitted} has joined over another connection")
        self._identities[token] = identity
        self._joined = True
        log.info("joined: %s", admitted)
        self.coordinator.advance(now)
        return m.Welcome(peer=token, beat_s=BEAT_S)

    def _leave(self, peer: Peer, role: str, now: float) -> None:
        if len(peer.roles) > 1 and role in peer.roles:
            leaving = peer.roles.pop(role)
            gone = Peer(id=peer.id, process=peer.process, host=peer.host, pid=peer.pid, heard=now)
            gone.roles[role] = leaving
            self.coordinator.lost(gone, "left", now)
        else:
            self._drop(peer, "left", now)

    def _drop(self, peer: Peer, reason: str, now: float) -> None:
        log.info("%s: %s", peer, reason)
        del self.coordinator.roster.peers[peer.id]
        self._identities.pop(peer.id, None)
        self.coordinator.lost(peer, reason, now)

    def _rendezvous(self, message: m.ToHub) -> m.StoreValue:
        """Keys of the process group; those of an older epoch are of no use to anyone."""
        if self._store_epoch != self.coordinator.epoch:
            self._store_epoch = self.coordinator.epoch
            current = f"{self._store_epoch}/"
            self._store = {key: value for key, value in self._store.items() if key.startswith(current)}
        match message:
            case m.StoreGet():
                return m.StoreValue(value=self._store.get(message.key))
            case m.StoreCheck():
                return m.StoreValue(number=int(all(key in self._store for key in message.keys)))
            case m.StoreDelete():
                return m.StoreValue(number=int(self._store.pop(message.key, None) is not None))
            case m.StoreCount():
                return m.StoreValue(number=len(self._store))
            case m.StoreSet() | m.StoreAdd():
                if message.key not in self._store and len(self._store) >= MAX_STORE_KEYS:
                    raise ProtocolError(f"store: expected at most {MAX_STORE_KEYS} keys")
                if isinstance(message, m.StoreSet):
                    self._store[message.key] = message.value
                    return m.StoreValue()
                return m.StoreValue(number=self._add(message.key, message.amount))
        raise ProtocolError(f"{type(message).__name__}: not for the store")

    def _add(self, key: str, amount: int) -> int:
        """As torch's stores count: the value is a decimal number in text."""
        try:
            total = int(self._store.get(key, b"0")) + amount
        except ValueError as error:
            raise ProtocolError(f"store: {key} holds no number") from error
        self._store[key] = str(total).encode()
        return total

    def _flush(self) -> None:
        outbox = self.coordinator.outbox
        while outbox:
            peer, message = outbox.pop(0)
            if peer in self._identities:
                self._send(self._identities[peer], message)
        replies = self.coordinator.tasks.replies
        while replies:
            self._send(*replies.pop(0))

    def _send(self, identity: bytes, message: m.Message) -> None:
        try:
            self._socket.send_multipart([identity, *m.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Its heartbeats decide whether it is dead.
            log.warning("could not send %s: %s", type(message).__name__, error)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="weightbus hub", description="Run the hub until it is stopped.")
    parser.add_argument("--address", default="tcp://127.0.0.1:5757", help="tcp://host:port to listen on")
    parser.add_argument("--ephemeral", action="store_true", help="leave with the last peer")
    parser.add_argument(
        "--dead-after", type=float, default=DEAD_AFTER_S, metavar="SECONDS", help="drop a silent peer after"
    )
    options = parser.parse_args(arguments)
    # A hub that a trainer started has nobody who reads along.
    level = logging.ERROR if options.ephemeral else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    try:
        hub = Hub(options.address, ephemeral=options.ephemeral, dead_after_s=options.dead_after)
    except HubError as error:
        log.error("%s", error)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: hub.stop())
    hub.serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
