"""Writes cli.md, the reference of the command, from the parsers themselves: `python docs/command_line.py`."""

import argparse
from pathlib import Path

from deformmamba.cli import _parser, leaves
from deformmamba.cli.arguments import COMMON

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

<!-- made by `python docs/command_line.py`; a test compares it with the command -->

Results go to stdout, everything else to stderr. The exit code is 0 if all went well, 1 if some scans of a folder
failed, 2 after a user error (one line states what to do), 130 after ctrl-C, 143 after SIGTERM, 129 after SIGHUP, and
141 if the reader of a pipe ends, as `head` does. A half-written file is never left behind.

"""


def page() -> str:
    """The whole page."""
    parser = _parser()
    common = [action for action in parser._actions if set(action.option_strings) & set(COMMON)]
    parts = [HEAD + "## Options of every command\n", _table(common)]
    for leaf in leaves(parser):
        epilog = (leaf.epilog or "").partition("\n")[0]
        actions = [a for a in leaf._actions if a.help != argparse.SUPPRESS and "-h" not in a.option_strings]
        parts += [f"## {leaf.prog}\n", f"{leaf.description}\n"]
        if epilog.startswith("example: "):
            parts.append(f"Example: `{epilog.removeprefix('example: ')}`\n")
        if actions:
            parts.append(_table(actions))
    return "\n".join(parts)


def _table(actions: list[argparse.Action]) -> str:
    rows = ["| argument | meaning |", "|---|---|"]
    for action in actions:
        value = _value(action)
        names = [f"{name} {value}".strip() for name in action.option_strings] or [value]
        text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
        if action.required and action.option_strings:
            text = f"required; {text}" if text else "required"
        cells = (", ".join(f"`{name}`" for name in names), text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _value(action: argparse.Action) -> str:
    """How the value of an argument is called, with dots where several are taken."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.metavar is None and action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    return f"{name} ..." if action.nargs in ("+", "*") else name


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
