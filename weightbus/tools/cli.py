"""The ``weightbus`` command."""

from __future__ import annotations

import argparse
import sys

import weightbus
from weightbus.hub.__main__ import main as run_hub
from weightbus.tools import load_command, operate


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="weightbus", description=weightbus.__doc__)
    parser.add_argument("--version", action="version", version=f"weightbus {weightbus.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("hub", help="run the hub until it is stopped", add_help=False)
    for name, text in operate.COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("digest", help="digests of the tensors in safetensors files", add_help=False)
    commands.add_parser("update-from-disk", help="have a replica load a checkpoint", add_help=False)
    commands.add_parser("audit", help="an engine's model, updated, beside one loaded anew", add_help=False)
    commands.add_parser("http", help="serve the weight routes of engines", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "hub":
        return run_hub(rest)
    if options.command in operate.COMMANDS:
        return operate.main(options.command, rest)
    if options.command == "digest":
        from weightbus.tools import digest_files  # here, as it imports torch

        return digest_files.main(rest)
    if options.command == "update-from-disk":
        return load_command.main(rest)
    if options.command == "audit":
        from weightbus.tools import audit_command  # here, as it imports torch

        return audit_command.main(rest)
    if options.command == "http":
        try:
            from weightbus.tools.http import command
        except ImportError as error:
            print(f"weightbus http: {error}; cure: pip install 'weightbus[http]'", file=sys.stderr)
            return 2
        return command.main(rest)
    raise AssertionError(options.command)


if __name__ == "__main__":
    raise SystemExit(main())
