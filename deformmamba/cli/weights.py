"""weights: what is published, and whether a file is what was published."""

import argparse
import json
from typing import Any

from deformmamba.cli.arguments import add_command, say


def add(commands: Any) -> None:
    weights = add_command(commands, "weights", _weights_list, "list, show or verify published weights", "weights list")
    kinds = weights.add_subparsers(metavar="list | show | verify", required=True)
    listing = add_command(kinds, "list", _weights_list, "what there is", "weights list")
    show = add_command(kinds, "show", _weights_show, "the model card of one", "weights show ixi-4x")
    show.add_argument("name", metavar="NAME")
    for made in (listing, show):
        made.add_argument("--json", action="store_true", help="for programs")
    verify = add_command(kinds, "verify", _weights_verify, "compare files with their hashes", "weights verify ixi-4x")
    verify.add_argument("name", metavar="NAME", nargs="*", help="default: all")


def _weights_list(args: argparse.Namespace) -> None:
    from deformmamba.weights import list_weights, manifest

    entries = list_weights()
    if args.json:
        say(json.dumps(entries))
        return
    for entry in entries:
        say(f"{entry['name']:16} {entry['scale']}x  {entry['parameters'] / 1e6:6.2f} M parameters  {entry['summary']}")
    for name, plan in manifest()["planned"].items():
        say(f"{name:16} planned: {plan['why']}")


def _weights_show(args: argparse.Namespace) -> None:
    from deformmamba.weights import card, weights_entry

    entry = weights_entry(args.name)
    for line in (json.dumps(entry, indent=2) if args.json else card(entry)).splitlines():
        say(line)


def _weights_verify(args: argparse.Namespace) -> None:
    from deformmamba.weights import list_weights, verify

    for name in args.name or [entry["name"] for entry in list_weights()]:
        say(f"{name}: ok, sha256 {verify(name)}")
