"""CURVE keys of the control channel: files, environment, and the list of clients that are let in.

A directory of keys, as ``weightbus keygen`` makes it; a host needs only the files of its part:

    hub.public      every end: whom it expects to answer
    client.secret   every rank and tool: who it is
    hub.secret      where the hub runs: who it is
    allowed         where the hub runs: public keys of clients, a line each: key, name, and role if it has one

A key is 40 characters of Z85. ``WEIGHTBUS_KEYS`` names the directory; or ``WEIGHTBUS_HUB_PUBLIC``,
``WEIGHTBUS_CLIENT_SECRET``, ``WEIGHTBUS_HUB_SECRET`` and ``WEIGHTBUS_ALLOWED`` (keys apart by commas) hold
keys themselves.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zmq
from zmq.utils import z85

from weightbus.errors import HubError

KEY_BYTES = 40


def host_and_port(address: str) -> tuple[str, int]:
    """Of ``tcp://host:port``. Raises HubError for anything else."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise HubError(f"address: expected tcp://host:port, got {address!r}") from None
    if parts.scheme != "tcp" or not host or not port:
        raise HubError(f"address: expected tcp://host:port, got {address!r}")
    return host, port


def is_loopback(address: str) -> bool:
    """Whether only this host can reach ``address``."""
    host, _ = host_and_port(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Keys of one host; empty where it has no part that needs them. insecure: none, at any address."""

    hub_public: str = field(default="", repr=False)
    client_secret: str = field(default="", repr=False)
    hub_secret: str = field(default="", repr=False)
    allowed: tuple[str, ...] = ()
    directory: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        for name in ("hub_public", "client_secret", "hub_secret"):
            _check(getattr(self, name), name)
        for key in self.allowed:
            _check(key, "allowed")

    @property
    def client(self) -> bool:
        """Whether a client has what it needs."""
        return bool(self.hub_public and self.client_secret)

    def check(self, address: str) -> None:
        """Raises HubError if others than this host could reach ``address`` and there are no keys."""
        if not (is_loopback(address) or self.insecure or self.client or self.hub_secret):
            raise HubError(
                f"address: expected a loopback address, or keys (weightbus keygen), got {address!r} without;"
                " insecure=True takes the risk"
            )

    def protect_client(self, socket: zmq.Socket[Any]) -> None:
        """Before ``connect``: only the hub that holds the secret of ``hub_public`` is talked to."""
        if self.client:
            socket.curve_serverkey = self.hub_public.encode()
            socket.curve_secretkey = self.client_secret.encode()
            socket.curve_publickey = zmq.curve_public(self.client_secret.encode())

    def admits(self) -> frozenset[str]:
        """Public keys that the hub lets in; read anew, so that one can be added while the hub runs."""
        if self.directory is None:
            return frozenset(self.allowed)
        return frozenset(self.roles())

    def roles(self) -> dict[str, str]:
        """The role of each public key that is let in, as the list says it; "" for a key of any role."""
        if self.directory is None:
            return dict.fromkeys(self.allowed, "")
        lines = _words(_read(self.directory / "allowed"))
        return {words[0]: "".join(words[2:3]) for words in lines}


def _check(key: str, name: str) -> None:
    try:
        good = not key or len(z85.decode(key)) == 32
    except (KeyError, ValueError, TypeError, struct.error):
        good = False
    if not good or (key and len(key) != KEY_BYTES):
        raise HubError(f"{name}: expected a key of {KEY_BYTES} characters of Z85, got {len(key)} characters")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise HubError(f"keys: can't read {path}: {error}") from error


def _lines(text: str) -> list[str]:
    """The first word of each line. ``#``, with which a key may go on but not begin, starts a comment line."""
    return [words[0] for words in _words(text)]


def _words(text: str) -> list[list[str]]:
    lines = (line.split() for line in text.splitlines())
    return [words for words in lines if words and not words[0].startswith("#")]


def load_keys(directory: str | os.PathLike[str] | None = None, *, insecure: bool = False) -> Keys:
    """Keys from a directory, or from the environment; none at all is fine for a loopback address.

    Raises HubError for a directory without keys, or a key that is none.
    """
    directory = directory or os.environ.get("WEIGHTBUS_KEYS") or None
    if directory is None:
        env = os.environ
        return Keys(
            hub_public=env.get("WEIGHTBUS_HUB_PUBLIC", ""),
            client_secret=env.get("WEIGHTBUS_CLIENT_SECRET", ""),
            hub_secret=env.get("WEIGHTBUS_HUB_SECRET", ""),
            allowed=tuple(key for key in env.get("WEIGHTBUS_ALLOWED", "").replace(",", " ").split()),
            insecure=insecure,
        )
    path = Path(directory)
    keys = Keys(
        hub_public=_read(path / "hub.public"),
        client_secret=_read(path / "client.secret"),
        hub_secret=_read(path / "hub.secret"),
        allowed=tuple(_lines(_read(path / "allowed"))),
        directory=path,
        insecure=insecure,
    )
    if not (keys.client or keys.hub_secret):
        raise HubError(f"keys: expected hub.public and client.secret, or hub.secret, in {path}")
    return keys


def generate(directory: str | os.PathLike[str], client: str = "client", role: str = "") -> list[Path]:
    """Make what is missing of a hub's keys in ``directory``, and keys of one client; the files written.

    Never overwrites: raises HubError if the client's secret exists. The client's public key is added to
    ``allowed``, with its role; without one it may do all.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (path / f"{client}.secret").exists():
        raise HubError(f"keys: {path / f'{client}.secret'} exists; expected another name")
    written = []
    if not (path / "hub.public").exists():
        public, secret = zmq.curve_keypair()
        written += [_write(path / "hub.public", public, 0o644), _write(path / "hub.secret", secret, 0o600)]
    public, secret = zmq.curve_keypair()
    written.append(_write(path / f"{client}.secret", secret, 0o600))
    with open(path / "allowed", "a") as allowed:
        allowed.write(f"{public.decode()} {client} {role}".rstrip() + "\n")
    return [*written, path / "allowed"]


def _write(path: Path, key: bytes, mode: int) -> Path:
    """Made with its mode: a secret is never readable by others, not even for a moment."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(key + b"\n")
    return path
