"""The one family of errors. Texts read: *name: expected X, got Y; where.*"""

from __future__ import annotations


def visible(text: str) -> str:
    """``text`` as one line that a terminal does no more than show: a line break is a space, ``?`` stands for
    whatever else is not printable, as escape codes and marks that turn the direction are. Never longer."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.splitlines()))


class WeightbusError(RuntimeError):
    """Base of every error that weightbus raises on purpose. Its lines are ``visible``, whoever wrote them."""

    def __init__(self, text: str = "") -> None:
        super().__init__("\n".join(map(visible, text.split("\n"))))


class SpecError(WeightbusError, ValueError):
    """A name, shape, dtype or placement that cannot be moved; nothing has been written."""


class CoverageError(SpecError):
    """Boxes that leave out elements of a tensor, or hold them twice; nothing has been written."""


class ProtocolError(WeightbusError):
    """A message that the schema, the epoch or the state of an update does not allow."""


class HubError(WeightbusError):
    """The hub cannot be reached, or it refused this rank."""


class UpdateError(WeightbusError):
    """An update or a check ended without a commit; the text names each failing rank."""


class TornError(UpdateError):
    """An update failed after bytes had moved: the named server ranks hold a mixture."""


class DigestError(WeightbusError):
    """Bytes that differ from what their digest says, or replicas that differ from each other."""
