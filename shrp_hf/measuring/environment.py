"""Where and with what something ran, without which a time or a score means nothing."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
import transformers

from shrp_hf._version import __version__

INSTRUCTION_SETS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "AVX-512 VNNI": ("avx512_vnni",),
    "AVX VNNI": ("avx_vnni",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AMX": ("amx_tile", "amx_int8"),
    "Neon": ("asimd",),
    "I8MM": ("i8mm",),
    "SVE": ("sve",),
}
"""What decides how fast products are, by the flags with which Linux names it."""


def instruction_sets() -> str:
    """Names what this processor has of `INSTRUCTION_SETS`, or what torch says of it where there is no `/proc/cpuinfo`."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return torch.backends.cpu.get_cpu_capability()
    lines = (line for line in info.read_text().splitlines() if line.lower().startswith(("flags", "features")))
    flags = set(next(lines, "").partition(":")[2].split())
    return ", ".join(name for name, needed in INSTRUCTION_SETS.items() if flags.issuperset(needed)) or "none of those known"


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """Describes the machine, the versions and the day: `machine`, perhaps `gpu`, `python`, `torch`, ..., `date`."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "machine": f"{os.cpu_count()} x {cpu}",
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shrp_hf": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def command_line() -> str:
    """Returns the command that started this process, without the folder of the program, quoted for a shell."""
    program = Path(sys.argv[0]).name
    return shlex.join(["shrp-hf" if program == "__main__.py" else program, *sys.argv[1:]])
