"""Digests of whole tensors that lie in shards, and manifests checked over real ranks."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Toy, fill, join_world, make, values
from processes import Job, run_jobs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import weightbus
from weightbus import CoverageError, DigestError, check_sha256, named_sha256, whole_sha256
from weightbus.digest.sha256 import gather as joined

HEX0 = "0" * 64


def golden(tensor: Tensor) -> str:
    """By the recipe, of a whole plain tensor."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(str(tensor.dtype).encode() + repr(tuple(tensor.shape)).encode() + raw).hexdigest()


def goldens(version: int) -> dict[str, str]:
    """Of what a Toy holds, under the names that it has for its parameters and persistent buffers."""
    return {name: golden(tensor) for name, tensor in values(version).items()}


def filled(kind: str, rank: int, size: int) -> nn.Module:
    joined.CHUNK_BYTES = 1 << 14  # many chunks even of small tensors
    model = make(kind, rank, size)
    fill(model, values(1))
    return model


def whole(rank, size, *, kind):
    model = filled(kind, rank, size)
    return whole_sha256(model, dist.group.WORLD), check_sha256(model, goldens(1), group=dist.group.WORLD)


@pytest.mark.parametrize(("kind", "size"), [("fsdp2", 3), ("tp", 2), ("fsdp2-tp", 4)])
def test_whole_tensors_of_shards(kind: str, size: int) -> None:
    """Rows, columns, uneven, empty and strided shards; replicated buffers; one rank's answer is all ranks'."""
    (ranks,) = run_jobs(Job(run=whole, size=size, arguments={"kind": kind}))
    for digests, verdict in ranks:
        assert digests == goldens(1)
        assert (verdict.ok, verdict.checked, verdict.ranks) == (True, len(digests), tuple(range(size)))
        assert str(verdict) == f"verified SHA-256 of {len(digests)} tensors on {size} ranks"


DTYPES = ["bool", "int16", "float8_e5m2", "bfloat16", "float64", "complex64", "complex128"]


def byte_values(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    count = torch.empty(shape, dtype=dtype).nbytes
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def odd_dtypes(rank, size):
    joined.CHUNK_BYTES = 64
    mesh = join_world(rank, size, "cpu")
    pairs = []
    for name in DTYPES:
        for dim in (0, 1):
            full = byte_values(getattr(torch, name), (5, 6))
            chunks = full.chunk(size, dim)
            local = (chunks[rank] if rank < len(chunks) else full[:0]).t().contiguous().t()
            whole = {"shape": full.shape, "stride": full.stride()}
            pairs.append(
                (f"{name} {dim}", DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, **whole))
            )
    return whole_sha256(pairs, dist.group.WORLD)


def test_every_kind_of_dtype() -> None:
    (ranks,) = run_jobs(Job(run=odd_dtypes, size=3))
    whole = {name: golden(byte_values(getattr(torch, name), (5, 6))) for name in DTYPES}
    want = {f"{name} {dim}": whole[name] for name in DTYPES for dim in (0, 1)}
    assert ranks == [want] * 3


# A tensor, the rank on which an element is wrong, and the ranks that the digest of the whole leaves in doubt.
DAMAGE = [
    ("big", 1, (0, 1)),
    ("down.weight", 0, (0, 1)),
    ("steps", 1, (1,)),  # a plain buffer, the same on all ranks
    ("norm.bias", 1, (1,)),  # a replicated DTensor
]


def damaged(rank, size):
    """What each form of the manifest says of each damage."""
    model = filled("tp", rank, size)
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, named_sha256(model))
    said = []
    for name, where, _ in DAMAGE:
        local = live[name]._local_tensor if isinstance(live[name], DTensor) else live[name]
        last = local.detach().view(torch.uint8)[-1]
        if rank == where:
            last ^= 1
        one = check_sha256(model, goldens(1), group=dist.group.WORLD)
        each = check_sha256(model, gathered, group=dist.group.WORLD)
        said.append((one, each, check_sha256(model, gathered, rank=rank, size=size)))
        if rank == where:
            last ^= 1
    return said


def test_damage() -> None:
    """It is named, with its rank, and nothing else is."""
    (ranks,) = run_jobs(Job(run=damaged, size=2))
    for (name, where, in_doubt), *said in zip(DAMAGE, *ranks, strict=True):
        for rank, (one, each, alone) in enumerate(said):
            assert (one.ok, one.missing, one.unexpected) == (False, {}, {})
            assert one.mismatching == {name: in_doubt}
            assert each.mismatching == {name: (where,)}
            assert alone.mismatching == ({name: (where,)} if rank == where else {})
            assert alone.ranks == (rank,)
        assert weightbus.Sha256Verdict.merged(alone for _, _, alone in said) == said[0][1]


def odd_replica(rank, size):
    """Four ranks, two copies of two shards; one rank's is damaged, then two ranks'."""
    joined.CHUNK_BYTES = 64
    join_world(rank, size, "cpu")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2))
    full = torch.arange(60.0).view(6, 10)
    said = []
    for damaged in [(3,), (0,), (1,), (1, 2)]:
        local = full.chunk(2, 0)[rank % 2].clone()
        if rank in damaged:
            local[0, 0] = -1
        pairs = [("w", DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False))]
        said.append(check_sha256(pairs, {"w": golden(full)}, group=dist.group.WORLD).mismatching)
        with pytest.raises(DigestError, match="w: expected equal replicas, got others on rank"):
            whole_sha256(pairs, dist.group.WORLD)
    return said


def test_a_replica_is_not_vouched_for_by_another() -> None:
    """Of one damaged replica the rank is known; where neither copy is whole, all are in doubt."""
    (ranks,) = run_jobs(Job(run=odd_replica, size=4))
    assert ranks == [[{"w": (3,)}, {"w": (0,)}, {"w": (1,)}, {"w": (0, 1, 2, 3)}]] * 4


def engine_shards(rank, size):
    """Plain parameters that carry the dim along which an engine has split them."""
    joined.CHUNK_BYTES = 64
    join_world(rank, size, "cpu")
    full = {name: torch.arange(24.0).view(4, 6) + i for i, name in enumerate(["column", "row", "unmarked"])}
    column = nn.Parameter(full["column"].chunk(size, 0)[rank].clone())
    column.output_dim, column.input_dim = 0, 1  # type: ignore[attr-defined]
    row = nn.Parameter(full["row"].chunk(size, 1)[rank].clone())
    row.output_dim, row.input_dim = 0, 1  # type: ignore[attr-defined]
    unmarked = nn.Parameter(full["unmarked"].split([3, 1], 0)[rank].clone())
    pairs = [("column", column), ("row", row), ("unmarked", unmarked)]
    with pytest.raises(DigestError, match="unmarked: expected equal replicas, got others on rank 1"):
        whole_sha256(pairs[2:], dist.group.WORLD)  # it can't know how they go together
    expected = {name: golden(tensor) for name, tensor in full.items()}
    first = check_sha256(pairs, expected, group=dist.group.WORLD)
    if rank == 1:
        with torch.no_grad():
            row[2, 1] += 1
    return first, check_sha256(pairs, expected, group=dist.group.WORLD, partial=True)


def test_shards_without_dtensor() -> None:
    (ranks,) = run_jobs(Job(run=engine_shards, size=2))
    for first, second in ranks:
        assert first.mismatching == {"unmarked": (0, 1)}
        assert second.mismatching == {"row": (0, 1), "unmarked": (0, 1)}


def refused(rank, size):
    """What one rank can't answer, all hear of; nobody waits. And the group serves on."""
    model = filled("tp", rank, size)
    texts = []

    def note(*pairs: Any, **options: Any) -> None:
        with pytest.raises(weightbus.SpecError) as caught:
            check_sha256(*pairs, group=dist.group.WORLD, **options)
        texts.append(str(caught.value))

    note([("w", torch.empty(2, device="meta" if rank else "cpu"))], {"w": HEX0})
    note(model, {"big": HEX0 if rank else HEX0[:-1] + "1"})
    note(model, [{"big": HEX0}] * 2)
    half = dist.new_group([0, 1])
    outside = None
    if rank < 2:
        with pytest.raises(CoverageError) as caught:
            check_sha256(model, {"big": HEX0}, group=half)
        outside = str(caught.value)
    else:
        with pytest.raises(weightbus.SpecError, match="a rank of"):
            check_sha256(model, {"big": HEX0}, group=half)
    return texts, outside, check_sha256(model, goldens(1), group=dist.group.WORLD).ok


def test_refusals_reach_all_ranks() -> None:
    (ranks,) = run_jobs(Job(run=refused, size=3))
    for rank, (texts, outside, ok) in enumerate(ranks):
        meta, other, count = texts
        assert meta.startswith("w: expected a tensor with storage, got one on the meta device")
        assert ("rank 1" in meta) == (rank == 0)
        assert other == "sha256: expected the same names and digests on all ranks, got others; on rank 1"
        assert count == "expected: expected a map of names to digests, or a list of 1 or 3; got 2 of them"
        assert outside is None or outside.startswith("big: expected boxes of 420000 elements in all")
        assert ok


def test_a_group_for_gpus_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(weightbus.SpecError, match=r"as new_group\(backend='gloo'\) makes, got cuda:nccl"):
        check_sha256(toy(), goldens(1), group=object())  # type: ignore[arg-type]


def late(rank, size):
    model = filled("tp", rank, size)
    if rank == 1:
        time.sleep(3)
        return None
    begun = time.monotonic()
    with pytest.raises(weightbus.UpdateError, match="within 1 s"):
        check_sha256(model, goldens(1), group=dist.group.WORLD, timeout_s=1)
    return time.monotonic() - begun


def test_a_late_rank_ends_the_wait() -> None:
    (ranks,) = run_jobs(Job(run=late, size=2))
    assert 0.9 < ranks[0] < 2.9


def toy() -> Toy:
    model = Toy()
    fill(model, values(1))
    return model


def test_missing_unexpected_mismatching_on_one_rank() -> None:
    expected = goldens(1)
    del expected["up.bias"]
    expected["up.gate"] = expected["mask"] = HEX0
    verdict = check_sha256(toy(), expected)
    assert verdict.missing == {"up.gate": (0,)}
    assert verdict.unexpected == {"up.bias": (0,)}
    assert verdict.mismatching == {"mask": (0,)}
    assert str(verdict) == (
        f"SHA-256 check of {len(expected)} tensors on 1 rank failed: 1 missing: up.gate (rank 0); "
        "1 unexpected: up.bias (rank 0); 1 mismatching: mask (rank 0)"
    )
    assert check_sha256(toy(), expected, partial=True).unexpected == {}


def test_a_long_list_is_cut() -> None:
    verdict = check_sha256(toy(), dict.fromkeys(goldens(1), HEX0))
    assert len(verdict.mismatching) == len(goldens(1))
    assert str(verdict).endswith(f" and {len(goldens(1)) - 5} more")


def test_names_that_may_be_expected() -> None:
    """Any name of a tied tensor, and buffers that are not persistent; without them nothing is unexpected."""
    expected = goldens(1)
    assert check_sha256(toy(), expected).ok
    assert check_sha256(toy(), [expected]).ok
    by_other_name = {name: text for name, text in expected.items() if name != "embed.weight"}
    by_other_name["head.weight"] = expected["embed.weight"]
    by_other_name["scratch"] = golden(torch.zeros(2))
    assert check_sha256(toy(), by_other_name).ok
    assert check_sha256({"vae": toy()}, {f"vae.{name}": text for name, text in expected.items()}).ok
    assert check_sha256(toy(), named_sha256(toy())).ok


@pytest.mark.parametrize(
    ("expected", "options", "text"),
    [
        ({}, {}, "got an empty one; manifest 0 of 1"),
        ([], {}, "a list of 1 or 1; got 0 of them"),
        ("abc", {}, "got a str"),
        ([{"big": HEX0}] * 2, {"size": 3}, "a list of 1 or 3; got 2 of them"),
        ([{"big": HEX0}, 7], {"size": 2}, "got a int; manifest 1 of 2"),
        ({"big": "12"}, {}, "big: expected 64 lower-case hexadecimal digits, got '12'"),
        ({"big": HEX0[:-1] + "A"}, {}, "big: expected 64 lower-case"),
        ({"big": HEX0 + "\n"}, {}, "big: expected 64 lower-case"),
        ({"big": 3}, {}, "big: expected 64 lower-case hexadecimal digits, got 3"),
        ({3: HEX0}, {}, "expected names of tensors, got 3"),
        ({"big": HEX0}, {"rank": 2, "size": 2}, "expected 0 <= rank < size, got rank 2 of size 2"),
    ],
)
def test_what_is_no_manifest_is_refused(expected: Any, options: dict[str, int], text: str) -> None:
    with pytest.raises(weightbus.SpecError, match=text.replace("(", r"\(")):
        check_sha256(toy(), expected, **options)
