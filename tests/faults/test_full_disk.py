"""A disk that is full on one trainer rank, in a save: all are told why, at once, and go on."""

from __future__ import annotations

import contextlib
import os
import resource
import time

import pytest
import torch
from processes import Job, run_jobs

import weightbus


@contextlib.contextmanager
def small_files(limit):
    """This process can write no file beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trainer(rank, size, *, address, folder, full):
    source = [(f"w{i}", torch.full((1 << 18,), float(10 * i + 1))) for i in range(4)]
    with weightbus.Publisher(source, address=address) as publisher:
        begun = time.monotonic()
        with small_files(1 << 20) if rank == full else contextlib.nullcontext():
            try:
                publisher.save(folder / "one", timeout_s=60.0)
                text = ""
            except weightbus.UpdateError as error:
                text = str(error)
        took = time.monotonic() - begun
        saved = publisher.save(folder / "two", timeout_s=60.0)
    return text, took, saved.tensors


@pytest.mark.parametrize("full", [0, 1])
def test_who_has_no_space_is_named_at_once(address, tmp_path, full):
    arguments = {"address": address, "folder": tmp_path, "full": full}
    (trained,) = run_jobs(Job(run=trainer, size=2, arguments=arguments))
    for text, took, tensors in trained:
        assert f"trainer rank {full}: OSError: [Errno 27] File too large" in text
        assert took < 10.0  # of the 60 s that each step has
        assert tensors == 4
    assert sorted(os.listdir(tmp_path)) == ["two"]
