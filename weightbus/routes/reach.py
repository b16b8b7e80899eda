"""Which ranks can be reached at their data addresses, for who is to be named where a transfer has stalled."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Mapping

from weightbus.control import messages as m

# A packet may be lost: after so long a connection is tried anew.
_TRY_S = 0.25

# What says that a host is not reached; any other error says nothing of the link, or comes from the host.
_LOST = (errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ETIMEDOUT)


def unreached(addresses: Mapping[int, tuple[str, int]]) -> list[int]:
    """Ranks whose hosts have not answered within ``m.REACH_S``. addresses: IP address and port of each."""
    left, until = dict(addresses), time.monotonic() + m.REACH_S
    while left and (remains := until - time.monotonic()) > 0:
        try:
            for rank in _reached(left, min(_TRY_S, remains)):
                del left[rank]
        except OSError:  # no socket is left for it: that says nothing of the others
            return []
    return sorted(left)


def _reached(addresses: Mapping[int, tuple[str, int]], timeout_s: float) -> list[int]:
    """Those that answer to one try; takes ``timeout_s`` unless all do."""
    reached, until = [], time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for rank, address in addresses.items():
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            one = stack.enter_context(socket.socket(family))
            one.setblocking(False)
            if (error := one.connect_ex(address)) == errno.EINPROGRESS:
                selector.register(one, selectors.EVENT_WRITE, (rank, one))
            elif error not in _LOST:
                reached.append(rank)
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                rank, one = key.data
                selector.unregister(one)
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) not in _LOST:
                    reached.append(rank)
    if len(reached) < len(addresses):
        time.sleep(max(0.0, until - time.monotonic()))
    return reached
