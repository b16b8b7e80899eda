"""Two hosts on one machine: network namespaces joined by a pair of virtual interfaces."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3


def _ip(*words: str) -> None:
    command = ["ip", *words]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)  # noqa: S603 - as the user has it


def why_not() -> str:
    """Why namespaces can't be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"wbtry{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except FileNotFoundError:
        return "no `ip` command"
    except (subprocess.SubprocessError, OSError) as error:
        return f"ip netns add: {getattr(error, 'stderr', None) or error}".strip()
    return ""


@dataclass(frozen=True, kw_only=True)
class Host:
    namespace: str
    address: str
    interface: str

    def enter(self) -> None:
        """This thread, and what it starts, is on this host from now on."""
        with open(f"/var/run/netns/{self.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def vanish(self) -> None:
        """No packet comes from it or goes to it any more."""
        _ip("-n", self.namespace, "link", "set", self.interface, "down")

    def appear(self) -> None:
        """It is there again."""
        _ip("-n", self.namespace, "link", "set", self.interface, "up")

    def lose(self, other: Host) -> None:
        """What it sends to ``other`` by this interface is lost, and it is not told."""
        nowhere = ("lladdr", "02:00:00:00:00:01", "dev", self.interface, "nud", "permanent")
        _ip("-n", self.namespace, "neigh", "replace", other.address, *nowhere)

    def find(self, other: Host) -> None:
        """What it sends to ``other`` arrives again."""
        _ip("-n", self.namespace, "neigh", "del", other.address, "dev", self.interface)


def _join(one: Host, two: Host) -> None:
    """A link between them."""
    _ip("link", "add", one.interface, "netns", one.namespace, "type", "veth", "peer", "name", two.interface,
       "netns", two.namespace)  # fmt: skip
    for host in (one, two):
        inside = ("-n", host.namespace)
        _ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.interface)
        _ip(*inside, "link", "set", host.interface, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    stem = f"wb{os.getpid() % 100000}"
    one = Host(namespace=f"{stem}a", address="10.77.0.1", interface=f"{stem}x")
    two = Host(namespace=f"{stem}b", address="10.77.0.2", interface=f"{stem}y")
    try:
        for host in (one, two):
            _ip("netns", "add", host.namespace)
        _join(one, two)
        for host in (one, two):
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield one, two
    finally:
        for host in (one, two):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", host.namespace)


def second_link(one: Host, two: Host) -> tuple[Host, Host]:
    """Another link between two hosts: the same, by their interfaces and addresses on it."""
    ends = (
        replace(one, address="10.78.0.1", interface=f"{one.interface}d"),
        replace(two, address="10.78.0.2", interface=f"{two.interface}d"),
    )
    _join(*ends)
    return ends


@dataclass
class Capture:
    """All packets that pass a host's interface, each with its TCP ports, as they are on the wire."""

    host: Host
    packets: list[bytes] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Capture:
        ready = threading.Event()

        def listen() -> None:
            self.host.enter()
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sniffer:
                sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
                sniffer.bind((self.host.interface, 0))
                sniffer.settimeout(0.2)
                ready.set()
                while not self._stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        self.packets.append(sniffer.recv(1 << 17))

        self._thread = threading.Thread(target=listen, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def of_port(self, port: int) -> bytes:
        """All bytes of packets to or from a TCP port, one after another."""
        found = []
        for packet in self.packets:
            if packet[12:14] == b"\x08\x00" and packet[23] == 6:
                start = 14 + 4 * (packet[14] & 15)
                if port in (
                    int.from_bytes(packet[start : start + 2]),
                    int.from_bytes(packet[start + 2 : start + 4]),
                ):
                    found.append(packet[start:])
        return b"".join(found)
