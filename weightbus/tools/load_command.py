"""``weightbus update-from-disk``: have a replica's ranks load a checkpoint, and say how it ended."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from weightbus.control.client import Client
from weightbus.errors import WeightbusError
from weightbus.report import unproved_lines


def main(arguments: list[str]) -> int:
    """0: loaded on all ranks. 1: refused or failed, as the text says. 2: no hub answers."""
    parser = argparse.ArgumentParser(prog="weightbus update-from-disk", description=__doc__)
    parser.add_argument(
        "path", type=Path, help="directory, safetensors or index file that all ranks of the replica read"
    )
    parser.add_argument("--hub", metavar="ADDRESS", help="of the hub; else WEIGHTBUS_ADDRESS")
    parser.add_argument("--job", help="whose; else WEIGHTBUS_JOB")
    parser.add_argument("--keys", metavar="DIR", help="CURVE keys; else WEIGHTBUS_KEYS")
    parser.add_argument("--insecure", action="store_true", help="without keys to any address")
    parser.add_argument("--replica", type=int, help="whose ranks; by default the only complete one's")
    parser.add_argument("--module", action="append", metavar="NAME", help="by default all; may be repeated")
    parser.add_argument("--version", type=int, help="label; by default what the directory records")
    parser.add_argument(
        "--atomic", action="store_true", help="read all into host memory before the first write"
    )
    parser.add_argument("--no-verify", action="store_true", help="leave the directory's digest list alone")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of each step")
    options = parser.parse_args(arguments)
    path = os.path.abspath(options.path)
    try:
        with Client(options.hub, job=options.job, keys=options.keys, insecure=options.insecure) as client:
            end = client.update_from_disk(
                path,
                replica=options.replica,
                modules=options.module,
                version=options.version,
                atomic=options.atomic,
                verify=not options.no_verify,
                timeout_s=options.timeout,
            )
    except WeightbusError as error:
        print(f"weightbus update-from-disk: {error}", file=sys.stderr)
        return 2
    if not end.ok:
        head = "failed, ranks may hold a mixture" if end.moved else "refused, nothing was written"
        print("\n  ".join([f"{path}: {head}", *map(str, end.failures)]), file=sys.stderr)
        return 1
    label = "" if end.version is None else f" version {end.version}"
    head = f"{end.verdict} load{label} of {path} on {end.ranks} ranks in {end.seconds:.3f} s"
    print("\n  ".join([head, *unproved_lines(end.partial)]))
    return 0
