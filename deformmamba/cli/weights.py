"""weights: lists published weights, verifies files, and downloads from and uploads to the Hub."""

import argparse
import json
from typing import Any

from deformmamba.cli.arguments import add_command, tell


def add(commands: Any) -> None:
    weights = add_command(commands, "weights", _list, "list, show, verify, fetch or publish weights", "weights list")
    kinds = weights.add_subparsers(metavar="list | show | verify | fetch | publish", required=True)
    listing = add_command(kinds, "list", _list, "list all weights", "weights list")
    show = add_command(kinds, "show", _show, "show a model card", "weights show ixi-4x")
    show.add_argument("name", metavar="NAME|PATH|REPO", help="weights to show")
    for made in (listing, show):
        made.add_argument("--json", action="store_true", help="print JSON")
    verify = add_command(kinds, "verify", _verify, "compare files with their hashes", "weights verify ixi-4x")
    verify.add_argument(
        "name", metavar="NAME|PATH|REPO", nargs="*", help="weights to verify (default: all weights in the package)"
    )
    verify.add_argument("--sha256", metavar="HASH", help="expected sha256 of a file that is not published")
    fetch = add_command(
        kinds,
        "fetch",
        _fetch,
        "download weights, optionally into a folder for a machine without internet access",
        "weights fetch org/name --to folder",
    )
    fetch.add_argument("name", metavar="NAME|REPO", help="weights to download; org/repo@commit selects a commit")
    fetch.add_argument(
        "--to", metavar="FOLDER", help="write them to this folder (default: the cache of huggingface_hub)"
    )
    publish = add_command(
        kinds,
        "publish",
        _publish,
        "upload a checkpoint to the Hub",
        "weights publish runs/mine/best.safetensors org/name --dry-run",
    )
    publish.add_argument(
        "source", metavar="DIR|FILE|NAME", help="checkpoint: a folder written by save_pretrained, a file or a name"
    )
    publish.add_argument("repo", metavar="ORG/NAME", help="repository; created if it does not exist")
    publish.add_argument(
        "--license", metavar="ID", help="licence, such as cc-by-4.0; required if the checkpoint has none"
    )
    publish.add_argument("--private", action="store_true", help="create a new repository as private")
    publish.add_argument(
        "--dry-run", action="store_true", help="print the files that would be uploaded, and send nothing"
    )


def _list(args: argparse.Namespace) -> None:
    from deformmamba.weights import list_weights, manifest

    entries = list_weights()
    if args.json:
        tell(json.dumps(entries))
        return
    for entry in entries:
        size = f"{entry['parameters'] / 1e6:6.2f} M parameters  {entry['size'] / 1e6:6.2f} MB"
        tell(f"{entry['name']:16} {entry['scale']}x  {size}  {entry['summary']}")
    for name, plan in manifest()["planned"].items():
        tell(f"{name:16} planned: {plan['why']}")


def _show(args: argparse.Namespace) -> None:
    from deformmamba.weights import describe, load_checkpoint, manifest, weights_entry

    known = manifest()
    if args.name in {**known["weights"], **known["planned"]}:
        facts = weights_entry(args.name)
    else:
        read = load_checkpoint(args.name)
        about = {"name": args.name, "class": read.class_name, "config": read.config, "sha256": read.sha256}
        facts = {**about, "provenance": read.provenance}
    for line in (json.dumps(facts, indent=2) if args.json else describe(args.name)).splitlines():
        tell(line)


def _verify(args: argparse.Namespace) -> None:
    from deformmamba.weights import list_weights, verify

    for name in args.name or [entry["name"] for entry in list_weights() if not entry["repo"]]:
        tell(f"{name}: ok, sha256 {verify(name, sha256=args.sha256)}")


def _fetch(args: argparse.Namespace) -> None:
    from deformmamba.weights import fetch

    tell(f"{args.name}: verified, {fetch(args.name, args.to)}")
    if args.to:
        tell(f"copy the folder to the other machine and run: deformmamba upscale scan.nii.gz --model {args.to} -o ...")


def _publish(args: argparse.Namespace) -> None:
    from deformmamba.weights import publish

    made = publish(args.source, args.repo, license=args.license, dry_run=args.dry_run, private=args.private)
    for name, (size, sha256) in made.files.items():
        tell(f"{'would upload' if args.dry_run else 'uploaded'} {name:18} {size:10d} bytes  sha256 {sha256}")
    if args.dry_run:
        tell(f"nothing was sent to {made.repo}; leave --dry-run out to send it")
    else:
        tell(f"published {made.repo}@{made.revision}")
