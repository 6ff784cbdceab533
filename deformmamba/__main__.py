"""`python -m deformmamba`: the same as the command `deformmamba`."""

from deformmamba.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
