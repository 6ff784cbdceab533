"""`python -m deformmamba.mamba script.py arguments` (or `-m module arguments`): the program, with the stand-ins."""

import runpy
import sys

from deformmamba.mamba.standin import install


def main() -> int:
    """Calls `install`, then runs the program given in sys.argv as Python would."""
    program = sys.argv[1:]
    as_module = program[:1] == ["-m"]
    program = program[1:] if as_module else program
    if not program or program[0] in ("-h", "--help"):
        print("usage: python -m deformmamba.mamba [-m] program [arguments]", file=sys.stderr)
        return 0 if program else 2
    sys.argv = program
    install()
    if as_module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = program[0].rpartition("/")[0] or "."
        runpy.run_path(program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
