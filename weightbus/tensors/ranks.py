"""Which rank of how many this process is: as given, or as whoever started the job says."""

from __future__ import annotations

import os

import torch.distributed as dist

from weightbus.errors import SpecError
from weightbus.tensors.layout import Layout, Source, layout_of
from weightbus.tensors.torch_dtensor import mesh_position

# Variables by which torchrun, Slurm, Open MPI and MPICH tell each process its rank, and how many there are.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def rank_and_size(source: Source | Layout, rank: int | None = None, size: int | None = None) -> tuple[int, int]:
    """This process's rank in its job, and the job's size.

    As given; or the DTensor mesh's (the largest mesh, see ``mesh_position``); or the default process group's;
    or its launcher's, by the first pair of ``LAUNCHERS`` that is set; or (0, 1). A model whose meshes span
    only a piece of the job (one pipeline stage, one data-parallel replica) has to be given both. An iterator of
    pairs is used up: pass its layout.
    Raises SpecError where one is given without the other, where the rank is not in [0, size), and where a
    launcher says something else than the default group.
    """
    if rank is not None or size is not None:
        return _checked(rank, size, "as given")
    layout = source if isinstance(source, Layout) else layout_of(source)
    if (position := mesh_position(layout.watch.tensors)) is not None:
        return position
    launched = _launched()
    if dist.is_available() and dist.is_initialized():
        grouped = dist.get_rank(), dist.get_world_size()
        if launched is not None and launched[:2] != grouped and launched[1] > 1:
            raise SpecError(
                f"rank, size: expected one answer, got rank {grouped[0]} of {grouped[1]} from the default "
                f"process group and rank {launched[0]} of {launched[1]} {launched[2]}; give rank= and size="
            )
        return grouped
    return launched[:2] if launched is not None else (0, 1)


def _launched() -> tuple[int, int, str] | None:
    for names in LAUNCHERS:
        rank, size = map(_environ_int, names)
        if rank is not None or size is not None:
            where = f"from the environment variables {' and '.join(names)}"
            return *_checked(rank, size, where), where
    return None


def _checked(rank: int | None, size: int | None, where: str) -> tuple[int, int]:
    if rank is None or size is None:
        got = f"only rank {rank}" if size is None else f"only size {size}"
        raise SpecError(f"rank, size: expected both or neither, got {got}; {where}")
    if any(isinstance(one, bool) or not isinstance(one, int) for one in (rank, size)):
        raise SpecError(f"rank, size: expected two integers, got {rank!r} and {size!r}; {where}")
    if not 0 <= rank < size:
        raise SpecError(f"rank: expected 0 <= rank < size, got rank {rank} of size {size}; {where}")
    return rank, size


def _environ_int(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise SpecError(f"{variable}: expected an integer, got {text!r}; in the environment") from None
