"""Move a trainer's new weights into running inference servers, and prove that every byte arrived."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightbus import http as http
    from weightbus.changes import Changes as Changes
    from weightbus.changes import Snapshot as Snapshot
    from weightbus.changes import compare as compare
    from weightbus.changes import snapshot as snapshot
    from weightbus.client import Client as Client
    from weightbus.colocated import Colocated as Colocated
    from weightbus.colocated import colocate as colocate
    from weightbus.digest import Digest as Digest
    from weightbus.digest import Digester as Digester
    from weightbus.digest import combine as combine
    from weightbus.digest import model_digest as model_digest
    from weightbus.digest import sub_part as sub_part
    from weightbus.digest import tensor_digest as tensor_digest
    from weightbus.errors import CoverageError as CoverageError
    from weightbus.errors import DigestError as DigestError
    from weightbus.errors import HubError as HubError
    from weightbus.errors import SpecError as SpecError
    from weightbus.errors import TornError as TornError
    from weightbus.errors import UpdateError as UpdateError
    from weightbus.errors import WeightbusError as WeightbusError
    from weightbus.keys import Keys as Keys
    from weightbus.perturbation import perturb as perturb
    from weightbus.publisher import Publisher as Publisher
    from weightbus.report import Mismatch as Mismatch
    from weightbus.report import Report as Report
    from weightbus.report import Verdict as Verdict
    from weightbus.sha256 import module_sha256 as module_sha256
    from weightbus.sha256 import named_sha256 as named_sha256
    from weightbus.sha256 import tensor_sha256 as tensor_sha256
    from weightbus.sha256_check import Sha256Verdict as Sha256Verdict
    from weightbus.sha256_check import check_sha256 as check_sha256
    from weightbus.sha256_ranks import whole_sha256 as whole_sha256
    from weightbus.shared_payload import SharedTensors as SharedTensors
    from weightbus.shared_payload import share_tensors as share_tensors
    from weightbus.subscriber import Subscriber as Subscriber

__version__ = "0.1.0"

# Public names by module, imported on first use, as the hub must start without torch.
_PUBLIC = {
    "changes": ["Changes", "Snapshot", "compare", "snapshot"],
    "client": ["Client"],
    "colocated": ["Colocated", "colocate"],
    "digest": ["Digest", "Digester", "combine", "model_digest", "sub_part", "tensor_digest"],
    "errors": [
        "CoverageError",
        "DigestError",
        "HubError",
        "SpecError",
        "TornError",
        "UpdateError",
        "WeightbusError",
    ],
    "keys": ["Keys"],
    "perturbation": ["perturb"],
    "publisher": ["Publisher"],
    "report": ["Mismatch", "Report", "Verdict"],
    "sha256": ["module_sha256", "named_sha256", "tensor_sha256"],
    "sha256_check": ["Sha256Verdict", "check_sha256"],
    "sha256_ranks": ["whole_sha256"],
    "shared_payload": ["SharedTensors", "share_tensors"],
    "subscriber": ["Subscriber"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)

_MODULES = ("http",)
"""Modules that users name in full; imported on first use too, as they need extras."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"weightbus.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"weightbus.{_HOME[name]}"), name)
