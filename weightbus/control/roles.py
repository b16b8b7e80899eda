"""What the key of each role may send to the hub. Pure: the hub asks for each message, after decoding it."""

from __future__ import annotations

from weightbus.control import client_messages as a
from weightbus.control import messages as m

_STATUS: tuple[type[m.Message], ...] = (a.AskStatus,)
_CLIENT = (
    *_STATUS,
    m.AskReplicas,
    m.AskTask,
    m.Piece,
    a.AskPause,
    a.AskResume,
    a.AskUpdate,
    a.AskCheck,
    a.AskVersion,
)
# A server takes part in rounds and in tasks that others ask for; it begins none.
_SERVER = (
    *_STATUS,
    m.AskReplicas,
    m.Hello,
    m.Beat,
    m.Leave,
    m.Piece,
    m.Facts,
    m.Ready,
    m.Refuse,
    m.Later,
    m.Await,
    m.Done,
    m.Sums,
    m.Clues,
    m.Probed,
    m.StoreSet,
    m.StoreGet,
    m.StoreAdd,
    m.StoreCheck,
    m.StoreDelete,
    m.StoreCount,
)
_MAY_SEND = {"status": frozenset(_STATUS), "client": frozenset(_CLIENT), "server": frozenset(_SERVER)}


def may_send(key_role: str, message: m.Message) -> bool:
    """Whether a key of ``key_role`` may send ``message``. A role that is not known may send nothing."""
    if key_role in ("", "trainer"):
        return True
    if type(message) not in _MAY_SEND.get(key_role, frozenset()):
        return False
    return not isinstance(message, m.Hello) or message.role == key_role
