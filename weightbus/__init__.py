"""Move a trainer's new weights into running inference servers, and prove that every byte arrived."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightbus import http as http
    from weightbus.colocated import Colocated as Colocated
    from weightbus.colocated import Pending as Pending
    from weightbus.colocated import colocate as colocate
    from weightbus.control.client import Client as Client
    from weightbus.control.keys import Keys as Keys
    from weightbus.digest import Digest as Digest
    from weightbus.digest import Digester as Digester
    from weightbus.digest import combine as combine
    from weightbus.digest import model_digest as model_digest
    from weightbus.digest import sub_part as sub_part
    from weightbus.digest import tensor_digest as tensor_digest
    from weightbus.digest.changes import Changes as Changes
    from weightbus.digest.changes import Snapshot as Snapshot
    from weightbus.digest.changes import compare as compare
    from weightbus.digest.changes import snapshot as snapshot
    from weightbus.digest.sha256.check import Sha256Verdict as Sha256Verdict
    from weightbus.digest.sha256.check import check_sha256 as check_sha256
    from weightbus.digest.sha256.ranks import whole_sha256 as whole_sha256
    from weightbus.digest.sha256.tensors import module_sha256 as module_sha256
    from weightbus.digest.sha256.tensors import named_sha256 as named_sha256
    from weightbus.digest.sha256.tensors import tensor_sha256 as tensor_sha256
    from weightbus.engines.audit import AuditReport as AuditReport
    from weightbus.engines.audit import audit as audit
    from weightbus.errors import CoverageError as CoverageError
    from weightbus.errors import DigestError as DigestError
    from weightbus.errors import HubError as HubError
    from weightbus.errors import SpecError as SpecError
    from weightbus.errors import TornError as TornError
    from weightbus.errors import UpdateError as UpdateError
    from weightbus.errors import WeightbusError as WeightbusError
    from weightbus.publisher import Publisher as Publisher
    from weightbus.report import Mismatch as Mismatch
    from weightbus.report import Report as Report
    from weightbus.report import Verdict as Verdict
    from weightbus.storage.shared_payload import SharedTensors as SharedTensors
    from weightbus.storage.shared_payload import share_tensors as share_tensors
    from weightbus.subscriber import Subscriber as Subscriber
    from weightbus.tensors.perturbation import perturb as perturb

__version__ = "0.1.0"

# Public names by module, imported on first use, as the hub must start without torch.
_PUBLIC = {
    "digest.changes": ["Changes", "Snapshot", "compare", "snapshot"],
    "control.client": ["Client"],
    "colocated": ["Colocated", "Pending", "colocate"],
    "digest": ["Digest", "Digester", "combine", "model_digest", "sub_part", "tensor_digest"],
    "engines.audit": ["AuditReport", "audit"],
    "errors": [
        "CoverageError",
        "DigestError",
        "HubError",
        "SpecError",
        "TornError",
        "UpdateError",
        "WeightbusError",
    ],
    "control.keys": ["Keys"],
    "tensors.perturbation": ["perturb"],
    "publisher": ["Publisher"],
    "report": ["Mismatch", "Report", "Verdict"],
    "digest.sha256.tensors": ["module_sha256", "named_sha256", "tensor_sha256"],
    "digest.sha256.check": ["Sha256Verdict", "check_sha256"],
    "digest.sha256.ranks": ["whole_sha256"],
    "storage.shared_payload": ["SharedTensors", "share_tensors"],
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
