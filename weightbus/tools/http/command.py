"""``weightbus http``: the routes as a server of their own."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from weightbus.errors import WeightbusError
from weightbus.tools.http.app import DEFAULT_BODY_BYTES, DEFAULT_PORT, TOKEN_VARIABLE, create_app
from weightbus.tools.http.guard import is_loopback
from weightbus.tools.http.server import serve


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="weightbus http", description=__doc__)
    parser.add_argument("--hub", metavar="ADDRESS", help="of the hub; else WEIGHTBUS_ADDRESS")
    parser.add_argument("--job", help="whose ranks; else WEIGHTBUS_JOB")
    parser.add_argument("--keys", metavar="DIR", help="CURVE keys; else WEIGHTBUS_KEYS")
    parser.add_argument("--insecure", action="store_true", help="without keys to any address")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on; others than loopback need a token")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument(
        "--name", action="append", default=[], help="of this host, in requests without a token; may be repeated"
    )
    parser.add_argument("--replica", type=int, help="whose ranks to serve; by default the only one")
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        help="where models may be loaded from; may be repeated",
    )
    parser.add_argument("--max-body", type=int, default=DEFAULT_BODY_BYTES, metavar="BYTES")
    parser.add_argument(
        "--run-timeout", type=float, default=600.0, metavar="SECONDS", help="of each step of a load"
    )
    options = parser.parse_args(arguments)
    token = os.environ.get(TOKEN_VARIABLE)
    if token is not None and not token.strip():
        print(f"weightbus http: {TOKEN_VARIABLE}: expected a token, got an empty one", file=sys.stderr)
        return 2
    if not is_loopback(options.host) and token is None:
        print(
            f"weightbus http: {options.host}: expected a loopback address, or a token in {TOKEN_VARIABLE}",
            file=sys.stderr,
        )
        return 2
    try:
        app = create_app(
            options.hub,
            job=options.job,
            keys=options.keys,
            insecure=options.insecure,
            replica=options.replica,
            token=token,
            hosts=options.name,
            roots=options.root,
            max_body_bytes=options.max_body,
            run_s=options.run_timeout,
        )
    except WeightbusError as error:
        print(f"weightbus http: {error}", file=sys.stderr)
        return 2
    serve(app, options.host, options.port)
    return 0
