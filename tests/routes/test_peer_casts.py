"""Casts of peer copies: what is proved of the source is what arrives, be it NaN, tied or strided."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from processes import Job, run_jobs
from seeded import seeded
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import weightbus
from weightbus.memory.torch_copy import Copies, cast_on_host
from weightbus.planning.box import Box
from weightbus.planning.exports import Exports, Reach
from weightbus.planning.facts import Holding
from weightbus.planning.plan import Want
from weightbus.planning.spec import Spec
from weightbus.routes.compiled import Survey, _choose

NARROW = [torch.bfloat16, torch.float16]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def with_nans(*shape: int) -> Tensor:
    """Floats, a third of them NaNs of several patterns."""
    generator = torch.Generator().manual_seed(7)
    tensor = torch.randn(shape, generator=generator)
    patterns = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, 0x7FA5A5A5], dtype=torch.int32)
    flat = tensor.view(-1).view(torch.int32)
    flat[::3] = patterns.repeat(flat.numel() // 12 + 1)[: flat[::3].numel()]
    return tensor


VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: with_nans(34, 64).t(),
    "one column": lambda: with_nans(64, 2)[:, :1],
    "columns": lambda: with_nans(33, 100)[:, 3:50],
    "every second": lambda: with_nans(33, 100)[:, ::2],
    "none": lambda: with_nans(8, 4)[:0],
    "one": lambda: with_nans(8, 4)[0, 0],
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("view", VIEWS)
def test_equal_nans_are_cast_to_equal_bits_wherever_they_lie(view: str, dtype: torch.dtype) -> None:
    """torch itself casts a NaN otherwise in strided memory than in contiguous one."""
    src = VIEWS[view]()
    want = bits(src.clone(memory_format=torch.contiguous_format).to(dtype))
    assert torch.equal(bits(cast_on_host(src, dtype)), want)
    around = torch.zeros((*src.shape, 2), dtype=dtype)
    for dst in (around[..., 1], torch.zeros(src.shape, dtype=dtype)):
        copies = Copies()
        copies.add(dst, src)
        copies.run()
        assert torch.equal(bits(dst), want)


@pytest.mark.parametrize("dtype", NARROW)
def test_so_they_are_in_views_of_any_shape(dtype: torch.dtype) -> None:
    draw = seeded(3)
    for _ in range(400):
        src = a_view(draw, torch.float32)
        src.copy_(with_nans(*src.shape))
        want = bits(src.clone(memory_format=torch.contiguous_format).view(-1).to(dtype).view(src.shape))
        dst = a_view(draw, dtype, src.shape)
        copies = Copies()
        copies.add(dst, src)
        copies.run()
        case = src.shape, src.stride(), dst.stride()
        assert torch.equal(bits(dst), want), case
        assert torch.equal(bits(cast_on_host(src, dtype)), want), case


def a_view(draw: random.Random, dtype: torch.dtype, shape: Sequence[int] = ()) -> Tensor:
    """Of memory with dimensions in any order, and with gaps."""
    shape = shape or [draw.choice([1, 2, 3, 5, 17, 40]) for _ in range(draw.randint(1, 3))]
    order = draw.sample(range(len(shape)), len(shape))
    gaps = [draw.choice([0, 0, 1, 3]) for _ in shape]
    memory = torch.zeros([shape[axis] + gaps[axis] for axis in order], dtype=dtype)
    whole = memory.permute([order.index(axis) for axis in range(len(shape))])
    return whole[tuple(slice(gap, None) for gap in gaps)]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("view", [view for view in VIEWS if view != "none"])
@pytest.mark.parametrize(
    ("trains", "serves"),
    [
        ("cpu", "cpu"),
        *(
            pytest.param(*two, marks=pytest.mark.cuda)
            for two in (("cuda",) * 2, ("cpu", "cuda"), ("cuda", "cpu"))
        ),
    ],
)
def test_nans_are_proved_in_one_process(trains: str, serves: str, view: str, dtype: torch.dtype) -> None:
    src = VIEWS[view]()
    if trains == "cuda":
        src = torch.empty_strided(src.shape, src.stride(), device="cuda").copy_(src)
    target = torch.zeros(src.shape, dtype=dtype, device=serves)
    with weightbus.colocate([("w", src)], [("w", target)]) as pair:
        assert pair.update(1).word == "verified"
        assert pair.check().word == "verified"
    assert torch.equal(target.cpu().isnan(), src.cpu().isnan())


def sharded(local: Tensor, dim: int, size: int) -> DTensor:
    mesh = DeviceMesh(local.device.type, list(range(size)))
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)


def columns_of_one(rank: int, size: int, *, device: str, dtype: torch.dtype) -> tuple[str, str, int]:
    """Rows to columns; each rank's shard of the target is one column."""
    whole = with_nans(64, size)
    target = torch.zeros(64, 1, dtype=dtype, device=device)
    source = whole.chunk(size, 0)[rank].to(device)
    with weightbus.colocate(
        [("w", sharded(source, 0, size))], [("w", sharded(target, 1, size))], join_timeout_s=30
    ) as pair:
        report = pair.update(1)
        wrong = target.cpu().isnan() != whole[:, rank : rank + 1].isnan()
        return report.word, report.route, int(wrong.sum())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_nans_are_proved_between_ranks(device: str, dtype: torch.dtype) -> None:
    (found,) = run_jobs(
        Job(run=columns_of_one, size=2, on_one_gpu=True, arguments={"device": device, "dtype": dtype})
    )
    assert found == [("verified", "peer", 0)] * 2


def tied(rank: int, size: int, *, device: str, other: torch.dtype) -> tuple[str, str, bool, bool]:
    """One tensor of the trainer under two names, of which servers want the second in another dtype."""
    whole = torch.randn((64, 34), generator=torch.Generator().manual_seed(1)).to(device)
    source = nn.Module()
    source.a = source.b = nn.Parameter(sharded(whole.chunk(size, 0)[rank].clone(), 0, size))
    a = torch.zeros((64, 17), dtype=torch.bfloat16, device=device)
    b = torch.zeros((64, 17), dtype=other, device=device)
    targets = [("a", sharded(a, 1, size)), ("b", sharded(b, 1, size))]
    with weightbus.colocate(source, targets, join_timeout_s=30) as pair:
        report = pair.update(1)
    mine = whole.chunk(size, 1)[rank]
    return report.word, report.route, torch.equal(a, mine.bfloat16()), torch.equal(b, mine.to(other))


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_tied_tensor_is_wanted_in_two_dtypes(device: str, other: torch.dtype) -> None:
    (found,) = run_jobs(Job(run=tied, size=2, on_one_gpu=True, arguments={"device": device, "other": other}))
    assert found == [("verified", "peer", True, True)] * 2


# -- when a broadcast is better ------------------------------------------------------------------------


def survey_of(devices: Sequence[str], *, no_cast: str = "") -> Survey:
    """One server rank on ``here``, which wants in bfloat16 what trainer ranks on ``devices`` hold in shares."""

    def held(dtype: str, box: Box) -> dict[str, Holding]:
        return {"w": Holding(spec=Spec(name="w", dtype=dtype, shape=(12, 5)), boxes=(box,))}

    rows = 12 // len(devices)
    return Survey(
        rank=9,
        sources={i: held("float32", Box((i * rows, 0), (rows, 5))) for i in range(len(devices))},
        exports={i: Exports(device=device) for i, device in enumerate(devices)},
        wants={9: Want(replica=0, rank=0, facts=held("bfloat16", Box.whole((12, 5))))},
        reaches={9: Reach(device="here", no_cast=no_cast)},
        groups={},
        group=0,
    )


def test_where_uncast_bytes_would_be_more_than_a_broadcast_it_serves_and_both_figures_are_said() -> None:
    choice, copies = _choose(survey_of(["there"]), "auto", alone=False)
    assert (choice.route, copies) == ("broadcast", None)
    assert choice.reason == "uncast, 0.00 GB would come to a rank from other devices, by broadcast 0.00 GB"
    for devices in (["here"], ["here", "there"]):
        choice, copies = _choose(survey_of(devices), "auto", alone=False)
        assert choice.route == "peer"
        assert copies is not None
    assert _choose(survey_of(["there"]), "peer", alone=False)[0].route == "peer"


def test_a_server_rank_that_can_not_cast_is_named() -> None:
    unable = survey_of(["here"], no_cast="server rank 0: no kernel that casts: no CuPy")
    choice, copies = _choose(unable, "auto", alone=False)
    assert (choice.route, copies) == ("broadcast", None)
    assert choice.reason == "server rank 0: no kernel that casts: no CuPy"
    with pytest.raises(weightbus.SpecError, match="as asked for; server rank 0: no kernel that casts"):
        _choose(unable, "peer", alone=False)
