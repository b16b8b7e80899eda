"""Text that comes from other processes: a terminal shows it and does nothing else, and no line is made up."""

from __future__ import annotations

import io
import json

import msgspec
import pytest
import schema
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

import weightbus
from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control import wire
from weightbus.control.identity import job_of
from weightbus.control.keys import generate, host_and_port
from weightbus.errors import HubError, ProtocolError, SpecError, WeightbusError, visible
from weightbus.planning.facts import _Row, decode_facts
from weightbus.planning.spec import Spec
from weightbus.progress import Bar
from weightbus.tools import cli
from weightbus.tools.metrics import prometheus_text
from weightbus.tools.operate import status_table

EVIL = (
    "\x1b[2J\x1b]0;title\x07",
    "a\nweightbus: all is well",
    "\u202egnol",
    "\x9b31m",
    "\r\x00",
    "[red]x[/red]",
)

# All that can travel: no half of a surrogate pair.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(EVIL)
kinds = st.sampled_from(sorted((*wire.ToHub.__args__, *wire.FromHub.__args__), key=lambda kind: kind.__name__))


def texts(value, name=""):
    """All text in a message, with the name of its field."""
    match value:
        case str():
            yield name, value
        case list() | tuple():
            for one in value:
                yield from texts(one, name)
        case dict():
            yield from texts([*value, *value.values()], name)


@settings(deadline=None)
@given(st.text(st.characters()) | words)
def test_what_is_visible_is_one_printable_line(text):
    shown = visible(text)
    assert shown.isprintable()
    assert len(shown) <= len(text)
    assert visible(shown) == shown
    assert shown == text or not text.isprintable()
    error = str(weightbus.UpdateError(f"rank 0: {text}\n  rank 1: {text}"))
    assert all(line.isprintable() for line in error.split("\n"))


@settings(deadline=None)
@given(kinds, st.lists(words, min_size=1, max_size=3), st.data())
def test_all_text_of_any_message_is_visible(kind, given_words, data):
    raw = {name: st.just([]) for name in ("frames", "payloads") if hasattr(kind, name)}
    message = data.draw(schema.of(kind, words=given_words, **raw))
    decode = wire.decode_to_hub if kind in wire.ToHub.__args__ else wire.decode_from_hub
    got = decode(wire.encode(message))
    for name, text in texts(msgspec.to_builtins(got)):
        assert text.isprintable(), name
    # Nothing is lost, and nothing becomes too long to be passed on.
    assert decode(wire.encode(got)) == got


def test_paths_are_opened_as_they_are_named():
    path = "/models/a\u00a0b\n"
    ask = m.AskTask(id="i", hub="h", task=m.LoadTask(path=path), wait_s=1.0, run_s=1.0)
    assert wire.decode_to_hub(wire.encode(ask)).task.path == path


@pytest.mark.parametrize("evil", [e for e in EVIL if not e.isprintable()])
def test_names_of_tensors_are_printable_or_refused(tmp_path, capsys, evil):
    with pytest.raises(SpecError, match="name of a tensor: expected printable characters"):
        Spec(name=evil, dtype="float32", shape=(1,))
    row = _Row(name=evil, dtype="float32", shape=(1,), boxes=(((0,), (1,)),), in_place=False, why_arrived="")
    with pytest.raises(SpecError, match="expected printable characters"):
        decode_facts(msgspec.msgpack.encode([row]), "server rank 0")
    with pytest.raises(SpecError, match="expected printable characters"):
        weightbus.snapshot([(evil, torch.zeros(1))])
    save_file({f"a{evil}": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert cli.main(["digest", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "expected printable characters" in said
    assert said.rstrip("\n").isprintable()


def test_reasons_within_facts_are_visible():
    row = _Row("w", "float32", (1,), (((0,), (1,)),), False, EVIL[0], (), "", EVIL[1])
    holding = decode_facts(msgspec.msgpack.encode([row]), "server rank 0")["w"]
    assert (holding.why_arrived + holding.skipped).isprintable()


def test_saved_lists_of_digests_are_shown_only(tmp_path, capsys):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    listed = tmp_path / "digests.json"
    assert cli.main(["digest", str(tmp_path), "--save", str(listed)]) == 0
    saved = json.loads(listed.read_text())
    saved["tensors"] |= {evil: saved["tensors"]["w"] for evil in EVIL}
    listed.write_text(json.dumps(saved))
    capsys.readouterr()
    assert cli.main(["digest", str(tmp_path), "--check", str(listed)]) in (1, 2)
    said = "".join(capsys.readouterr())
    assert all(line.isprintable() for line in said.split("\n")), said


def status(evil):
    peer = a.PeerStatus(
        rank=evil, replica=0, host=evil, pid=1, device=evil, state="ready", version=1, heard_s=0.0
    )
    failure = m.Failure(rank=evil, tensor=evil, reason=evil, where=evil)
    past = a.Past(
        kind="update", version=1, epoch=1, planned=True, began=0.0, seconds=0.0, verdict="failed", nbytes=1,
        servers=1, failures=[failure], phases={evil: 0.0}, ranks=[],
    )  # fmt: skip
    return a.Status(
        id="i", hub="h", weightbus=evil, up_s=1.0, version=1, paused_s=0.0, peers=[peer], incomplete=[],
        phase=evil, missing=[evil], requests=0, counts={evil: 1}, jobs=[], past=[past],
    )  # fmt: skip


@settings(deadline=None)
@given(words)
def test_a_table_and_metrics_show_any_word_as_it_is(word):
    """No escape, no markup, no line that a word has made up."""
    said, harmless = (wire.decode_from_hub(wire.encode(status(one))) for one in (f"x{word}", "x"))
    lines = []
    for one in (said, harmless):
        console = Console(file=io.StringIO(), width=400, color_system=None, force_terminal=True)
        console.print(status_table(one))
        lines.append(console.file.getvalue().split("\n"))
        lines.append(prometheus_text(one).split("\n"))
    table, metrics, harmless_table, harmless_metrics = lines
    assert all(line.isprintable() for line in (*table, *metrics))
    assert len(table) <= len(harmless_table)  # a wider table has room for the title
    assert len(metrics) == len(harmless_metrics)
    if "[" in word:
        assert sum(word.strip() in line for line in table) >= 3 or not word.isprintable()


def test_a_bars_title_is_no_markup():
    console = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=True)
    bar = Bar("loading [red]x[/red]\x1b[2J", patience_s=0.0, console=console)
    bar(1, 2)
    bar.close()
    assert "loading [red]x[/red]?[2J" in console.file.getvalue()


# -- line breaks where a pattern ends ---------------------------------------------------------------


@pytest.mark.parametrize("field", ["host", "job"])
def test_a_name_has_no_line_break_behind_it(field):
    hello = m.Hello(process="p", host="h", pid=1, device="cpu", role="server", rank=0, size=1, job="j")
    frames = wire.encode(msgspec.structs.replace(hello, **{field: "h\n"}))
    with pytest.raises(ProtocolError, match=rf"matching regex .* at `\$.{field}`"):
        wire.decode_to_hub(frames)


def test_what_a_process_is_told_has_no_line_break(tmp_path):
    with pytest.raises(SpecError, match="job: expected at most 64"):
        job_of("j\n")
    for address in ("tcp://127.0.0.1\n:5757", "tcp://127.0.0.1:5757\n", "tcp://127.0.0.1\t:5757"):
        with pytest.raises(HubError, match="address: expected tcp://host:port"):
            host_and_port(address)
    for client in ("servers\n" + "k" * 40 + " all", "a b", "../servers", "a\u202eb"):
        with pytest.raises(HubError, match="keys: expected a client's name"):
            generate(tmp_path / "keys", client)
    assert not (tmp_path / "keys").exists()


def test_this_hosts_name_is_one_word(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "host\n\x1b[2J")
    assert wire.decode_to_hub(
        wire.encode(
            m.Hello(
                process="p", host=weightbus.control.identity.host_name(), pid=1, device="cpu", role="server",
                rank=0, size=1,
            )
        )
    ).host == "host___2J"  # fmt: skip


def test_the_family_of_errors_is_visible():
    for kind in (WeightbusError, *WeightbusError.__subclasses__()):
        if kind.__init__ is WeightbusError.__init__:
            assert str(kind(EVIL[0])).isprintable()
