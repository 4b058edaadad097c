"""What processes use, from Linux's /proc; nothing is told of systems without it.

A server is a tree of processes: PostgreSQL has one for each connection. Those that have ended are in their parents'
sums.
"""

import os
from collections.abc import Mapping
from pathlib import Path

PROC = Path("/proc")


def find_tree(root: int) -> list[int]:
    """The process and all its descendants."""
    tree = [root]
    for pid in tree:
        for children in (PROC / str(pid) / "task").glob("*/children"):
            try:
                tree += [int(child) for child in children.read_text().split()]
            except OSError:
                continue  # it has ended
    return tree


def cpu_seconds(root: int) -> float:
    """Processor time that a tree of processes has used so far, its own and the system's for it."""
    ticks = 0
    for pid in find_tree(root):
        try:
            # After the name, which may hold anything: state is the third field, utime to cstime are 14 to 17.
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_bytes(root: int) -> int:
    """The most memory that the process itself had resident at once."""
    return _read_kilobytes(PROC / str(root) / "status", "VmHWM:") * 1024


def shared_out_bytes(root: int) -> int:
    """The memory that a tree of processes has resident now, each shared page counted once."""
    return sum(_read_kilobytes(PROC / str(pid) / "smaps_rollup", "Pss:") for pid in find_tree(root)) * 1024


def cpu_of(processes: Mapping[str, int]) -> dict[str, float]:
    """The processor time of each tree of processes, by its name."""
    return {name: cpu_seconds(root) for name, root in processes.items()}


def _read_kilobytes(file: Path, label: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(label)), 0)
