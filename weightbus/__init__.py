"""Move a trainer's new weights into running inference servers, and prove that every byte arrived."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightbus.client import Client as Client
    from weightbus.digest import Digest as Digest
    from weightbus.digest import Digester as Digester
    from weightbus.digest import combine as combine
    from weightbus.digest import model_digest as model_digest
    from weightbus.digest import sub_part as sub_part
    from weightbus.digest import tensor_digest as tensor_digest
    from weightbus.errors import HubError as HubError
    from weightbus.errors import SpecError as SpecError
    from weightbus.errors import TornError as TornError
    from weightbus.errors import UpdateError as UpdateError
    from weightbus.errors import WeightbusError as WeightbusError
    from weightbus.keys import Keys as Keys
    from weightbus.publisher import Publisher as Publisher
    from weightbus.subscriber import Subscriber as Subscriber

__version__ = "0.1.0"

# Public names by module, imported on first use, as the hub must start without torch.
_PUBLIC = {
    "client": ["Client"],
    "digest": ["Digest", "Digester", "combine", "model_digest", "sub_part", "tensor_digest"],
    "errors": ["HubError", "SpecError", "TornError", "UpdateError", "WeightbusError"],
    "keys": ["Keys"],
    "publisher": ["Publisher"],
    "subscriber": ["Subscriber"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"weightbus.{_HOME[name]}"), name)
