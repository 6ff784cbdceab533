"""Provenance of a result: the hardware, and the commit of the package."""

import platform
import subprocess
from pathlib import Path

import torch

from deformmamba.errors import counted


def hardware() -> str:
    """The accelerator, or the processor and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    n = torch.get_num_threads()
    return f"{name}, {counted(n, 'thread')}"


def commit() -> str | None:
    """The commit of the checkout that this file is tracked in, with "+changes" if there are any; None outside a
    checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--error-unmatch", here.name):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "") or None
    except (OSError, subprocess.SubprocessError):  # git is not installed
        return None
