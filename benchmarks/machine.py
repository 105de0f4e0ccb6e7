"""The machine: its cores, its limits, its memory, and what may be told of it."""

import os
import platform
import re
import resource
import sys
from importlib import metadata
from pathlib import Path

import msgspec

# Without these, glibc maps and unmaps the 256 KiB that asyncio receives into at every `recv`, or does not, by accident
# of what was imported: it moves plain aiohttp by a fifth.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_TOP_PAD_": "16777216",
}
# LiteLLM: no list of prices from the network, and no limit of connections, as for all. 0 leaves aiohttp's own of 100.
PEERS = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "AIOHTTP_CONNECTOR_LIMIT": "1000000",
    "AIOHTTP_CONNECTOR_LIMIT_PER_HOST": "0",
}
# What would lead a run elsewhere, slow it, or make an import compile anew.
_LEFT_OUT = re.compile(
    r"(?i)(https?|all)_proxy|python(asynciodebug|devmode|dontwritebytecode|warnings|malloc|tracemalloc)"
)
FILES = 10_200  # descriptors that 10,000 connections take, and some for the process itself


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What is published of a machine. No name of it, and no path on it."""

    cpu: str
    cores: int
    kernel: str
    pinned: bool
    files: int


def environment() -> dict[str, str]:
    """The environment of every process that is measured."""
    kept = {name: value for name, value in os.environ.items() if not _LEFT_OUT.fullmatch(name)}
    return kept | ALLOCATOR | PEERS


def cores() -> list[int]:
    """The cores this process may run on; none where the platform cannot pin."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def server_and_client() -> tuple[int | None, int | None]:
    """A core for the server and one for the client, or none for both where there are no two."""
    every = cores()
    return (every[0], every[-1]) if len(every) > 1 else (None, None)


def pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


def allow_files() -> int:
    """Raise the limit of open files as far as the system lets us, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    wanted = max(soft, FILES) if unlimited else hard
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def cpu() -> float:
    """CPU seconds this process used, in the user's code and in the kernel."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak() -> int:
    """The most memory this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """Memory this process has now, in bytes; the most it had where the platform does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return peak()
    return pages * resource.getpagesize()


def describe() -> Machine:
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1] if found else model
    except OSError:
        pass
    version = re.match(r"[\d.]*\d", platform.release())  # what follows it names who built the kernel
    return Machine(
        cpu=model,
        cores=len(cores()) or os.cpu_count() or 1,
        kernel=f"{platform.system()} {version[0] if version else ''}".strip(),
        pinned=server_and_client()[0] is not None,
        files=allow_files(),
    )


def versions(distributions: list[str]) -> dict[str, str]:
    """The versions of what is installed of these."""
    found: dict[str, str] = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
