"""Which ranks can be reached at their data addresses, for who is to be named where a transfer has stalled."""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Mapping

from weightbus.control import messages as m

# A packet may be lost: after so long a connection is tried anew.
_TRY_S = 0.25

# Nobody listens there any more, but the host has said so.
_REACHED = (0, errno.ECONNREFUSED)


def unreached(addresses: Mapping[int, tuple[str, int]]) -> list[int]:
    """Ranks whose hosts have not answered within ``m.REACH_S``. addresses: IP address and port of each."""
    left, until = dict(addresses), time.monotonic() + m.REACH_S
    while left and (remains := until - time.monotonic()) > 0:
        for rank in _reached(left, min(_TRY_S, remains)):
            del left[rank]
    return sorted(left)


def _reached(addresses: Mapping[int, tuple[str, int]], timeout_s: float) -> list[int]:
    """Those that answer to one try; takes ``timeout_s`` unless all do."""
    reached, until = [], time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        try:
            for rank, address in addresses.items():
                one = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
                one.setblocking(False)
                one.connect_ex(address)
                selector.register(one, selectors.EVENT_WRITE, rank)
            while selector.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    one = selector.unregister(key.fileobj).fileobj  # type: ignore[assignment]
                    if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in _REACHED:
                        reached.append(key.data)
                    one.close()
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
    if len(reached) < len(addresses):
        time.sleep(max(0.0, until - time.monotonic()))
    return reached
