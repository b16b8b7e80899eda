"""What an operator asks from a shell: ``weightbus status``, ``check`` and the like. Imports no torch.

Exit status: 0 if it was done and found right, 1 if not, 2 if no hub answers or the call is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weightbus.control import client_messages as a
from weightbus.control import messages as m
from weightbus.control.client import Client
from weightbus.control.keys import generate, retire, rotate
from weightbus.errors import WeightbusError
from weightbus.tools.timeline import chrome_trace, plot

WAIT_S = 600.0


def main(command: str, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"weightbus {command}", description=COMMANDS[command])
    if command == "keygen":
        parser.add_argument("directory", help="where to write; made if need be")
        parser.add_argument("--client", default="client", help="name of the client whose keys are made")
        roles = ("trainer", "server", "client", "status")
        parser.add_argument("--role", choices=roles, default="", help="all that the key is good for; else all")
        steps = parser.add_mutually_exclusive_group()
        steps.add_argument("--rotate", metavar="NAME", help="a new key for this client, or for the hub: hub")
        steps.add_argument("--retire", metavar="NAME", help="strike the older keys of this client, or of hub")
    else:
        parser.add_argument("--address", help="the hub's, tcp://host:port; else WEIGHTBUS_ADDRESS")
        parser.add_argument("--job", help="whose; else WEIGHTBUS_JOB")
        parser.add_argument("--keys", metavar="DIR", help="CURVE keys; else WEIGHTBUS_KEYS")
        parser.add_argument("--insecure", action="store_true", help="without keys to any address")
    if command in ("status", "check", "update", "set-version", "pause", "resume"):
        parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    if command in ("check", "update", "set-version"):
        parser.add_argument(
            "--wait", type=float, default=WAIT_S, metavar="SECONDS", help="for the trainer to run it"
        )
    if command == "status":
        parser.add_argument("--watch", action="store_true", help="again each second, until interrupted")
        parser.add_argument("--past", type=int, default=1, help="how many of the last updates, 16 at most")
    elif command == "update":
        parser.add_argument("--version", type=int, help="default: the next one")
        parser.add_argument("--module", action="append", dest="modules", help="only this one; may be repeated")
        parser.add_argument("--no-verify", action="store_true", help="without digests")
    elif command == "set-version":
        parser.add_argument("version", type=int)
    elif command == "pause":
        parser.add_argument("--for", type=float, default=600.0, dest="for_s", metavar="SECONDS", help="at most")
    elif command == "timeline":
        parser.add_argument(
            "file", help="NAME.json: Chrome trace of the last updates; NAME.png: plot of the last"
        )
        parser.add_argument("--past", type=int, default=16, help="how many of the last updates, 16 at most")
    elif command == "metrics":
        parser.add_argument(
            "--port", type=int, help="serve them at http://127.0.0.1:PORT/metrics; else print once"
        )
    options = parser.parse_args(arguments)
    try:
        if command == "keygen":
            if options.rotate or options.retire:
                step = rotate if options.rotate else retire
                written = step(options.directory, options.rotate or options.retire)
            else:
                written = generate(options.directory, options.client, options.role)
            print(*written, sep="\n")
            return 0
        with Client(
            options.address,
            job=options.job,
            keys=options.keys,
            insecure=options.insecure,
            on_wait=_say_that_it_waits,
        ) as client:
            return RUN[command](client, options)
    except (WeightbusError, OSError) as error:
        print(f"weightbus {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _say_that_it_waits(reason: str) -> None:
    print(reason, file=sys.stderr)


# -- status ----------------------------------------------------------------------------------------


def _status(client: Client, options: argparse.Namespace) -> int:
    if options.watch:
        with Live(console=Console(), auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
            while True:
                try:
                    live.update(_tables(client, options), refresh=True)
                except WeightbusError as error:
                    live.update(Text(str(error)), refresh=True)
                time.sleep(1.0)
    if options.json:
        print(json.dumps(msgspec.to_builtins(client.status(options.past))))
    else:
        Console().print(_tables(client, options))
    return 0


def _tables(client: Client, options: argparse.Namespace) -> RenderableType:
    """Of the job that was asked for; where none was, of all that have ranks here."""
    status = client.status(options.past)
    others = [job for job in status.jobs if job != status.job] if not client.job else []
    mine = [status] if status.peers or not others else []
    return Group(*map(status_table, [*mine, *(client.status(options.past, job=job) for job in others)]))


def status_table(status: a.Status) -> RenderableType:
    """Ranks as a table, with what is going on and what went before."""
    version = "none" if status.version is None else status.version
    job = f"job {status.job}" if status.job else "job without a name"
    head = f"{job}, incarnation {status.incarnation}, version {version}, epoch {status.epoch},"
    head += f" {len(status.peers)} ranks, hub up {status.up_s:.0f} s"
    if status.incomplete:
        head += f", incomplete replicas: {', '.join(map(str, status.incomplete))}"
    if status.paused_s:
        head += f", updates paused for {status.paused_s:.0f} s"
    if status.requests:
        head += f", {status.requests} requests wait for the trainer"
    table = Table(title=Text(head), title_justify="left")
    for column in ("rank", "state", "version", "host", "pid", "device", "heard s ago"):
        table.add_column(column, justify="right" if column in ("version", "pid", "heard s ago") else "left")
    for peer in status.peers:
        version = "" if peer.version is None else str(peer.version)
        cells = (peer.rank, peer.state, version, peer.host, str(peer.pid), peer.device, f"{peer.heard_s:.1f}")
        table.add_row(*map(Text, cells))
    lines = [f"going on: {status.phase}"] if status.phase else []
    lines += [f"  waits for {line}" for line in status.missing]
    for past in status.past:
        lines.append(_past_line(past))
        lines += [f"  {_failure_line(failure)}" for failure in past.failures]
    counts = ", ".join(f"{what} {count}" for what, count in sorted(status.counts.items()) if count)
    return Group(table, Text("\n".join([*lines, f"hub: {counts}"])))


def _past_line(past: a.Past) -> str:
    line = f"last {past.kind} {past.version}: {past.verdict} on {past.servers} server ranks"
    line += f" in {past.seconds:.3f} s"
    if past.nbytes:
        line += f", {past.nbytes} bytes"
    slowest: dict[str, float] = {}
    for times in past.ranks:
        for stage, seconds in times.stages.items():
            slowest[stage] = max(slowest.get(stage, 0.0), seconds)
    if slowest:
        line += "; slowest rank's ms: " + ", ".join(f"{k} {v * 1e3:.1f}" for k, v in slowest.items())
    return line


def _failure_line(failure: m.Failure) -> str:
    return f"{failure.rank}: {failure.tensor or ''}{': ' if failure.tensor else ''}{failure.reason}"


# -- requests --------------------------------------------------------------------------------------


def _answered(answer: a.Answer, options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(msgspec.to_builtins(answer)))
        return 0 if answer.ok else 1
    head = answer.reason or (
        f"{answer.verdict} version {answer.version} on {answer.servers} server ranks in {answer.seconds:.3f} s"
    )
    # A line each, as long as it is: in a table's narrow columns no place could be read in one piece.
    lines = [head, *map(str, answer.failures), *(f"{name}: not proved: {why}" for name, why in answer.partial)]
    for line in lines:
        Console(soft_wrap=True).print(Text(line))
    return 0 if answer.ok else 1


def _timeline(client: Client, options: argparse.Namespace) -> int:
    past = client.status(options.past).past
    if not past:
        print("no update so far", file=sys.stderr)
        return 1
    if options.file.endswith(".json"):
        with open(options.file, "w") as file:
            json.dump(chrome_trace(past), file)
    else:
        plot(next((p for p in reversed(past) if p.kind == "update"), past[-1]), options.file)
    return 0


def _metrics(client: Client, options: argparse.Namespace) -> int:
    from weightbus.tools.metrics import prometheus_text, serve_metrics  # here, as no other command needs it

    if options.port is None:
        print(prometheus_text(client.status()), end="")
        return 0
    with serve_metrics(client.status, options.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/metrics", flush=True)
        server.serve_forever()
    return 0


RUN: dict[str, Callable[[Client, argparse.Namespace], int]] = {
    "status": _status,
    "check": lambda client, options: _answered(client.check(wait_s=options.wait), options),
    "update": lambda client, options: _answered(
        client.update(
            options.version, modules=options.modules, verify=not options.no_verify, wait_s=options.wait
        ),
        options,
    ),
    "set-version": lambda client, options: _answered(
        client.set_version(options.version, wait_s=options.wait), options
    ),
    "pause": lambda client, options: _answered(client.pause(options.for_s), options),
    "resume": lambda client, options: _answered(client.resume(), options),
    "timeline": _timeline,
    "metrics": _metrics,
}

COMMANDS = {
    "status": "ranks, states, versions, the last update",
    "check": "digest every live shard and compare; the trainer runs it at its next poll() or update()",
    "update": "publish the trainer's weights at its next poll()",
    "set-version": "what is live counts as this version, at the trainer's next poll() or update()",
    "pause": "hold updates back for a while",
    "resume": "let updates go on",
    "timeline": "when each rank did what in the last updates: Chrome trace or plot",
    "metrics": "the hub's state for Prometheus",
    "keygen": "make CURVE keys for a hub and its clients",
}
