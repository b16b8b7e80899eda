"""Files that change between the look at them and the last byte of a load."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading

import msgspec
import pytest
import torch
from processes import free_address
from safetensors.torch import save_file

import weightbus
from weightbus.hub.server import Hub
from weightbus.storage.digest_list import NAME as LIST
from weightbus.storage.digest_list import saved_of
from weightbus.storage.disk import stored_tensors
from weightbus.tools.digest_files import digest_files


@pytest.fixture(scope="module")
def hub():
    address = free_address()
    served = Hub(address)
    thread = threading.Thread(target=served.serve)
    thread.start()
    yield address
    served.stop()
    thread.join()


def checkpoint(folder, value, *, listed):
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.full((64,), value), "b": torch.full((3, 5), value)}, folder / "m.safetensors")
    if listed:
        saved = saved_of(digest_files(stored_tensors(folder)))
        (folder / LIST).write_bytes(msgspec.json.encode(saved))


def replaced(folder):
    """As savers do: under another name, then renamed."""
    checkpoint(folder.with_name("other"), 2.0, listed=False)
    os.replace(folder.with_name("other") / "m.safetensors", folder / "m.safetensors")


def moved(folder):
    checkpoint(folder.with_name("other"), 2.0, listed=True)
    folder.rename(folder.with_name("old"))
    folder.with_name("other").rename(folder)


def removed(folder):
    shutil.rmtree(folder)


def linked(folder):
    os.link(folder / "m.safetensors", folder / "another")


def rewritten(folder):
    """As ``rsync --inplace --times`` does."""
    path = folder / "m.safetensors"
    look = path.stat()
    checkpoint(folder.with_name("other"), 2.0, listed=False)
    with path.open("r+b") as file:
        file.write((folder.with_name("other") / "m.safetensors").read_bytes())
    os.utime(path, ns=(look.st_atime_ns, look.st_mtime_ns))


def written(folder):
    with (folder / "m.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


@pytest.mark.parametrize("how", ["listed", "unlisted", "atomic"])
@pytest.mark.parametrize("change", [replaced, moved, removed, linked, rewritten, written])
def test_a_load_is_of_the_files_it_has_looked_at(hub, tmp_path, change, how):
    """Between the look, when all are ready, and the write. What was saved under the same name meanwhile is
    never mixed in, and old weights that are whole are good."""
    folder = tmp_path / "model"
    checkpoint(folder, 1.0, listed=how == "listed")
    target = [("a", torch.zeros(64)), ("b", torch.zeros(3, 5))]
    changes = contextlib.ExitStack()
    changes.callback(change, folder)
    with weightbus.Subscriber(
        target, address=hub, rank=0, replica_size=1, on_update=lambda version: changes.close()
    ) as subscriber:
        good = change not in (rewritten, written) or how == "atomic"
        if good:
            report = subscriber.update_from_disk(folder, atomic=how == "atomic")
            assert report.word == ("verified" if how == "listed" else "unverified")
            assert {float(x) for _, tensor in target for x in tensor.unique()} == {1.0}
        else:
            with pytest.raises(weightbus.TornError, match=r"it changed|expected .* live as it was read"):
                subscriber.update_from_disk(folder)
            assert subscriber.state == "torn"
