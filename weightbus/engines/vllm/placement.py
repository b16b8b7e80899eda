"""Which rank of which replica a vLLM worker is, from its parallel configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A worker's rank among the ``size`` ranks that together hold replica ``replica`` of the model."""

    rank: int
    size: int
    replica: int


def place_of(parallel: Any, first_replica: int = 0) -> Place:
    """The place of the worker that has this ``ParallelConfig``.

    first_replica: the number of the engine's first replica. Workers of all pipeline, tensor and context ranks
    hold one copy. With data parallelism the engine of a dense model tells its workers a size of 1, and each
    holds a copy of its own; where it tells them more, experts are spread over all, which are one replica.
    """
    if parallel.data_parallel_size > 1:
        return Place(
            rank=parallel.data_parallel_rank * parallel.world_size + parallel.rank,
            size=parallel.world_size_across_dp,
            replica=first_replica,
        )
    return Place(
        rank=parallel.rank,
        size=parallel.world_size,
        replica=first_replica + parallel.data_parallel_index,
    )
