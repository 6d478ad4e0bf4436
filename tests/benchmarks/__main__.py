"""One JSON line for each measurement: ``python tests/benchmarks NAME [--small]``; see README.md."""

from __future__ import annotations

import argparse
import importlib
import json

NAMES = ("kernels", "published", "dense_dask", "scaling", "workers", "overhead", "atlas", "pooled", "convert")


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name in NAMES:
        module = importlib.import_module(f"bench_{name}")
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        command.add_argument("--small", action="store_true", help="a size that takes no time, to see that it runs")
        module.options(command)
        command.set_defaults(run=module.run)
    choice = parser.parse_args()
    print(json.dumps(importlib.import_module("harness").machine()), flush=True)
    for record in choice.run(choice):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
