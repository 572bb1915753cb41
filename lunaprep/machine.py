"""What this machine has: cores, memory, disk."""

import os
import shutil
from pathlib import Path


def available_bytes() -> int | None:
    """Memory free for new work on this machine, bytes; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def default_workers() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_disk_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which need not exist yet, bytes."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
