"""Runs the fast tests as other processors would: `python -m tests.processors` (`make test-processors`).

Each setting first shows that it took effect: that a product of two float32 matrices has other bits, or why it cannot have.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "as-it-is": {},
    "avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "sse4": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "one-thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
}
NEWEST = "newest"  # this program started by another environment's Python


def probe() -> dict[str, str | int | bool]:
    """What this process computes with, and the bits of a few float32 operations."""
    import torch

    def bits(values: torch.Tensor) -> str:
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:12]

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((96, 384), (384, 1536)))
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "product": bits(a @ b),
        "softmax": bits(a.softmax(dim=-1)),
        "gelu": bits(torch.nn.functional.gelu(a)),
    }


def effect(name: str, found: dict, plain: dict) -> str:
    """Says how a setting shows.

    Args:
        name: The setting.
        found: Its `probe`.
        plain: That of "as-it-is".

    Raises:
        RuntimeError: It does not show, though this processor could tell.
    """
    if name == "as-it-is":
        return f"torch {found['torch']}, {found['capability']}, {found['threads']} threads"
    if name == NEWEST:
        same = "the same as" if found["torch"] == plain["torch"] else "not"
        return f"torch {found['torch']}, {same} {plain['torch']}"
    if name == "one-thread":
        if found["threads"] != 1:
            raise RuntimeError(f"{name}: torch still has {found['threads']} threads.")
        return "torch.get_num_threads() is 1"
    other = [kind for kind in ("product", "softmax", "gelu") if found[kind] != plain[kind]]
    if "product" in other:
        return f"other bits in a product of float32 matrices (and in {', '.join(other[1:]) or 'nothing else'})"
    if other:
        return f"the SAME bits in a product: MKL has one kernel for both on this processor; other bits in {', '.join(other)}"
    if plain["capability"] != "AVX512" or not plain["mkl"]:
        return f"IDENTICAL to as-it-is: nothing to leave out on this processor ({plain['capability']}, MKL: {plain['mkl']})"
    raise RuntimeError(f"{name}: took no effect, every result has the same bits as without it.")


def probed(python: str, variables: dict[str, str]) -> dict:
    """The `probe` of a fresh process."""
    command = [python, "-m", "tests.processors", "--probe"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Runs the settings one after the other; returns the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probe", action="store_true", help="print what this process computes with")
    parser.add_argument("--settings", nargs="*", choices=(*SETTINGS, NEWEST), help="default: all, newest where given")
    parser.add_argument("--newest", help="Python of an environment with the newest torch")
    parser.add_argument("--workers", default="2", help="processes of pytest, one in one-thread")
    parser.add_argument("tests", nargs="*", help="default: the fast tests")
    words = parser.parse_args()
    if words.probe:
        sys.stdout.write(json.dumps(probe()) + "\n")
        return 0
    plain, failed = probed(sys.executable, {}), []
    for name in words.settings or [*SETTINGS, *([NEWEST] if words.newest else [])]:
        python = (words.newest or sys.executable) if name == NEWEST else sys.executable
        variables = SETTINGS.get(name, {})
        try:
            sys.stdout.write(f"== {name}: {effect(name, probed(python, variables), plain)}\n")
        except RuntimeError as error:
            sys.stdout.write(f"== {error}\n")
            failed.append(name)
            continue
        sys.stdout.flush()
        workers = [] if name == "one-thread" else ["-n", words.workers, "--dist", "loadfile"]
        tests = [python, "-m", "pytest", "-q", *workers, *words.tests]
        if subprocess.run(tests, cwd=ROOT, env=os.environ | variables, check=False).returncode:
            failed.append(name)
    sys.stdout.write(f"== {'failed: ' + ', '.join(failed) if failed else 'all settings passed'}\n")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
