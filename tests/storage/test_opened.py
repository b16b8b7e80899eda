"""Files are opened once, beneath their roots, whatever is swapped, linked or put in their place meanwhile."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightbus.errors import SpecError
from weightbus.storage import opened
from weightbus.storage.opened import Files, Folder, OpenFile, check_plain_name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root beside what lies outside of it; every file holds its own place."""
    for place in ("root", "root/a", "root/a/b", "outside", "root-too"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "file").write_text(place)
    return tmp_path


def text_of(found: OpenFile | Folder) -> str:
    return found.part(0, 100).decode() if isinstance(found, OpenFile) else f"folder {found.path.name}"


# Where a link at root/a/link points, by the root's parent, and what is read there: None is a refusal.
LINKS = {
    "file": "root/a",
    "b/file": "root/a/b",
    "../file": "root",
    "../a/../a/b/../file": "root/a",
    "{0}/root/a/b/file": "root/a/b",
    "{0}/root/../root/file": None,  # above the root on the way
    "../../outside/file": None,
    "../../root/file": None,
    "../../../../../../../../etc/hostname": None,
    "{0}/outside/file": None,
    "{0}/root-too/file": None,  # its text only begins like the root's
    "/proc/self/root{0}/outside/file": None,
    "link": None,  # itself
    "missing": None,
}


@pytest.mark.parametrize(("target", "place"), LINKS.items())
def test_links_lead_to_what_lies_in_the_root_and_to_nothing_else(tree, target, place):
    (tree / "root/a/link").symlink_to(target.format(tree))
    with Files([tree / "root"]) as files:
        folder = files.find(tree / "root" / "a")
        for read in (lambda: files.find(tree / "root/a/link"), lambda: folder.file("link")):
            if place is not None:
                assert text_of(read()) == place
            else:
                with pytest.raises(SpecError, match="expected what can be read in"):
                    read()


def test_errors_do_not_tell_what_is_there(tree):
    """One text for what is outside, missing, unreadable, or behind a link that leads out; no link's target."""
    (tree / "root/out").symlink_to(tree / "outside" / "file")
    (tree / "root/nowhere").symlink_to(tree / "nowhere")
    (tree / "root/cwd").symlink_to("/proc/self/cwd")
    paths = [
        "root/out",
        "root/nowhere",
        "root/cwd",
        "root/missing",
        "outside/file",
        "nothing",
        "root/../outside",
    ]
    said = set()
    with Files([tree / "root"]) as files:
        for path in paths:
            with pytest.raises(SpecError) as error:
                files.find(tree / path)
            said.add(str(error.value).replace(f"{tree / path}: ", ""))
    assert said == {f"expected what can be read in {tree / 'root'}, got no such"}


def test_a_root_that_is_a_link_is_known_by_both_names(tree):
    (tree / "models").symlink_to(tree / "root")
    with Files([tree / "models"]) as files:
        for path in ("models/a/file", "root/a/file"):
            assert text_of(files.find(tree / path)) == "root/a"


def test_without_roots_links_lead_anywhere_and_errors_say_why(tree):
    (tree / "root/out").symlink_to("../outside/file")
    with Files() as files:
        assert text_of(files.find(tree / "root/out")) == "outside"
        with pytest.raises(SpecError, match="missing: expected a readable file, got No such file"):
            files.find(tree / "missing")
        with pytest.raises(SpecError, match="expected a readable file, got embedded null byte"):
            files.find(tree / "a\0b")


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a directory"])
@pytest.mark.parametrize("linked", [False, True])
def test_only_regular_files_are_opened(tree, kind, linked, monkeypatch):
    folder = tree / "root"
    place = folder / ("other" if linked else "it")
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "a FIFO":
            os.mkfifo(place)
        elif kind == "a socket":
            monkeypatch.chdir(folder)  # a socket's path is short
            bound.bind(place.name)
        elif kind == "a directory":
            place.mkdir()
        else:
            place = Path("/dev/zero")
            linked = True
        if linked:
            (folder / "it").symlink_to(place)
        with Files() as files:
            with pytest.raises(SpecError, match=f"it: expected a regular file, got {kind}"):
                files.file(folder / "it")
            with pytest.raises(SpecError, match=f"it: expected a regular file, got {kind}"):
                files.find(folder).file("it")


def test_a_fifo_that_is_put_there_between_look_and_open_is_not_waited_for(tree, monkeypatch):
    path = tree / "root" / "file"
    before = os.open

    def swap(name, flags, *arguments, **keywords):
        if name == "file" and not flags & os.O_PATH:
            path.unlink()
            os.mkfifo(path)
        return before(name, flags, *arguments, **keywords)

    monkeypatch.setattr(opened.os, "open", swap)
    with Files() as files, pytest.raises(SpecError, match="expected a regular file, got a FIFO"):
        files.file(path)


def test_a_link_that_is_put_there_between_look_and_open_is_not_followed(tree, monkeypatch):
    path = tree / "root" / "file"
    before = os.open

    def swap(name, flags, *arguments, **keywords):
        if name == "file" and not flags & os.O_PATH:
            path.unlink()
            path.symlink_to(tree / "outside" / "file")
        return before(name, flags, *arguments, **keywords)

    monkeypatch.setattr(opened.os, "open", swap)
    with Files([tree / "root"]) as files, pytest.raises(SpecError, match="expected what can be read in"):
        files.file(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_swaps_at_any_step_lead_to_nothing_outside(tmp_path_factory, data):
    """Before any of the opens a folder or file on the way is replaced by a link to a like one outside."""
    tree = tmp_path_factory.mktemp("swaps")
    for place in ("root/a/b", "outside/a/b", "outside/b"):
        (tree / place).mkdir(parents=True)
    for folder in ("a", "a/b", "b"):
        (tree / "outside" / folder / "file").write_text("secret")
    for folder in ("a", "a/b"):
        (tree / "root" / folder / "file").write_text("public")
    when = data.draw(st.integers(0, 8))
    what = data.draw(st.sampled_from(["a", "a/b", "a/b/file"]))
    target = data.draw(
        st.sampled_from([f"{tree}/outside/", "../outside/", "../../outside/", "../../../outside/"])
    )
    calls = 0
    before = os.open

    def swap(*arguments, **keywords):
        nonlocal calls
        if calls == when:
            (tree / "root" / what).rename(tree / "gone")
            (tree / "root" / what).symlink_to(f"{target}{what}")
        calls += 1
        return before(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch, Files([tree / "root"]) as files:
        patch.setattr(opened.os, "open", swap)
        try:
            found = files.find(tree / "root" / "a").folder("b").file("file").part(0, 100)
        except SpecError:
            return
    assert found == b"public"


@pytest.mark.parametrize("swapping", [True, False])
def test_swaps_in_another_thread(tree, swapping):
    """A link that points in and out by turns, as fast as can be: what is read is always what lies inside."""
    link, ending = tree / "root" / "link", threading.Event()
    link.symlink_to("file")

    def swap():
        while not ending.is_set():
            for target in ("../outside/file", "file", "a/file"):
                (tree / "root" / "next").symlink_to(target)
                (tree / "root" / "next").rename(link)

    thread = threading.Thread(target=swap)
    if swapping:
        thread.start()
    seen = set()
    try:
        for _ in range(300):
            with Files([tree / "root"]) as files:
                try:
                    seen.add(text_of(files.find(link)))
                except SpecError:
                    seen.add("refused")
    finally:
        ending.set()
        if swapping:
            thread.join()
    assert seen - {"refused"} <= {"root", "root/a"}
    assert swapping or seen == {"root"}


def test_header_and_data_come_through_one_descriptor(tree):
    path = tree / "root" / "file"
    with Files() as files:
        first = files.file(path)
        (tree / "root" / "new").write_text("new")
        (tree / "root" / "new").rename(path)
        assert files.file(path) is first
        assert first.part(0, 10) == b"root"


def test_a_folder_that_is_replaced_is_read_to_its_end(tree):
    with Files() as files:
        folder = files.find(tree / "root" / "a")
        (tree / "root" / "a").rename(tree / "root" / "old")
        (tree / "outside").rename(tree / "root" / "a")
        assert folder.names() == ["b", "file"]
        assert text_of(folder.file("file")) == "root/a"


@pytest.mark.parametrize(
    ("spoil", "strict", "relinked", "proved"),
    [
        (lambda p: None, True, True, True),
        (lambda p: p.write_text("ROOT"), False, False, False),
        (lambda p: os.truncate(p, 2), False, False, False),
        (lambda p: rewrite(p, "ROOT"), False, False, True),
        (lambda p: p.chmod(0o600), False, False, True),
        (lambda p: os.link(p, p.with_name("two")), False, True, True),
        (lambda p: p.unlink(), False, True, True),
        (lambda p: p.with_name("new").rename(p), False, True, True),
    ],
    ids=["nothing", "written", "cut", "time put back", "mode", "linked", "removed", "replaced"],
)
def test_what_is_taken_for_no_change(tree, spoil, strict, relinked, proved):
    path = tree / "root" / "file"
    (tree / "root" / "new").write_text("new")
    old = 1_000_000_000  # a time of writing that is not now
    os.utime(path, ns=(old, old))
    with Files() as files:
        file = files.file(path)
        spoil(path)
        for good, said in ((strict, {}), (relinked, {"relinked": True}), (proved, {"proved": True})):
            if good:
                file.check_unchanged(**said)
            else:
                with pytest.raises(SpecError, match="stays as it is while it is loaded, but it changed"):
                    file.check_unchanged(**said)


def rewrite(path, text):
    """As ``rsync --times`` or ``cp --preserve`` do it."""
    look = path.stat()
    path.write_text(text)
    os.utime(path, ns=(look.st_atime_ns, look.st_mtime_ns))


def test_what_was_read_of_it_is_read_again(tree):
    path = tree / "root" / "file"
    with Files() as files:
        file = files.file(path)
        assert file.part(0, 2) == b"ro"
        rewrite(path, "roXX")
        file.check_unchanged(proved=True)
        rewrite(path, "XXot")
        with pytest.raises(SpecError, match="changed"):
            file.check_unchanged(proved=True)


def test_nothing_is_read_of_a_file_that_is_too_large(tree):
    path = tree / "root" / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with Files() as files, pytest.raises(SpecError, match=r"expected at most 1024 bytes, got a file of \d+"):
        files.file(path).read(1024)


def test_a_folder_of_too_many_names(tree, monkeypatch):
    monkeypatch.setattr(opened, "MAX_NAMES", 1)
    with Files() as files:
        with pytest.raises(SpecError, match="expected at most 1 files, got more"):
            files.find(tree / "root").names()
        assert len(files.find(tree / "outside").names()) == 1


def test_everything_is_closed_again(tree):
    before = len(os.listdir("/proc/self/fd"))
    (tree / "root/loop").symlink_to("loop")
    for _ in range(3):
        with Files([tree / "root"]) as files:
            files.find(tree / "root" / "a").folder("b").file("file")
            for bad in ("loop", "none", "a/none", "../outside"):
                with pytest.raises(SpecError):
                    files.find(tree / "root" / bad)
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.text(max_size=20))
def test_plain_names_stay_in_their_folder(name):
    """What passes is a file of the folder, as the system itself counts."""
    try:
        check_plain_name(name, "here")
    except SpecError:
        return
    assert os.path.basename(name) == name
    assert os.path.normpath(os.path.join("/folder", name)) == f"/folder/{name}"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\0", "\ud800", "x" * 256, "ä" * 128])
def test_names_that_lead_out(name):
    with pytest.raises(SpecError, match="here: expected the name of one file or folder in it"):
        check_plain_name(name, "here")
