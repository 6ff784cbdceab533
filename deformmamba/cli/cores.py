"""Number of threads that a command may use, from the CPU affinity of the process and the quota of its container."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def affinity() -> int:
    """The number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> float:
    """The CPU time that the control groups of this process allow, in CPUs; infinity without a limit.

    Version 2 stores "quota period" or "max period" in `cpu.max`, version 1 the two numbers in two files. The limits of
    all groups from the process's group up to the root apply. In a container the root is the container's group.
    """
    limit = math.inf
    for folder in _groups(root, own):
        try:
            if (folder / "cpu.max").is_file():
                allowed, period = (folder / "cpu.max").read_text("ascii").split()
            else:
                allowed, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text("ascii").strip() for name in ("quota", "period")
                )
            if allowed not in ("max", "-1"):
                limit = min(limit, int(allowed) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # missing, or in an unknown format
            continue
    return limit


def _groups(root: Path, own: Path) -> list[Path]:
    """The folders of the control groups of the process, and of all their parent groups."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    found = [root, root / "cpu"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "cpu" in controllers.split(","):
            folder = (root if not controllers else root / "cpu") / path.lstrip("/")
            found += [folder, *(parent for parent in folder.parents if root in parent.parents)]
    return found


def allowed_threads() -> int:
    """The number of CPUs for this process, rounded up, at least 1."""
    return max(1, min(affinity(), math.ceil(quota()) if quota() < math.inf else affinity()))


def use_threads(n: int | None) -> int | None:
    """Lets PyTorch and the kernels of this package use `n` threads; None: as many as affinity and quota allow.

    Without `n`, a number in OMP_NUM_THREADS is used. Returns the new number, or None if nothing was changed.
    """
    import sys

    if n is None:
        if os.environ.get("OMP_NUM_THREADS") or allowed_threads() >= affinity():
            return None
        n = allowed_threads()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)
    else:  # the libraries read these variables on import
        os.environ.update(dict.fromkeys(VARIABLES, str(n)))
    return n


def limit_spinning() -> None:
    """Lets PyTorch's OpenMP threads sleep soon after each operation instead of spinning for milliseconds.

    On a shared machine, a spinning thread occupies the core that a working thread needs. A setting of the user is kept.
    The library reads the variable when it is loaded, so call this before `import torch`.
    """
    import sys

    if "torch" not in sys.modules and not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = "1000"
