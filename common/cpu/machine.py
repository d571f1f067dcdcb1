"""What this computer is: processor name, cores this process may use, memory.

Only the standard library is used, so that asking costs milliseconds. Every reader takes the place it reads from as an
argument, for tests.
"""

import functools
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63


@functools.cache
def cpu_name():
    """The processor's marketing name, such as ``"AMD EPYC"``; the architecture where the system does not tell it."""
    found = ""
    if sys.platform.startswith("linux"):
        found = _name_from_cpuinfo(_read("/proc/cpuinfo"))
    elif sys.platform == "darwin":
        found = _command_output("sysctl", "-n", "machdep.cpu.brand_string")
    found = found or platform.processor() or platform.machine() or "unknown"
    # "Intel(R) Xeon(R) CPU @ 2.20GHz" -> "Intel Xeon"
    found = re.sub(r"\((R|TM|tm)\)|\bCPU\b|@.*$", " ", found)
    return " ".join(found.split())


def cpu_count():
    """How many cores this process may keep busy (int, at least 1).

    The smallest of: the cores of the machine, the process's affinity mask (``taskset``), and the CPU quota of its
    control group (``docker --cpus``), rounded up.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cgroup_cpu_quota()
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    return max(1, cores)


def device_name():
    """The name the CPU backend gives its one device, such as ``"CPU (AMD EPYC, 2 cores)"``."""
    cores = cpu_count()
    return f"CPU ({cpu_name()}, {cores} core{'' if cores == 1 else 's'})"


def memory_info():
    """``(free, total)`` bytes of memory for this process, the control group's limit included.

    ``free`` counts memory the system can hand out without swapping (caches included).
    Raises ``NotImplementedError`` where the system's way of telling is not known.
    """
    if sys.platform.startswith("linux"):
        free, total = _memory_from_meminfo(_read("/proc/meminfo"))
        limit = cgroup_memory_limit()
        if limit is not None:
            limit_free, limit_total = limit
            free, total = min(free, limit_free), min(total, limit_total)
    elif sys.platform == "darwin":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = _free_from_vm_stat(_command_output("vm_stat"))
    elif sys.platform == "win32":
        free, total = _memory_from_windows()
    else:
        raise NotImplementedError(f"no way known to ask {sys.platform!r} for its free memory")
    return free, total


def cgroup_cpu_quota(membership="/proc/self/cgroup", root=CGROUP_ROOT):
    """The CPU quota of this process's control groups in cores (float), or None where there is none."""
    quotas = []
    for directory, version in _cgroup_directories("cpu", membership, root):
        if version == 2:
            quota, _, period = _read(directory / "cpu.max").strip().partition(" ")
        else:
            quota = _read(directory / "cpu.cfs_quota_us").strip()
            period = _read(directory / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # "max" and "-1" mean no quota
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def cgroup_memory_limit(membership="/proc/self/cgroup", root=CGROUP_ROOT):
    """``(free, limit)`` bytes under the tightest memory limit of this process's control groups, or None."""
    limits = []
    for directory, version in _cgroup_directories("memory", membership, root):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read(directory / name).strip() for name in names)
        if limit.isdigit() and used.isdigit() and int(limit) < UNLIMITED:
            limits.append((max(0, int(limit) - int(used)), int(limit)))
    return min(limits, default=None)


def _cgroup_directories(controller, membership, root):
    """Every directory whose limits apply: the process's own group and its parents, as ``(directory, version)``."""
    for line in _read(membership).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base, version = Path(root), 2
        elif controller in controllers.split(","):
            base, version = Path(root) / controllers, 1
            if not base.is_dir():  # often mounted by the plain controller name
                base = Path(root) / controller
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for length in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:length]), version


def _read(path):
    """The text of a small system file, or "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _command_output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _name_from_cpuinfo(text):
    match = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


def _memory_from_meminfo(text):
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if "MemTotal" not in kib:
        raise NotImplementedError("/proc/meminfo does not name MemTotal")
    free = kib.get("MemAvailable", kib.get("MemFree", 0))
    return free * 1024, kib["MemTotal"] * 1024


def _free_from_vm_stat(text):
    page = re.search(r"page size of (\d+) bytes", text)
    pages = {key: int(value) for key, value in re.findall(r"^Pages ([\w ]+):\s+(\d+)\.$", text, re.MULTILINE)}
    if page is None or "free" not in pages:
        raise NotImplementedError("vm_stat does not name the free pages")
    return int(page.group(1)) * (pages["free"] + pages.get("inactive", 0) + pages.get("speculative", 0))


def _memory_from_windows():
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("total", "free", "page_total", "page_free", "virtual_total", "virtual_free", "extended")
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise NotImplementedError("GlobalMemoryStatusEx failed")
    return status.free, status.total
