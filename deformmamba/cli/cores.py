"""Threads of a command: how many, from CPU affinity, quota and idle CPUs, and how they share CPUs with others."""

import ctypes
import math
import os
import platform
import struct
import sys
import time
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
    limit = quota()
    return max(1, min(affinity(), math.ceil(limit)) if limit < math.inf else affinity())


def idle_cpus(seconds: float = 0.2, stat: Path = Path("/proc/stat")) -> float:
    """How many of the CPUs of this process are idle, measured for `seconds`; all of them where Linux does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return affinity()

    def times() -> dict[str, tuple[int, int]]:
        found = {}
        for line in stat.read_text("ascii").splitlines():
            name, *numbers = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in os.sched_getaffinity(0):
                user, nice, system, idle, waiting, *rest = map(int, numbers[:8])
                found[name] = idle + waiting, user + nice + system + idle + waiting + sum(rest)
        return found

    try:
        before = times()
        time.sleep(seconds)
        after = times()
    except (OSError, ValueError):
        return affinity()
    shares = ((after[name][0] - idle) / max(after[name][1] - all_, 1) for name, (idle, all_) in before.items())
    return sum(shares) if before else affinity()


def use_threads(n: int | None, idle_only: bool = False) -> int | None:
    """Lets PyTorch and the kernels of this package use `n` threads; None: as many as affinity and quota allow.

    With `idle_only`, None is as many as there are idle CPUs now, at least 1. It is for commands with one operation
    after the other on all threads: each operation takes as long as its slowest thread. Without `n`, a number in
    OMP_NUM_THREADS is used. Returns the new number, or None if nothing was changed.
    """
    if n is None:
        if os.environ.get("OMP_NUM_THREADS"):
            return None
        n = allowed_threads()
        if idle_only and n > 1 and "torch" not in sys.modules:
            n = max(1, min(n, round(idle_cpus() - 0.25)))
        if n >= affinity():
            return None
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)
    else:  # the libraries read these variables on import
        os.environ.update(dict.fromkeys(VARIABLES, str(n)))
    return n


def limit_spinning() -> None:
    """Lets PyTorch's OpenMP threads sleep between operations instead of spinning for milliseconds.

    On a shared machine, a spinning thread occupies the core that a working thread needs. A setting of the user is kept.
    The library reads the variable when it is loaded, so call this before `import torch`.
    """
    if "torch" not in sys.modules and not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["OMP_WAIT_POLICY"] = "passive"


SHORT_TURN = 100_000  # ns, the shortest that Linux allows
_SCHEDULING_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr and sched_getattr, without wrappers
_ATTRIBUTES = "=IIQiIQQQII"  # size, policy, flags, nice, priority, runtime, deadline, period, two limits


def take_short_turns() -> bool:
    """Asks Linux to give this thread, and threads that it starts later, short turns; True if the system does so.

    A thread with short turns gets a busy CPU sooner after it slept. Its share of the CPU is unchanged. The other
    threads of an operation wait for the last one, so this shortens every operation on a busy machine. Linux 6.12 and
    later; no effect elsewhere.
    """
    numbers = _SCHEDULING_CALLS.get(platform.machine())
    if sys.platform != "linux" or numbers is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    size, library = struct.calcsize(_ATTRIBUTES), ctypes.CDLL(None)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = struct.pack(_ATTRIBUTES, size, os.SCHED_OTHER, 0, nice, 0, SHORT_TURN, 0, 0, 0, 0)
    library.syscall(numbers[0], 0, wanted, 0)
    return turn_length() == SHORT_TURN


def turn_length() -> int | None:
    """The turn that this thread asked Linux for, in nanoseconds; None for the default or an unknown one."""
    numbers = _SCHEDULING_CALLS.get(platform.machine())
    if sys.platform != "linux" or numbers is None:
        return None
    found = ctypes.create_string_buffer(struct.calcsize(_ATTRIBUTES))
    if ctypes.CDLL(None).syscall(numbers[1], 0, found, len(found), 0):
        return None
    return struct.unpack(_ATTRIBUTES, found.raw)[5] or None
