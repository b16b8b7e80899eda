"""CURVE keys of the control channel: files, environment, and the list of clients that are let in.

A directory of keys, as ``weightbus keygen`` makes it; a host needs only the files of its part:

    hub.public      every end: whom it expects to answer; while the hub's key is rotated, two keys, a line each
    client.secret   every rank and tool: who it is
    hub.secret      where the hub runs: who it is
    allowed         where the hub runs: public keys of clients, a line each: key, name, and role if it has one

A key is 40 characters of Z85. ``WEIGHTBUS_KEYS`` names the directory; or ``WEIGHTBUS_HUB_PUBLIC``,
``WEIGHTBUS_CLIENT_SECRET``, ``WEIGHTBUS_HUB_SECRET`` and ``WEIGHTBUS_ALLOWED`` (keys apart by commas) hold
keys themselves. Files are looked at again while ranks run, so that keys can be rotated (docs/security.md).
"""

from __future__ import annotations

import ipaddress
import logging
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import zmq
from zmq.utils import z85

from weightbus.errors import HubError

log = logging.getLogger("weightbus")

KEY_BYTES = 40

# Of a file of keys; ``allowed`` has a line for each client.
MAX_FILE_BYTES = 1 << 20

HUB = "hub"
# What a key may be limited to (``roles``); "": a key of any role.
KeyRole = Literal["", "trainer", "server", "client", "status"]
KEY_ROLES: frozenset[str] = frozenset(get_args(KeyRole))

_FILES = ("hub.public", "client.secret", "hub.secret", "allowed")
_SECRETS = ("client.secret", "hub.secret")


def host_and_port(address: str) -> tuple[str, int]:
    """Of ``tcp://host:port``. Raises HubError for anything else."""
    try:
        if not address.isprintable():  # urlsplit drops line breaks, ZeroMQ does not
            raise ValueError
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
    """Keys of one host; empty where it has no part that needs them.

    hub_public: one key, or several apart by white space, any of which the hub may have. allowed: public keys of
    clients, each with its role; "" is any. insecure: no keys, at any address.
    """

    hub_public: str = field(default="", repr=False)
    client_secret: str = field(default="", repr=False)
    hub_secret: str = field(default="", repr=False)
    allowed: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    insecure: bool = False
    _seen: tuple[object, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in self.hub_publics:
            _check(key, "hub_public")
        _check(self.client_secret, "client_secret")
        _check(self.hub_secret, "hub_secret")
        for key in self.allowed:
            _check(key, "allowed")

    @property
    def hub_publics(self) -> tuple[str, ...]:
        return tuple(self.hub_public.split())

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

    def protect_client(self, socket: zmq.Socket[Any], attempt: int = 0) -> None:
        """Before ``connect``: only the hub that holds the secret of ``hub_public`` is talked to.

        attempt: which of several keys, in turn.
        """
        if self.client:
            publics = self.hub_publics
            socket.curve_serverkey = publics[attempt % len(publics)].encode()
            socket.curve_secretkey = self.client_secret.encode()
            socket.curve_publickey = zmq.curve_public(self.client_secret.encode())

    def renewed(self) -> Keys:
        """As the files are now; itself where they are as before, or can't be read just now.

        A line of ``allowed`` that is none gives no rights, and keeps no other from counting.
        """
        if self.directory is None or self._seen == _look(self.directory):
            return self
        try:
            return _load(self.directory, insecure=self.insecure, strict=False)
        except HubError as error:
            log.warning("keys are not renewed: %s", error)
            return replace(self, _seen=_look(self.directory))


def _check(key: str, name: str) -> None:
    try:
        good = not key or len(z85.decode(key)) == 32
    except (KeyError, ValueError, TypeError, struct.error):
        good = False
    if not good or (key and len(key) != KEY_BYTES):
        raise HubError(f"{name}: expected a key of {KEY_BYTES} characters of Z85, got {len(key)} characters")


def _look(directory: Path) -> tuple[object, ...]:
    """By which a change of a file is seen."""
    found: list[object] = []
    for name in _FILES:
        try:
            status = (directory / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def _read(path: Path) -> str:
    """Raises HubError for a secret that others than its owner could read, and for what is no file of keys."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise HubError(f"keys: can't read {path}: {error}") from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise HubError(
                f"keys: expected a file of at most {MAX_FILE_BYTES} bytes, got something else: {path}"
            )
        if path.name in _SECRETS and (mode := stat.S_IMODE(status.st_mode)) & 0o027:
            raise HubError(
                f"keys: expected a secret that no others can read, got mode {mode:04o}; chmod 600 {path}"
            )
        try:
            return file.read(MAX_FILE_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise HubError(f"keys: can't read {path}: {error}") from error


def _roles(text: str, where: str, *, strict: bool) -> dict[str, str]:
    """Of the list of clients. ``#``, with which a key may go on but not begin, starts a comment line.

    strict: raises HubError for a line that is none, by its number; else it is left out, and logged.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            _check(words[0], f"{where}: line {number}")
            if len(words) > 3 or (len(words) == 3 and words[2] not in KEY_ROLES):
                roles = ", ".join(sorted(filter(None, KEY_ROLES)))
                raise HubError(f"{where}: line {number}: expected a key, a name of one word, a role ({roles})")
        except HubError as error:
            if strict:
                raise
            log.error("%s; it gives no rights", error)
        else:
            found[words[0]] = words[2] if len(words) == 3 else ""
    return found


# Variables of every rank and client, and of whoever starts the hub.
_CLIENTS = ("WEIGHTBUS_HUB_PUBLIC", "WEIGHTBUS_CLIENT_SECRET")
_HUBS = ("WEIGHTBUS_HUB_SECRET", "WEIGHTBUS_ALLOWED")


def load_keys(directory: str | os.PathLike[str] | None = None, *, insecure: bool = False) -> Keys:
    """Keys from a directory, or from the environment; none at all is fine for a loopback address.

    Raises HubError for a directory without keys, for a part of the variables that belong together, and for what
    is no key.
    """
    directory = directory or os.environ.get("WEIGHTBUS_KEYS") or None
    if directory is None:
        env = os.environ
        given = [name for name in (*_CLIENTS, *_HUBS) if env.get(name)]
        lacks = [name for name in _CLIENTS if name not in given]
        if given and lacks and (len(lacks) == 1 or _HUBS[0] not in given):
            # There would be no keys at all, and nobody would say so.
            raise HubError(
                f"keys: expected {' and '.join(lacks)} beside {' and '.join(given)} in the environment"
            )
        return Keys(
            hub_public=env.get("WEIGHTBUS_HUB_PUBLIC", ""),
            client_secret=env.get("WEIGHTBUS_CLIENT_SECRET", ""),
            hub_secret=env.get("WEIGHTBUS_HUB_SECRET", ""),
            allowed=dict.fromkeys(env.get("WEIGHTBUS_ALLOWED", "").replace(",", " ").split(), ""),
            insecure=insecure,
        )
    return _load(Path(directory), insecure=insecure, strict=True)


def _load(path: Path, *, insecure: bool, strict: bool) -> Keys:
    seen = _look(path)
    keys = Keys(
        hub_public=_read(path / "hub.public"),
        client_secret=_read(path / "client.secret"),
        hub_secret=_read(path / "hub.secret"),
        allowed=_roles(_read(path / "allowed"), str(path / "allowed"), strict=strict),
        directory=path,
        insecure=insecure,
        _seen=seen,
    )
    if not (keys.client or keys.hub_secret):
        raise HubError(f"keys: expected hub.public and client.secret, or hub.secret, in {path}")
    return keys


# -- making and rotating them ----------------------------------------------------------------------


def generate(directory: str | os.PathLike[str], client: str = "client", role: str = "") -> list[Path]:
    """Make what is missing of a hub's keys in ``directory``, and keys of one client; the files written.

    Never overwrites: raises HubError if the client's secret exists. The client's public key is added to
    ``allowed``, with its role; without one it may do all.
    """
    if client == HUB or not client.isprintable() or client.split() != [client] or "/" in client:
        what = f"a client's name without spaces and slashes, other than {HUB!r}"
        raise HubError(f"keys: expected {what}, got {client!a}")
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (path / f"{client}.secret").exists():
        raise HubError(f"keys: {path / f'{client}.secret'} exists; expected another name, or --rotate {client}")
    written = []
    if not (path / "hub.public").exists():
        public, secret = _pair()
        written += [_write(path / "hub.public", public, 0o644), _write(path / "hub.secret", secret, 0o600)]
    public, secret = _pair()
    line = f"{public} {client} {role}".rstrip()
    written.append(_write(path / f"{client}.secret", secret, 0o600))
    return [*written, _change(path / "allowed", lambda lines: [*lines, line])]


def rotate(directory: str | os.PathLike[str], name: str) -> list[Path]:
    """A new pair of keys for a client, or for the hub (``hub``); the old one stays good until ``retire``.

    Of a client: its new secret, and one more line of ``allowed``, with the role that it has. Of the hub: its
    new secret, and ``hub.public`` with the new key and the old one. Raises HubError for a name without keys.
    """
    path = Path(directory)
    public, secret = _pair()
    if name == HUB:
        if not (path / "hub.public").exists():
            raise HubError(f"keys: expected hub.public in {path}, got none")
        listed = _change(path / "hub.public", lambda lines: [public, *lines[:1]])
    else:
        mine = _of(path, name)
        listed = _change(path / "allowed", lambda lines: [*lines, " ".join([public, *mine[-1].split()[1:]])])
    return [listed, _write(path / f"{name}.secret", secret, 0o600, over=True)]


def retire(directory: str | os.PathLike[str], name: str) -> list[Path]:
    """Strike all keys of a client, or of the hub (``hub``), but the newest; the files that were changed.

    Ranks that are still connected by an old one are cut off. Raises HubError for a name without keys.
    """
    path = Path(directory)
    if name == HUB:
        return [_change(path / "hub.public", lambda lines: lines[:1])]
    old = set(_of(path, name)[:-1])
    return [_change(path / "allowed", lambda lines: [line for line in lines if line not in old])]


def _of(path: Path, name: str) -> list[str]:
    """A client's lines of ``allowed``, the oldest first."""
    lines = _read(path / "allowed").splitlines()
    found = [line for line in lines if line.split()[1:2] == [name] and not line.startswith("#")]
    if not found:
        raise HubError(f"keys: expected a line of {name!r} in {path / 'allowed'}, got none")
    return found


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _change(path: Path, change: Callable[[list[str]], list[str]]) -> Path:
    lines = change(_read(path).splitlines())
    return _write(path, "\n".join(lines), 0o644, over=True)


def _write(path: Path, text: str, mode: int, *, over: bool = False) -> Path:
    """Whole from the first moment that it has its name, and never readable by others. over: replaces a file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text + "\n")
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
            if over:
                os.replace(file.name, path)
            else:
                os.link(file.name, path)
                os.unlink(file.name)
        except BaseException:
            os.unlink(file.name)
            raise
    return path
