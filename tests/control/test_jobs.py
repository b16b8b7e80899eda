"""Jobs: which ranks are of one, which start of its trainer counts, and that none hears of another."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Job, run_jobs, run_python
from simulated import Crowd, enter

import weightbus
from weightbus.control import identity, wire
from weightbus.control import messages as m
from weightbus.control.rounds import INSIDE, Rounds
from weightbus.control.sketch import sketch_of, unlike
from weightbus.errors import ProtocolError, SpecError
from weightbus.hub import jobs
from weightbus.hub.jobs import Jobs
from weightbus.hub.roster import Roster
from weightbus.hub.server import Hub
from weightbus.planning.spec import Spec
from weightbus.tools import cli

# -- starts of a trainer ---------------------------------------------------------------------------

SIZE = 3


def hello(launch, rank, *, tokens, held=0, role="trainer"):
    """Of the process that is this rank of a launch of the job."""
    return m.Hello(
        process=f"{launch}.{rank}",
        host="h",
        pid=launch * SIZE + rank + 1,
        started=float(launch + 1),
        start=f"launch {launch}" if tokens else "",
        device="cpu",
        role=role,
        rank=rank,
        size=SIZE,
        held=m.Held(incarnation=held) if held else None,
    )


steps = st.lists(st.tuples(st.sampled_from(["join", "die"]), st.integers(0, 3), st.integers(0, SIZE - 1)))


@settings(max_examples=200, deadline=None)
@given(steps=steps)
def test_the_ranks_that_count_are_of_one_start(steps):
    """Whoever comes and goes: never a set of two launches, and a launch's number is its own, and only grows."""
    roster, numbers, last = Roster(dead_after_s=10.0), {}, 0
    for what, launch, rank in steps:
        name = f"{launch}.{rank}"
        if what == "join" and name not in roster.peers:
            roster.admit(hello(launch, rank, tokens=True), name, 0.0)
        elif what == "die" and name in roster.peers:
            roster.remove(roster.peers[name])
            roster.review()
        counted = roster.trainers()
        launches = {peer.id.split(".")[0] for peer in counted.values()}
        assert len(launches) <= 1
        assert roster.incarnation >= last
        last = roster.incarnation
        for one in launches:
            assert numbers.setdefault(one, roster.incarnation) == roster.incarnation
        assert len(set(numbers.values())) == len(numbers)
        # One that is here and does not count is early: an older start goes on.
        for peer in roster.peers.values():
            assert roster.is_early(peer) == (peer not in counted.values())
            assert not roster.is_early(peer) or peer.start.incarnation > roster.incarnation


@pytest.mark.parametrize("tokens", [True, False])
def test_a_new_start_waits_for_the_old_one_to_go(tokens):
    roster = Roster(dead_after_s=10.0)
    for rank in range(2):
        roster.admit(hello(0, rank, tokens=tokens), f"0.{rank}", 0.0)
    roster.remove(roster.peers["0.0"])
    roster.review()
    late = roster.admit(hello(1, 0, tokens=tokens), "1.0", 1.0)
    assert roster.is_early(late)
    assert (set(roster.trainers()), roster.incarnation) == ({1}, 1)
    taken = roster.admit(hello(1, 1, tokens=tokens), "1.1", 1.0)
    assert "trainer rank 1 is taken by trainer rank 1 (pid 2 on h, started 1970-01-01" in taken.reason
    roster.remove(roster.peers["0.1"])
    roster.review()
    assert not roster.is_early(late)
    assert (set(roster.trainers()), roster.incarnation) == ({0}, 2)
    # The rest of the new start, and what is left of the old one.
    roster.admit(hello(1, 1, tokens=tokens), "1.1", 2.0)
    assert set(roster.trainers()) == {0, 1}
    fenced = roster.admit(hello(0, 2, tokens=tokens, held=1), "0.2", 3.0)
    assert "incarnation 1 of its job, which incarnation 2 has followed" in fenced.reason


def test_a_process_that_comes_again_is_of_its_start():
    """As when a publisher is closed and another made, while other ranks still have theirs."""
    roster = Roster(dead_after_s=10.0)
    for rank in range(2):
        roster.admit(hello(0, rank, tokens=False), f"0.{rank}", 0.0)
    roster.remove(roster.peers["0.0"])
    roster.review()
    again = hello(0, 0, tokens=False)
    again.process = "another publisher of the same process"
    assert not roster.is_early(roster.admit(again, "new", 1.0))
    assert (set(roster.trainers()), roster.incarnation) == ({0, 1}, 1)


@pytest.mark.parametrize("first", ["server", "trainer"])
def test_numbers_go_on_above_those_of_an_earlier_hub(first):
    """At a new hub: ranks that come again keep their number, and what starts later has a higher one."""
    roster = Roster(dead_after_s=10.0)
    coming = {
        "server": hello(9, 0, tokens=True, held=7, role="server"),
        "trainer": hello(0, 0, tokens=True, held=7),
    }
    roster.admit(coming.pop(first), first, 0.0)
    ((name, other),) = coming.items()
    roster.admit(other, name, 0.0)
    assert roster.incarnation == 7
    roster.remove(roster.peers["trainer"])
    roster.review()
    roster.admit(hello(1, 0, tokens=True), "1.0", 0.0)
    assert roster.incarnation == 8


def test_a_made_up_number_leaves_room_above():
    roster = Roster(dead_after_s=10.0)
    roster.admit(hello(9, 0, tokens=True, held=(1 << 62) - 1, role="server"), "evil", 0.0)
    roster.admit(hello(1, 0, tokens=True, held=(1 << 62) - 1), "1.0", 0.0)
    assert roster.incarnation == 1


# -- what a rank hears -----------------------------------------------------------------------------

headers = st.builds(m.Header, st.sampled_from(["", "a"]), *[st.integers(0, 3)] * 3)
OUTCOME = m.Outcome(ok=True, moved=True, verdict="verified")
INSIDE_SAMPLES = [
    m.Gathered(of="wants", blobs=[], holder={}),
    m.Go(seed=bytes(32)),
    m.Detail(groups=[]),
    m.Suspects(suspects=[]),
    m.Probe(questions=[]),
]


def task_offer(header):
    offer = m.TaskOffer(task=m.LoadTask(), members=[], run_s=1.0)
    offer.stamp(header)
    return offer


@given(mine=headers.filter(lambda header: header.update), other=headers)
def test_only_messages_of_the_round_are_heard_in_it(mine, other):
    assert {type(sample) for sample in INSIDE_SAMPLES} == set(INSIDE)
    rounds = Rounds(mine.job)
    with rounds.within(task_offer(mine)):
        for sample in [*INSIDE_SAMPLES, OUTCOME]:
            sample.stamp(other)
            assert rounds.accepts(sample) == (other == mine)
        assert not rounds.accepts(task_offer(other))
    dropped = rounds.stale
    assert dropped == (1 if other == mine else len(INSIDE_SAMPLES) + 2)
    # It has ended: nothing of it is heard any more, an outcome for those who wait for one included.
    rounds.entered = True
    for sample in [*INSIDE_SAMPLES, OUTCOME]:
        sample.stamp(mine)
        assert not rounds.accepts(sample)


def test_a_round_whose_hub_was_lost_does_not_keep_a_rank_from_the_next():
    rounds = Rounds("")
    mine, following = m.Header("", 1, 1, 5), m.Header("", 1, 2, 6)
    with rounds.within(task_offer(mine)):
        assert not rounds.accepts(task_offer(following))
        rounds.orphaned = True
        assert rounds.accepts(task_offer(following))
        assert not rounds.accepts(task_offer(mine))
        OUTCOME.stamp(following)
        assert not rounds.accepts(OUTCOME), "of the next one"
        OUTCOME.stamp(mine)
        assert rounds.accepts(OUTCOME)


def test_what_has_ended_at_a_hub_stays_so_where_a_rank_joins_it_again():
    """As one that was stopped for a while: what it says then of an old round is not of the next call."""
    rounds = Rounds("")
    mine = m.Header("", 1, 1, 5)
    with rounds.within(task_offer(mine)):
        pass
    rounds.joined(m.Header("", 1, 1, 0))
    rounds.entered = True
    OUTCOME.stamp(mine)
    assert not rounds.accepts(OUTCOME)
    assert not rounds.accepts(task_offer(mine))


def test_an_outcome_is_heard_by_those_who_have_called_only():
    rounds = Rounds("")
    OUTCOME.stamp(m.Header("", 1, 1, 5))
    assert not rounds.accepts(OUTCOME)
    rounds.entered = True
    assert rounds.accepts(OUTCOME)
    with rounds.within(task_offer(m.Header("", 1, 1, 6))):
        assert not rounds.accepts(OUTCOME)
    assert rounds.entered, "a task comes between"


# -- several jobs at one hub -----------------------------------------------------------------------


def test_jobs_at_a_hub_are_bounded_and_those_in_use_are_kept(monkeypatch):
    monkeypatch.setattr(jobs, "MAX_JOBS", 3)
    table = Jobs(dead_after_s=10.0)
    for when, name in enumerate(["a", "b"]):
        table.open(name, float(when)).coordinator.committed = when
    table.open("a", 5.0).coordinator.roster.admit(hello(0, 0, tokens=True), "p", 0.0)
    table.open("c", 6.0)
    assert [job.name for job in table] == ["", "a", "c"], "nobody is in b"
    assert table.open("a", 7.0).coordinator.committed == 0
    table.open("c", 6.0).coordinator.roster.admit(hello(0, 0, tokens=True), "q", 0.0)
    with pytest.raises(ProtocolError, match="job 'd': expected at most 3 jobs"):
        table.open("d", 8.0)
    assert table.of("q")[0].name == "c"
    assert (table.serves("a"), table.serves("d"), table.serves("")) == (True, False, False)


@pytest.fixture
def hub(address):
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve)
    thread.start()
    yield hub
    hub.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_ranks_of_two_jobs_never_meet(hub, address, capsys, monkeypatch):
    """At one hub, with equal places: updates go to the job's own server, and a stolen name moves nothing."""
    monkeypatch.setenv("COLUMNS", "200")
    crowds = {}
    for name in ("a", "b"):
        crowd = crowds[name] = Crowd(address, job=name)
        crowd.trainer, crowd.server = crowd.join("trainer", 0, 1), crowd.join("server", 0, 1)
    both = [rank for crowd in crowds.values() for rank in crowd.ranks.values()]
    for crowd in crowds.values():
        assert crowd.run(lambda c=crowd: all(rank.is_member for rank in c.ranks.values()), 10)
    one, other = crowds["a"], crowds["b"]
    one.trainer.send(enter(one.trainer, 1))
    assert one.run(lambda: one.trainer.outcomes, 10)
    assert (one.trainer.outcomes[0].ok, one.trainer.outcomes[0].servers) == (True, 1)
    other.run(lambda: False, 0.2)
    assert not other.server.outcomes
    with weightbus.Client(address, job="a") as a, weightbus.Client(address, job="b") as b:
        assert (a.status().version, b.status().version) == (1, None)
        assert a.status().jobs == ["a", "b"]
        # A rank that says another job's name is not known there.
        other.trainer.header = other.trainer.header._replace(job="a")
        other.trainer.send(enter(other.trainer, 2))
        other.run(lambda: not other.trainer.is_member, 10)
        assert (a.status().version, a.status().phase, b.status().phase) == (1, "", "")
        assert b.pause(5.0).ok
        assert (a.status().paused_s, b.status().paused_s > 0) == (0.0, True)
    with weightbus.Client(address) as nobody:
        refused = nobody.pause(5.0)
        assert (refused.ok, refused.reason) == (False, "job '': expected one that has ranks here, ['a', 'b']")
        assert cli.main(["status", "--address", address]) == 0
        shown = capsys.readouterr().out
        assert "job a, incarnation 1, version 1" in shown
        assert "job b, incarnation 1, version none" in shown
        assert cli.main(["status", "--address", address, "--job", "b"]) == 0
        shown = capsys.readouterr().out
        assert "job b, incarnation 1" in shown
        assert "job a" not in shown
        assert cli.main(["pause", "--address", address, "--job", "c"]) == 1
        assert not nobody.replicas().replicas
    for crowd in crowds.values():
        crowd.close()
    assert len(both) == 4


def net(value):
    net = torch.nn.Linear(4, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def _trainer(rank, size, *, value):
    with weightbus.Publisher(net(value), connect_timeout_s=30, join_timeout_s=30) as publisher:
        report = publisher.update(1)
        return report.job, report.incarnation, report.word, report.servers


def _server(rank, size):
    target = net(0.0)
    with weightbus.Subscriber(target, connect_timeout_s=30) as subscriber:
        subscriber.serve()
    return target.bias.unique().tolist()


def test_two_jobs_of_one_host_share_the_default_address(address):
    """Named by the environment, started together, of equal shapes; the address is the environment's, too."""
    ranks = [
        Job(run=run, arguments=arguments, env={"WEIGHTBUS_JOB": name, "WEIGHTBUS_ADDRESS": address})
        for name, value in (("a", 1.0), ("b", 2.0))
        for run, arguments in ((_trainer, {"value": value}), (_server, {}))
    ]
    results = run_jobs(ranks[0], ranks[3], ranks[2], ranks[1])
    assert [one for (one,) in results] == [("a", 1, "verified", 1), [2.0], ("b", 1, "verified", 1), [1.0]]


@pytest.mark.parametrize("name", ["", "a", "team/run-7", "x" * 64])
def test_a_jobs_name(name, monkeypatch):
    monkeypatch.setenv("WEIGHTBUS_JOB", "from the environment" if name else "b")
    assert identity.job_of(name) == name
    monkeypatch.setenv("WEIGHTBUS_JOB", name)
    assert identity.job_of(None) == name


@pytest.mark.parametrize("name", ["a b", "x" * 65, "a\n", "\x1b[31m", 7])
def test_no_jobs_name(name):
    with pytest.raises(SpecError, match="job: expected at most 64 of the characters"):
        weightbus.Publisher(net(1.0), job=name)
    with pytest.raises(SpecError, match="job: expected"):
        weightbus.Client(job=name)


# -- the same place twice --------------------------------------------------------------------------


def _publish(address, **options):
    return weightbus.Publisher(net(1.0), address=address, rank=0, size=1, join_timeout_s=15, **options)


def _subscribe(address, **options):
    return weightbus.Subscriber(net(0.0), address=address, rank=0, replica_size=1, **options)


@pytest.mark.parametrize("job", ["", "named"])
@pytest.mark.parametrize("first", [_publish, _subscribe])
def test_one_process_takes_a_place_once(hub, address, first, job):
    end = "publisher" if first is _publish else "subscriber"
    held = first(address, job=job)
    refused = []

    def again():
        with pytest.raises(SpecError, match=f"{end}: this process has one of job '{job}' at") as caught:
            first(address, job=job)
        refused.append(str(caught.value))

    again()
    thread = threading.Thread(target=again)
    thread.start()
    thread.join(10)
    assert len(refused) == 2
    # The refused one has taken nothing with it; another job, and the other end, have places of their own.
    with contextlib.ExitStack() as stack:
        stack.enter_context(first(address, job=job + "other"))
        stack.enter_context((_subscribe if first is _publish else _publish)(address, job=job))
        held.close()
        stack.enter_context(first(address, job=job))


def test_the_first_publisher_sends_its_own_source(hub, address):
    target = net(0.0)
    with (
        _publish(address) as first,
        weightbus.Subscriber(target, address=address, rank=0, replica_size=1) as subscriber,
    ):
        with pytest.raises(SpecError, match="publisher: this process has one"):
            weightbus.Publisher(net(2.0), address=address, rank=0, size=1)
        assert first.update(1).verified
        assert target.bias.unique().tolist() == [1.0]
        assert subscriber.version == 1


# -- jobs without a name ---------------------------------------------------------------------------


def specs(*given, dtype="float32"):
    """From (name, shape) pairs."""
    return {name: Spec(name=name, dtype=dtype, shape=shape) for name, shape in given}


def sketch(model, *, plain=None, whole=True):
    return sketch_of(model, plain=model if plain is None else plain, whole=whole)


MLP = specs(("up.weight", (8, 4)), ("up.bias", (8,)), ("down.weight", (4, 8)))
LARGE = specs(
    *((f"layers.{i}.{what}.weight", (4, 4)) for i in range(40) for what in ("q", "k", "v", "o", "up"))
)


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (sketch(MLP), ""),
        (sketch(specs(*((n, s.shape) for n, s in MLP.items()), dtype="bfloat16")), ""),
        (sketch(MLP | specs(("extra", (3,)))), ""),
        (sketch({name: MLP[name] for name in ("up.bias",)}), ""),
        # One of three differs: the update's refusal will name it.
        (sketch(MLP | specs(("up.weight", (4, 8)))), ""),
        # A prefix too many or too few: likewise.
        (sketch(specs(*((f"model.{n}", s.shape) for n, s in MLP.items()))), ""),
        # Of names that a map or loading code takes nothing is known.
        (sketch(specs(("embed", (9, 9))), plain=(), whole=False), ""),
        (sketch(specs(("embed", (9, 9)), ("head", (9, 9))), plain=("head",), whole=False), ""),
        (
            sketch(specs(("embed", (9, 9)))),
            "no name in common: down.weight, up.bias, up.weight on the trainer, embed",
        ),
        (
            sketch(specs(*((n, (*s.shape, 2)) for n, s in MLP.items()))),
            "down.weight: expected float32[4, 8] as on the trainer, got float32[4, 8, 2] on the server",
        ),
        (
            sketch(specs(*((n, s.shape) for n, s in MLP.items()), dtype="int8")),
            "down.weight: expected float32[4, 8] as on the trainer, got int8[4, 8] on the server",
        ),
    ],
)
def test_models_that_can_not_be_one(server, why):
    found = unlike([sketch(MLP)], server, complete=True)
    assert found.startswith(why)
    assert bool(found) == bool(why)


@given(held=st.sets(st.sampled_from(sorted(LARGE))), parts=st.integers(1, 4))
def test_whoever_holds_a_part_of_the_model_is_let_in(held, parts):
    """Any subset of the tensors, on servers; and trainer ranks that each hold some layers."""
    names = sorted(LARGE)
    trainers = [sketch({name: LARGE[name] for name in names[rank::parts]}) for rank in range(parts)]
    server = sketch({name: LARGE[name] for name in held})
    assert not unlike(trainers, server, complete=True)


def test_of_large_models_a_sample_is_enough():
    other = specs(
        *((f"blocks.{i}.{what}.kernel", (4, 4)) for i in range(40) for what in ("q", "k", "v", "o", "up"))
    )
    wider = specs(*((name, (8, 8)) for name in LARGE))
    prefixed = specs(*((f"base_model.{name}", spec.shape) for name, spec in LARGE.items()))
    one = sketch(LARGE)
    assert len(one.sample) == m.MAX_SAMPLE < len(LARGE)
    assert "no name in common" in unlike([one], sketch(other), complete=True)
    assert not unlike([one], sketch(other), complete=False), "another trainer rank may hold them"
    assert "so are 64 of 64 names" in unlike([one], sketch(wider), complete=True)
    assert not unlike([one], sketch(prefixed), complete=True)
    assert len(wire.encode(hello(0, 0, tokens=True))[1]) < 1000
    long_names = sketch(specs(*(("x" * 1000 + str(i), (1,)) for i in range(200))))
    assert len(msgspec.msgpack.encode(long_names)) < m.PIECE_BYTES / 4


@pytest.mark.parametrize("first", ["trainer", "server"])
@pytest.mark.parametrize("name", ["", "named"])
def test_unnamed_jobs_of_other_models_are_refused_at_joining(hub, address, first, name):
    """Whichever comes second. Those of a name belong together, and their update says what is wrong."""

    def trainer():
        return weightbus.Publisher(
            [("a", torch.zeros(4, 4))], address=address, job=name, rank=0, size=1, connect_timeout_s=10
        )

    def server():
        # By another name of the host: a session of its own, as of another process.
        other = address.replace("127.0.0.1", "localhost")
        return weightbus.Subscriber(
            [("a", torch.zeros(4, 8))], address=other, job=name, rank=0, replica_size=1, connect_timeout_s=10
        )

    one, other = (trainer, server) if first == "trainer" else (server, trainer)
    with one():
        if name:
            other().close()
            return
        with pytest.raises(weightbus.HubError) as refused:
            other()
    text = str(refused.value)
    for end in ("trainer rank 0 (pid ", "replica 0 server rank 0 (pid "):
        assert f"{end}{os.getpid()} on {identity.host_name()}, started 20" in text
    assert "a: expected float32[4, 4] as on the trainer, got float32[4, 8] on the server" in text
    assert "WEIGHTBUS_JOB" in text


def _update(rank, size, *, address, job):
    with weightbus.Publisher(net(1.0), address=address, job=job, join_timeout_s=30) as publisher:
        report = publisher.update(1)
        return str(report), report.processes


def _serve(rank, size, *, address, job):
    with weightbus.Subscriber(net(0.0), address=address, job=job) as subscriber:
        subscriber.serve()
    return os.getpid(), identity.process_started()


@pytest.mark.parametrize("job", ["", "named"])
def test_a_report_names_the_processes_of_both_ends(address, job):
    arguments = {"address": address, "job": job}
    ((text, processes),), ((pid, started),) = run_jobs(
        Job(run=_update, arguments=arguments), Job(run=_serve, arguments=arguments)
    )
    sender, server = processes
    assert (sender.ranks, sender.serves) == ("trainer rank 0", False)
    assert (server.ranks, server.serves, server.pid) == ("replica 0 server rank 0", True, pid)
    assert server.started == pytest.approx(started, abs=1.0)
    assert server.host == identity.host_name()
    assert (f"to pid {pid} on {server.host} since 20" in text) == (not job)


def test_a_process_knows_when_it_started():
    """From the system: not when it first asked, and a child's own."""
    before = time.time()
    code = "import time, weightbus.control.identity as i; time.sleep(1.0); print(i.process_started())"
    started = float(run_python("-c", code).stdout)
    assert before - 1.0 <= started <= time.time() - 0.9


FORKS = """
import os, sys, torch, weightbus
address = sys.argv[1]
source = [("a", torch.zeros(2))]
publisher = weightbus.Publisher(source, address=address, job="parent", rank=0, size=1)
if (child := os.fork()) == 0:
    try:
        with weightbus.Publisher(source, address=address, job="child", rank=0, size=1):
            pass
        try:
            weightbus.Publisher(source, address=address, job="parent", rank=0, size=1, connect_timeout_s=10)
        except weightbus.HubError as error:  # of the hub: the child has no publisher of this job
            os._exit(0 if f"pid {os.getppid()} on" in str(error) else 2)
    finally:
        os._exit(1)
_, status = os.waitpid(child, 0)
publisher.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_process_has_places_of_its_own(hub, address):
    """It takes none of its parent's, and is not kept from one by what its parent has."""
    run = run_python("-c", FORKS, address)
    assert run.returncode == 0, run.stderr
