"""Five demos from scratch, one seed a setting of `tests.processors`: `python -m experiments.demos --output out/demos`.

Writes `demos.md`: accuracy of dense, routed and static, and the minutes that each took. A demo that is there already is not
run again, so one that was cut off goes on.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.processors import NEWEST, ROOT, SETTINGS, effect, probed

NAMES = ("dense", "routed", "static")
ALLOWED = 0.02  # how far static may be behind dense


def demo(python: str, variables: dict[str, str], seed: int, output: Path) -> tuple[float, int]:
    """Runs one demo; returns the minutes that it took and its exit code."""
    command = [python, "-m", "shrp_hf.cli", "demo", "--seed", str(seed), "--output", str(output)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False)
    return (time.monotonic() - start) / 60, done.returncode


def accuracies(report: Path) -> dict[str, float]:
    """The accuracy of each model, as the report has it."""
    found = re.findall(r"^- (\w+): accuracy ([\d.]+)", report.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: float(value) for name, value in found}


def row(setting: str, seed: int, folder: Path) -> str:
    """A line of the table for the demo in `folder`."""
    found = accuracies(folder / "report.md")
    behind = found["static"] - found["dense"]
    cells = [setting, seed, *(f"{found[name]:.3f}" for name in NAMES), f"{100 * behind:+.1f}"]
    return "| " + " | ".join(map(str, [*cells, (folder / "minutes.txt").read_text(encoding="utf-8")])) + " |"


def main() -> int:
    """Runs the demos that are missing and writes the table; returns how many fell behind or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demos"))
    parser.add_argument("--newest", help="Python of an environment with the newest torch, for the fifth setting")
    words = parser.parse_args()
    plain, lines, wrong = probed(sys.executable, {}), [], 0
    settings = [*SETTINGS, *([NEWEST] if words.newest else [])]
    for seed, setting in enumerate(settings):
        python = words.newest if setting == NEWEST else sys.executable
        variables, folder = SETTINGS.get(setting, {}), (words.output / f"{seed}-{setting}").resolve()
        shows = effect(setting, probed(python, variables), plain)
        sys.stdout.write(f"== seed {seed}, {setting}: {shows}\n")
        sys.stdout.flush()
        if not (folder / "minutes.txt").exists():
            minutes, code = demo(python, variables, seed, folder)
            if code:
                sys.stdout.write(f"== seed {seed}, {setting}: exit code {code}\n")
                wrong += 1
                continue
            (folder / "minutes.txt").write_text(f"{minutes:.1f}", encoding="utf-8")
        found = accuracies(folder / "report.md")
        wrong += found["dense"] - found["static"] > ALLOWED
        lines.append(row(setting, seed, folder))
    head = "| setting | seed | dense | routed | static | points | minutes |\n|---|---:|---:|---:|---:|---:|---:|"
    text = "\n".join([head, *lines]) + "\n"
    (words.output / "demos.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
