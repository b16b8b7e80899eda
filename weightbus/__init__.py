"""Move a trainer's new weights into running inference servers, and prove that every byte arrived."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightbus.digest import Digest, combine, model_digest, tensor_digest
    from weightbus.errors import WeightbusError
    from weightbus.publisher import Publisher
    from weightbus.subscriber import Subscriber

__all__ = ["Digest", "Publisher", "Subscriber", "WeightbusError", "combine", "model_digest", "tensor_digest"]

__version__ = "0.1.0"

_HOME = {
    "Digest": "digest",
    "Publisher": "publisher",
    "Subscriber": "subscriber",
    "WeightbusError": "errors",
    "combine": "digest",
    "model_digest": "digest",
    "tensor_digest": "digest",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the hub is part of this package and must start without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"weightbus.{_HOME[name]}"), name)
