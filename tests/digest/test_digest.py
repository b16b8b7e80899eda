"""The digest's public functions: what they take, what they refuse, and which implementation serves."""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from grid61_boxes import part_of, random_part, random_tensor, to_bytes
from grid61_definition import sums as defined_sums
from seeded import seeded
from torch import Tensor, nn

from weightbus import Digest, SpecError, combine, model_digest, tensor_digest
from weightbus.digest import (
    STABLE_SEED,
    Digester,
    NameKeys,
    P,
    digester,
    fold,
    fold_with,
    model_digest_of,
    sub_part,
)
from weightbus.errors import CoverageError, DigestError
from weightbus.memory.warn_once import say_once
from weightbus.planning.box import Box

SEED = bytes(range(32))


def of_box(tensor: Tensor, box: Box) -> Digest:
    part = part_of(tensor[box.within(Box.whole(tensor.shape))], tensor.shape, box)
    ((lane0, lane1),) = Digester([part]).sums(SEED).tolist()
    return Digest(sums=(lane0, lane1), dtype=part.spec.dtype, shape=part.spec.shape, boxes=(box,), seed=SEED)


@pytest.fixture
def rows() -> list[Digest]:
    """Digests of rows 0-2, 3-6 and 7-8 of one tensor."""
    tensor = random_tensor(seeded(1), 2, (9, 40))
    return [of_box(tensor, Box((start, 0), (size, 40))) for start, size in ((0, 3), (3, 4), (7, 2))]


def test_text_is_lane_0_then_lane_1_in_16_digits_each() -> None:
    digest = Digest(sums=(1, P - 1), dtype="uint8", shape=(1,), boxes=(), seed=SEED)
    assert str(digest) == "grid61:00000000000000011ffffffffffffffe"


def test_combine_refuses_what_does_not_belong_together(rows: list[Digest]) -> None:
    first, second, third = rows
    with pytest.raises(SpecError, match="expected at least one digest, got none"):
        combine([])
    with pytest.raises(SpecError, match="expected dtype bfloat16, got float16; boxes"):
        combine([first, replace(second, dtype="float16"), third])
    with pytest.raises(SpecError, match=r"expected shape \(9, 40\), got \(40, 9\)"):
        combine([first, replace(second, shape=(40, 9)), third])
    with pytest.raises(SpecError, match=f"expected seed {SEED.hex()}, got {STABLE_SEED.hex()}"):
        combine([first, second, replace(third, seed=STABLE_SEED)])


def test_combine_refuses_boxes_that_are_no_exact_cover(rows: list[Digest]) -> None:
    first, second, third = rows
    with pytest.raises(CoverageError, match="they leave out 80"):
        combine([first, second])
    with pytest.raises(CoverageError, match="they repeat 120"):
        combine([first, second, third, replace(first, boxes=(Box((6, 0), (3, 40)),))])
    with pytest.raises(CoverageError, match="both hold"):
        combine([first, second, replace(third, boxes=(Box((6, 0), (2, 40)),))])
    with pytest.raises(CoverageError, match="outside shape"):
        combine([first, second, replace(third, boxes=(Box((8, 0), (2, 40)),))])


def test_combine_counts_a_replica_once_and_compares_it(rows: list[Digest]) -> None:
    assert combine([*rows, rows[1]]) == combine(rows)
    wrong = replace(rows[1], sums=(rows[1].sums[0] ^ 1, rows[1].sums[1]))
    with pytest.raises(DigestError, match="expected equal replicas, got grid61:"):
        combine([*rows, wrong])


def test_combine_of_one_whole_and_of_none_that_hold_elements() -> None:
    whole = tensor_digest(torch.arange(7), seed=SEED)
    assert combine([whole]) == whole
    empty = tensor_digest(torch.zeros(3, 0), seed=SEED)
    assert combine([empty, empty]) == empty
    assert combine([whole, replace(whole, sums=(0, 0), boxes=())]) == whole


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(33), bytearray(32), "0" * 32], ids=repr)
def test_a_seed_is_32_bytes(seed: bytes) -> None:
    tensor, digest = torch.zeros(3), tensor_digest(torch.zeros(3))
    for call in (
        lambda: tensor_digest(tensor, seed=seed),
        lambda: model_digest([("a", tensor)], seed=seed),
        lambda: model_digest_of({"a": digest}, seed=seed),
        lambda: Digester([part_of(tensor)]).sums(seed),
        lambda: fold([], np.zeros((0, 2), np.uint64), seed),
    ):
        with pytest.raises(ValueError, match="seed: expected 32 bytes, got"):
            call()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Linear(5, 3)
        self.alpha = nn.Linear(5, 3, bias=False)
        self.alpha.weight = self.zeta.weight
        self.register_buffer("scale", torch.tensor(2.5, dtype=torch.float16))
        self.register_buffer("cache", torch.zeros(4), persistent=False)
        self.register_buffer("ä", torch.arange(4))
        self.register_buffer("zz", torch.zeros(0, 2))


def test_model_digest_is_the_hash_of_the_definition() -> None:
    """Written out: order by UTF-8 bytes, ties under the least name, persistent buffers only."""
    model = Tied()
    tensors = [
        (b"alpha.weight", b"float32", model.zeta.weight),
        (b"scale", b"float16", model.scale),
        (b"zeta.bias", b"float32", model.zeta.bias),
        (b"zz", b"float32", model.zz),
        ("ä".encode(), b"int64", model.ä),
    ]
    text = hashlib.sha256(b"weightbus model v1\0" + SEED)
    for name, dtype, tensor in tensors:
        text.update(len(name).to_bytes(4, "little") + name + bytes([len(dtype)]) + dtype)
        text.update(bytes([tensor.dim()]))
        sums = defined_sums(to_bytes(tensor.detach()), tensor.element_size(), tensor.shape, seed=SEED)
        for number in (*tensor.shape, *sums):
            text.update(number.to_bytes(8, "little"))
    assert model_digest(model, seed=SEED) == text.hexdigest()
    backwards = {name.decode(): tensor_digest(tensor, seed=SEED) for name, _, tensor in tensors[::-1]}
    assert model_digest_of(backwards, seed=SEED) == text.hexdigest()
    assert model_digest(model) != text.hexdigest()


def test_model_digest_sees_names_dtypes_and_shapes() -> None:
    ones = torch.ones(6, 4)
    variants = [
        [("a", ones)],
        [("b", ones)],
        [("a", ones.view(torch.int32))],
        [("a", ones.view(24))],  # the same canonical shape
        [("a", ones), ("b", torch.zeros(0))],
        [("a", ones), ("b", torch.zeros(3))],
    ]
    assert tensor_digest(ones).sums == tensor_digest(ones.view(24)).sums
    assert len({model_digest(pairs) for pairs in variants}) == len(variants)


def test_model_digest_of_refuses_parts_and_other_seeds(rows: list[Digest]) -> None:
    whole = combine(rows)
    assert len(model_digest_of({"w": whole}, seed=SEED)) == 64
    with pytest.raises(CoverageError, match=r"w: .*combine the parts' digests first"):
        model_digest_of({"w": rows[0]}, seed=SEED)
    with pytest.raises(SpecError, match="w: expected seed 0000"):
        model_digest_of({"w": whole})
    with pytest.raises(SpecError, match="a: expected each name once"):
        model_digest([("a", torch.zeros(1)), ("a", torch.ones(1))])


def test_fold_is_the_sum_of_the_definition() -> None:
    names = ["layer.0", "ä", "layer.0"]
    sums = np.array([[1, 2], [P - 1, P - 2], [2**60, 5]], dtype=np.uint64)

    def key(lane: int, name: str) -> int:
        text = b"weightbus fold v1\0" + SEED + bytes([lane]) + name.encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:16], "little") % P

    want = tuple(
        sum(int(row[lane]) * key(lane, name) for name, row in zip(names, sums, strict=True)) % P
        for lane in (0, 1)
    )
    assert fold(names, sums, SEED) == want
    assert fold([], sums[:0], SEED) == (0, 0)
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\), got \(3, 2\); fold"):
        fold(names[:2], sums, SEED)


def test_one_call_for_parts_of_all_dtypes_and_strides() -> None:
    parts = [random_part(seeded(i)) for i in range(40)]
    parts.append(part_of(torch.zeros(3, 0)))
    together = Digester(parts)
    assert len({part.tensor.dtype for part in parts}) >= 5
    assert together.nbytes == sum(len(to_bytes(part.tensor)) for part in parts)
    apart = np.concatenate([Digester([part]).sums(SEED) for part in parts])
    assert np.array_equal(together.sums(SEED), apart)
    assert Digester([]).sums(SEED).shape == (0, 2)


def test_a_prepared_digester_reads_what_is_there_now() -> None:
    tensor = torch.zeros(7, 90, dtype=torch.int16)
    digest = Digester([part_of(tensor.t()), part_of(tensor[2:, 3:])])
    assert not digest.sums(SEED).any()
    for value in (1, 2):
        tensor.fill_(value)
        fresh = Digester([part_of(tensor.t()), part_of(tensor[2:, 3:])])
        assert np.array_equal(digest.sums(SEED), fresh.sums(SEED))
        assert digest.sums(SEED).all()
    assert not np.array_equal(digest.sums(SEED), digest.sums(STABLE_SEED))


def test_parts_that_are_not_what_they_say_are_refused() -> None:
    good = part_of(torch.zeros(4, 5), name="w")
    for part, expected in [
        (replace(good, tensor=torch.zeros(4, 4)), r"w: expected a float32 view of box .*, got .*\[4, 4\]"),
        (replace(good, tensor=torch.zeros(4, 5).half()), "w: expected a float32 view .*, got torch.float16"),
        (replace(good, box=Box((1, 0), (4, 5))), r"w: expected a box in shape \[4, 5\], got \[1:5, 0:5\]"),
        (replace(good, tensor=torch.zeros(4, 5, device="meta")), "w: expected a tensor with storage"),
        (replace(good, tensor=torch.zeros(4, 5).to_sparse()), "w: expected a strided tensor"),
    ]:
        with pytest.raises(SpecError, match=expected):
            Digester([part_of(torch.zeros(2)), part])
    with pytest.raises(SpecError, match="lazy conjugate"):
        tensor_digest(torch.zeros(3, dtype=torch.complex64).conj())


def test_sub_part_is_the_common_piece() -> None:
    tensor = random_tensor(seeded(3), 2, (4, 6))
    part = part_of(tensor, (10, 20), Box((3, 10), (4, 6)))
    inner = sub_part(part, Box((5, 0), (5, 13)))
    assert inner is not None
    assert inner.box == Box((5, 10), (2, 3))
    assert torch.equal(inner.tensor.view(torch.int16), tensor[2:4, :3].view(torch.int16))
    assert inner.tensor.data_ptr() == tensor[2:].data_ptr()
    assert sub_part(part, Box((0, 0), (3, 20))) is None


def test_parameters_and_tensors_that_require_grad() -> None:
    weight = nn.Parameter(torch.randn(5, 40))
    assert tensor_digest(weight) == tensor_digest(weight.detach())
    assert tensor_digest(weight * 2) == tensor_digest(weight.detach() * 2)


def test_places_beyond_the_fast_ones_are_left_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    tensor = random_tensor(seeded(6), 1, (3, 64))
    for shape, offset, spoken in (((2**42, 64), 2**42 - 3, 0), ((2**43, 64), 2**43 - 3, 1)):
        box = Box((offset, 0), (3, 64))
        ((lane0, lane1),) = Digester([part_of(tensor, shape, box)]).sums(SEED).tolist()
        assert (lane0, lane1) == defined_sums(to_bytes(tensor), 1, shape, box.offsets, box.sizes, SEED)
        assert caplog.text.count("exact but slower") == spoken


def test_without_the_extension_it_says_so_once_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    part = part_of(random_tensor(seeded(5), 2, (9, 50)))
    fast = Digester([part]).sums(SEED)
    say_once.cache_clear()
    monkeypatch.setitem(sys.modules, "weightbus.digest.cpu", None)  # as where it was not built
    with caplog.at_level(logging.WARNING, "weightbus"):
        for _ in range(3):
            assert np.array_equal(Digester([part]).sums(SEED), fast)
    (record,) = caplog.records
    assert "no fast digest on cpu" in record.message
    assert "cure: install weightbus where a C++17 compiler is found" in record.message


def test_without_cupy_the_cure_is_the_extra_for_its_cuda(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    say_once.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    for module in ("weightbus.digest.cuda", "weightbus.memory.cuda_kernels"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    part = part_of(torch.arange(9))
    with caplog.at_level(logging.WARNING, "weightbus"):
        found = digester._implementation([part], torch.device("cuda"))
    assert np.array_equal(found.launch(SEED, None)(), Digester([part]).sums(SEED))
    assert [r.message.endswith("cure: pip install 'weightbus[cuda12]'") for r in caplog.records] == [True]


def test_keys_of_names_with_and_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of every length around SHA-256's blocks, empty and beyond ASCII."""
    names = ["", *("layer.µ."[: n % 9] + "x" * n for n in range(200)), "再" * 70]
    sums = np.random.default_rng(0).integers(0, P, (len(names), 2), dtype=np.uint64)
    keys = NameKeys(names).under(SEED)
    for row, name in zip(keys.tolist(), names, strict=True):
        for lane, key in enumerate(row):
            text = b"weightbus fold v1\0" + SEED + bytes([lane]) + name.encode()
            assert key == int.from_bytes(hashlib.sha256(text).digest()[:16], "little") % P, name
    found = fold_with(keys, sums)
    monkeypatch.setattr(sys.modules["weightbus.digest.fold"], "_extension", None)
    assert np.array_equal(NameKeys(names).under(SEED), keys)
    assert fold_with(keys, sums) == found


def test_the_extension_refuses_what_does_not_fit() -> None:
    extension = pytest.importorskip("weightbus.digest._grid61")
    keys = np.zeros((2, 2), np.uint64)
    for ends in ([1, 4], [2, 1], [3, 3, 3], []):
        with pytest.raises(ValueError, match="name_keys"):
            extension.name_keys(b"abc", np.array(ends, np.int64), b"", keys)
    with pytest.raises(ValueError, match="fold"):
        extension.fold(keys, keys[:1])
