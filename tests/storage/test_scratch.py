"""A save removes, renames and writes to what it has made, and to nothing that has taken a name of it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from weightbus.errors import SpecError
from weightbus.storage.scratch import Scratch, check_scratch_name, open_made, scratch_name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "models" / "precious").mkdir(parents=True)
    (tmp_path / "models" / "precious" / "weights").write_text("the last good checkpoint")
    return tmp_path / "models" / "version-7"


@pytest.fixture
def made(path):
    """With a file of its own and one in a sub-folder."""
    scratch = Scratch(path, scratch_name(path))
    scratch.make(10)
    scratch.create("", "file", b"head", 10)
    scratch.folder("vae")
    scratch.create("vae", "file", b"vae", 3)
    yield scratch
    if scratch._folders:
        scratch.close()


def everything(folder: Path) -> set[str]:
    return {str(found.relative_to(folder)) for found in folder.rglob("*")}


PRECIOUS = {"precious", "precious/weights"}


def test_it_is_there_whole_or_not_at_all(path, made):
    assert not path.exists()
    made.publish()
    made.close()
    assert everything(path.parent) == PRECIOUS | {
        "version-7",
        "version-7/file",
        "version-7/vae",
        "version-7/vae/file",
    }
    assert (path / "file").read_bytes() == b"head" + bytes(6)


def test_what_was_made_goes_and_nothing_else(path, made):
    made.close()
    assert everything(path.parent) == PRECIOUS


def replace_all(here: Path) -> None:
    here.rename(here.with_name("moved"))
    (here.parent / "precious").rename(here)


def link_all(here: Path) -> None:
    here.rename(here.with_name("moved"))
    here.symlink_to("precious")


def replace_file(here: Path) -> None:
    (here / "file").unlink()
    os.link(here.parent / "precious" / "weights", here / "file")


def link_folder(here: Path) -> None:
    (here / "vae" / "file").unlink()
    (here / "vae").rmdir()
    (here / "vae").symlink_to("../precious")


def add(here: Path) -> None:
    (here / "mine").write_text("the last good checkpoint")


@pytest.mark.parametrize("swap", [replace_all, link_all, replace_file, link_folder, add])
@pytest.mark.parametrize("end", ["close", "publish"])
def test_what_has_taken_a_name_of_it_stays(path, made, swap, end):
    here = path.parent / made._name
    swap(here)
    if end == "publish" and swap in (replace_all, link_all):
        with pytest.raises(SpecError, match=r"expected .* to be what was made, but it was replaced"):
            made.publish()
        assert not path.exists()
    elif end == "publish":
        made.publish()
    made.close()
    texts = [
        found.read_text() for found in path.parent.rglob("*") if found.is_file() and found.stat().st_size > 10
    ]
    assert "the last good checkpoint" in texts


def test_a_name_that_was_taken_meanwhile(path, made):
    path.mkdir()
    (path / "theirs").touch()
    with pytest.raises(SpecError, match="expected a path where nothing is yet, got one made meanwhile"):
        made.publish()
    made.close()
    assert everything(path.parent) == PRECIOUS | {"version-7", "version-7/theirs"}


def test_what_can_not_be_made(path):
    with pytest.raises(SpecError, match="expected a path where nothing is yet, got one that exists"):
        Scratch(path.parent / "precious", ".precious.0123abcd.part")
    (path.parent / "link").symlink_to("nowhere")
    with pytest.raises(SpecError, match="expected a path where nothing is yet, got one that exists"):
        Scratch(path.parent / "link", ".link.0123abcd.part")
    with pytest.raises(SpecError, match="expected a directory to make it in, got no"):
        Scratch(path / "deeper", ".deeper.0123abcd.part")


def test_no_room_is_said_before_anything_is_made(path):
    scratch = Scratch(path, scratch_name(path))
    with pytest.raises(OSError, match="No space left") as error:
        scratch.make(1 << 62)
    scratch.close()
    assert error.value.errno == errno.ENOSPC
    assert everything(path.parent) == PRECIOUS


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "/x"])
def test_names_that_lead_out(path, made, name):
    with pytest.raises(SpecError, match="expected the name of one file or folder in it"):
        made.folder(name)
    with pytest.raises(SpecError, match="expected the name of one file or folder in it"):
        made.create("", name, b"", 0)


@pytest.mark.parametrize("name", ["precious", "..", "", ".version-7.part", ".version-7.0123abcg.part", "/etc"])
def test_only_names_of_this_save_are_taken(path, name):
    check_scratch_name(scratch_name(path), path)
    for check in (
        lambda: check_scratch_name(name, path),
        lambda: open_made(path, name, "", "weights", b"the", 24),
    ):
        with pytest.raises(SpecError, match="expected a scratch directory named after it"):
            check()


def test_another_rank_writes_to_the_very_file(path, made):
    descriptor = open_made(path, made._name, "vae", "file", b"vae", 3)
    os.pwrite(descriptor, b"VAE", 0)
    os.close(descriptor)
    assert (path.parent / made._name / "vae" / "file").read_bytes() == b"VAE"


@pytest.mark.parametrize(
    ("head", "nbytes", "spoil"),
    [
        (b"HEAD", 10, lambda here: None),
        (b"head", 11, lambda here: None),
        (b"head", 10, replace_file),
        (
            b"head",
            10,
            lambda here: ((here / "file").unlink(), (here / "file").symlink_to("../precious/weights")),
        ),
        (b"head", 10, lambda here: ((here / "file").unlink(), os.mkfifo(here / "file"))),
        (b"head", 10, link_all),
        (b"head", 10, lambda here: shutil.rmtree(here)),
    ],
    ids=["other head", "other size", "replaced", "linked", "FIFO", "folder linked", "gone"],
)
def test_another_rank_writes_to_no_other_file(path, made, head, nbytes, spoil):
    spoil(path.parent / made._name)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpecError, match="expected the file that trainer rank 0 made"):
        open_made(path, made._name, "", "file", head, nbytes)
    assert len(os.listdir("/proc/self/fd")) == before


def test_everything_is_closed_again(path):
    before = len(os.listdir("/proc/self/fd"))
    for end in (False, True):
        scratch = Scratch(path, scratch_name(path))
        scratch.make(1)
        scratch.create("", "file", b"x", 1)
        if end:
            scratch.publish()
        scratch.close()
    assert len(os.listdir("/proc/self/fd")) == before
