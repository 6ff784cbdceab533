"""`python -m deformmamba.mamba script.py arguments`: runs a program as Python does, after `install`.

Instead of a script: `-m module`, `-c code`, `-` for the standard input, or a folder or zip file with a `__main__.py`.
"""

import builtins
import importlib.util
import io
import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

from deformmamba.mamba.standin import install

_USAGE = "usage: python -m deformmamba.mamba (script.py | -m module | -c code | -) [arguments]"


def main() -> int:
    """Calls `install`, then runs the program given in sys.argv. Returns 2 if there is no such program."""
    program = sys.argv[1:]
    first = program[0] if program else "-h"
    if first in ("-h", "--help"):
        print(_USAGE, file=sys.stderr)
        return 0 if program else 2
    if first in ("-m", "-c"):
        if len(program) < 2:
            return _refuse(f"{first} needs {'a module' if first == '-m' else 'code'} after it; {_USAGE}")
        return _run_module(program[1:]) if first == "-m" else _run_code(program[1], "<string>", ["-c", *program[2:]])
    if first == "-":
        return _run_code(sys.stdin.buffer.read(), "<stdin>", program)
    if first.startswith("-"):
        return _refuse(f"unknown option {first!r}; {_USAGE} (Python's own options come before -m deformmamba.mamba)")
    return _run_script(program)


def _refuse(message: str) -> int:
    print(f"deformmamba: {message}", file=sys.stderr)
    return 2


def _run_module(program: list[str]) -> int:
    try:
        found = importlib.util.find_spec(program[0])
    except (ModuleNotFoundError, ValueError):  # of a package around it, or a name such as "a..b"
        found = None
    if found is None:
        return _refuse(f"there is no module named {program[0]!r}")
    install()
    sys.argv = program
    runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    return 0


def _run_script(program: list[str]) -> int:
    path = program[0]
    if os.path.isdir(path) or path.endswith((".zip", ".pyz")):
        install()
        sys.argv = program
        if not getattr(sys.flags, "safe_path", False):
            del sys.path[0]  # run_path puts the folder itself there
        runpy.run_path(path, run_name="__main__")
        return 0
    try:
        with io.open_code(os.path.abspath(path)) as file:
            code = file.read()
    except OSError as error:
        return _refuse(f"cannot open the script {path!r}: {error.strerror}")
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    full = os.path.abspath(path)
    return _run_code(code, full, program, __file__=full, __loader__=SourceFileLoader("__main__", full), __cached__=None)


def _run_code(code: str | bytes, name: str, argv: list[str], **attributes: Any) -> int:
    """Executes the code as the module `__main__`, which stays in sys.modules for threads and exit functions."""
    install()
    sys.argv = argv
    module = ModuleType("__main__")
    module.__dict__.update({"__builtins__": builtins, **attributes})
    sys.modules["__main__"] = module
    exec(compile(code, name, "exec", dont_inherit=True), module.__dict__)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
