"""Move a trainer's new weights into running inference servers, and prove that every byte arrived."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightbus.digest import Digest, combine, model_digest, tensor_digest
    from weightbus.errors import HubError, SpecError, TornError, UpdateError, WeightbusError
    from weightbus.publisher import Publisher
    from weightbus.subscriber import Subscriber

__version__ = "0.1.0"

# Public name: the module it lives in. Imported on first use, as the hub must start without torch.
_HOME = {
    "Digest": "digest",
    "HubError": "errors",
    "Publisher": "publisher",
    "SpecError": "errors",
    "Subscriber": "subscriber",
    "TornError": "errors",
    "UpdateError": "errors",
    "WeightbusError": "errors",
    "combine": "digest",
    "model_digest": "digest",
    "tensor_digest": "digest",
}

__all__ = list(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"weightbus.{_HOME[name]}"), name)
