"""Optional packages: imported on use; the error for a missing one names the extra that installs it."""

from importlib import import_module
from types import ModuleType

from deformmamba.errors import DeformMambaError


class MissingExtra(DeformMambaError, ImportError):
    """A feature needs a package of an extra that is not installed; the message is one line with the command."""


def require(module: str, *, extra: str, what: str) -> ModuleType:
    """The module `module`, or `MissingExtra`: `what` needs it, and pip install 'deformmamba[`extra`]' installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{what} needs {module.partition('.')[0]} ({error}); install it with: pip install 'deformmamba[{extra}]'"
        ) from None
