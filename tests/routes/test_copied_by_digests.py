"""What a rank copies out of its own memory is digested by the kernel that copies it; what is wrong is found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from processes import Job, run_jobs
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import weightbus
from weightbus.digest.ledger import Entry, Ledger
from weightbus.memory.shard import Part
from weightbus.planning.box import Box
from weightbus.planning.peer_plan import Piece
from weightbus.planning.spec import Spec
from weightbus.routes import peer_wave
from weightbus.routes.compiled import Planned
from weightbus.routes.peer import _Compiler
from weightbus.routes.peer_wave import OwnCopy, Wave, copied_by_digests

SHAPES = {"matrix": (300, 512), "columns": (64, 1024), "norm": (128,), "odd": (33, 65), "one": ()}
FITS = {"matrix", "columns", "norm"}


# -- which copies digests do ---------------------------------------------------------------------------


def piece(name: str, box: Box) -> tuple[Entry, OwnCopy]:
    src, dst = torch.zeros(box.sizes), torch.zeros(box.sizes)
    part = Part(spec=Spec(name=name, dtype="float32", shape=(64, 16)), box=box, tensor=src)
    return Entry(part=part, stage=0, groups=(0,)), OwnCopy(name, box, box, dst, src)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lies on the host, where no kernel copies."""
    monkeypatch.setattr(peer_wave, "why_not_copied", lambda part, copies: "")


@pytest.mark.usefixtures("any_device")
def test_an_entry_is_copied_with_its_wave_and_no_copy_is_made_twice() -> None:
    upper, lower = Box((0, 0), (32, 16)), Box((32, 0), (32, 16))
    entries, copies = zip(piece("a", upper), piece("a", lower), piece("b", upper), strict=True)
    found = [Wave(own=[copies[0]]), Wave(own=list(copies[1:]))]
    sent = copied_by_digests(found, [*entries, entries[0]])
    assert [entry.stage for entry in sent] == [(0,), (1,), (1,), 0]
    assert [entry.copies for entry in sent] == [*(((copy.box, copy.dst),) for copy in copies), ()]
    assert [wave.own for wave in found] == [[], []]
    assert [len(wave.proved.runs) for wave in found] == [1, 2]


@pytest.mark.usefixtures("any_device")
def test_what_hooks_take_comes_in_two_waves_or_is_not_digested_here_is_copied_as_before() -> None:
    upper, lower = Box((0, 0), (32, 16)), Box((32, 0), (32, 16))
    whole = Box((0, 0), (64, 16))
    entry, copy = piece("hooked", upper)
    other, _ = piece("split", whole)
    halves = [
        OwnCopy("split", whole, half, torch.zeros(32, 16), torch.zeros(32, 16)) for half in (upper, lower)
    ]
    _, alone = piece("alone", upper)
    found = [Wave(own=[halves[0]]), Wave(own=[halves[1], alone]), Wave(own=[copy], wire="hooked")]
    assert copied_by_digests(found, [entry, other]) == [entry, other]
    assert [len(wave.own) for wave in found] == [1, 2, 1]
    assert not any(wave.proved.runs for wave in found)


def test_on_the_host_torch_copies_all() -> None:
    entry, copy = piece("a", Box((0, 0), (64, 16)))
    wave = Wave()
    wave.add_own(copy)
    assert copied_by_digests([wave], [entry]) == [entry]
    assert (len(wave.own), bool(wave.host)) == (0, True)


@pytest.mark.parametrize(("near", "waves_of"), [(True, [16, 16, 8]), (False, [1] * 40)])
def test_waves_within_a_gpu_are_longer(
    near: bool, waves_of: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wave, "add_own", lambda self, copy: near)
    whole = torch.zeros(64, 16)
    spec, box = Spec(name="w", dtype="float32", shape=(64, 16)), Box((0, 0), (64, 16))
    own = {"w": [Part(spec=spec, box=box, tensor=whole)]}
    compiler = _Compiler(0, {}, {}, own, wave_bytes=whole.nbytes)
    for _ in range(40):
        compiler.add(Piece(0, 0, box), spec, whole, box)
    assert [wave.nbytes // whole.nbytes for wave in compiler.waves] == waves_of


# -- on a GPU ------------------------------------------------------------------------------------------


def drawn(version: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in SHAPES.items()}


def targets() -> dict[str, Tensor]:
    found = {name: torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for name, shape in SHAPES.items()}
    found["columns"] = torch.zeros(64, 1536, dtype=torch.bfloat16, device="cuda")[:, 512:]
    return found


def planned_of(pair: weightbus.Colocated) -> Planned:
    planned: Planned | None = pair._publisher._session.context.plans.recent
    assert planned is not None
    return planned


def copied(ledger: Ledger) -> set[str]:
    return {entry.part.spec.name for entry in ledger._entries if entry.copies}


@contextmanager
def updated_twice(dtype: torch.dtype) -> Iterator[tuple[Any, dict[str, Tensor], dict[str, Tensor]]]:
    """A pair, source and target; the source has been filled again after the second update."""
    source, target = drawn(1, dtype), targets()
    with weightbus.colocate(list(source.items()), list(target.items())) as pair:
        for version in (1, 2):
            fill(source, version)
            assert pair.update(version).word == "verified"
            check(target, version, dtype)
        fill(source, 3)
        yield pair, source, target


def fill(source: dict[str, Tensor], version: int) -> None:
    for name, value in drawn(version, source["norm"].dtype).items():
        source[name].copy_(value)


def check(target: dict[str, Tensor], version: int, dtype: torch.dtype) -> None:
    for name, value in drawn(version, dtype).items():
        assert torch.equal(target[name].view(torch.int16), value.bfloat16().view(torch.int16)), name


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@pytest.mark.cuda
@DTYPES
def test_verified_or_not_the_target_is_the_source(dtype: torch.dtype) -> None:
    with updated_twice(dtype) as (pair, source, target):
        assert copied(planned_of(pair).sent) == FITS
        assert pair.update(3, verify=False).word == "unverified"
        check(target, 3, dtype)
        fill(source, 4)
        assert pair.update(4).word == "verified"
        check(target, 4, dtype)
        fill(source, 5)
        assert pair.check().word == "verified"
        check(target, 4, dtype)  # a check writes nothing


def shift_a_store(planned: Planned, _: Tensor) -> None:
    (sums,) = (
        sums
        for stage, (_, digester) in planned.sent._digesters.items()
        if isinstance(stage, tuple)
        for _, sums in digester._sums
    )
    sums._stores[0, 0] -= 16  # where the first segment goes


def shift_a_copy(planned: Planned, _: Tensor) -> None:
    near = planned.compiled.waves[0].near
    table, column = (near.by_kernel._table, 1) if near.by_kernel else (near.by_cast._table, 0)
    table[0, column] += 16


def read_old_memory(planned: Planned, old: Tensor) -> None:
    near = planned.compiled.waves[0].near
    table, column = (near.by_kernel._table, 1) if near.by_kernel else (near.by_cast._table, 0)
    table[0, column] = old.data_ptr()


@pytest.mark.cuda
@DTYPES
@pytest.mark.parametrize("damage", [shift_a_store, shift_a_copy, read_old_memory])
def test_a_shifted_copy_and_one_of_old_memory_are_not_committed(damage: Any, dtype: torch.dtype) -> None:
    """Of those that a digest does, and of those that are copied apart."""
    with updated_twice(dtype) as (pair, _, _):
        old = drawn(2, dtype)["odd"]
        damage(planned_of(pair), old)
        with pytest.raises(weightbus.TornError, match="columns" if damage is shift_a_store else "odd"):
            pair.update(3)
        assert (pair.state, pair.version) == ("torn", 2)


def rows_to_columns(rank: int, size: int, *, dtype: torch.dtype, damaged: bool) -> tuple[str, set[str], bool]:
    """Two ranks on one GPU: each copies a block of its own, and one of the other's by a mapping."""
    whole = torch.randn((64, 256), generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    source, target = (
        whole.chunk(size, 0)[rank].clone(),
        torch.zeros(64, 128, dtype=torch.bfloat16, device="cuda"),
    )
    mesh = DeviceMesh("cuda", list(range(size)))
    ends = [
        [("w", DTensor.from_local(local, mesh, [Shard(dim)], run_check=False))]
        for local, dim in ((source, 0), (target, 1))
    ]
    with weightbus.colocate(*ends, route="peer", join_timeout_s=30) as pair:
        assert pair.update(1).word == "verified"
        found = copied(planned_of(pair).sent)
        old = whole.chunk(size, 0)[0].clone()
        source += 1
        if damaged and rank == 1:
            near = planned_of(pair).compiled.waves[0].near
            table, column = (near.by_kernel._table, 1) if near.by_kernel else (near.by_cast._table, 0)
            table[0, column] = old[:, 128:].data_ptr()
        try:
            word = pair.update(2).word
        except weightbus.TornError as error:
            word = str(error)
    right = torch.equal(target, (whole + 1).bfloat16().chunk(size, 1)[rank])
    return word, found, right


@pytest.mark.cuda
@DTYPES
@pytest.mark.parametrize("damaged", [False, True])
def test_a_stale_mapping_is_found_between_two_ranks(dtype: torch.dtype, damaged: bool) -> None:
    arguments = {"dtype": dtype, "damaged": damaged}
    (found,) = run_jobs(Job(run=rows_to_columns, size=2, on_one_gpu=True, arguments=arguments))
    for word, names, right in found:
        assert names == {"w"}
        if damaged:
            assert "w" in word
            assert "server rank 1" in word
        else:
            assert (word, right) == ("verified", True)
