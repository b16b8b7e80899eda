"""vLLM: the weight-transfer backend ``weightbus``, registered by an entry point, and ``Servers`` for trainers
(docs/engines.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightbus.engines.vllm.servers import Servers as Servers
    from weightbus.engines.vllm.servers import ServersReport as ServersReport
    from weightbus.engines.vllm.servers import ServersVerdict as ServersVerdict

__all__ = ["Servers", "ServersReport", "ServersVerdict"]


def __getattr__(name: str) -> Any:
    """Imported on first use: vLLM's processes, which load the plugin, need nothing of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from weightbus.engines.vllm import servers

    return getattr(servers, name)
