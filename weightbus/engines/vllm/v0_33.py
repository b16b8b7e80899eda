"""vLLM 0.33: as 0.32 in all that is used of it; no build of it for the CPU has been run (docs/engines.md)."""

from __future__ import annotations

from weightbus.engines.vllm.v0_32 import keep_layouts, register

__all__ = ["keep_layouts", "register"]
