"""Where and with what something ran, without which a time or a score means nothing."""

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
import transformers

from shrp_hf._version import __version__


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
