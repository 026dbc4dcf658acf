"""The comparisons of docs/results/earlier-runs.md: SHRP, selectors and truncation on four tasks, three seeds."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shrp_hf.tasks.loading import load_task
from shrp_hf.workflows.compare import Comparison, Grid, Settings, measure_speed, read_cells, write_results

EXAMPLE = """example, twenty processes on one GPU:
  for i in $(seq 20); do OMP_NUM_THREADS=1 python -m experiments.results --model DIR --data-dir DIR --output out & done; wait

The data are in SST-2, SST-5, STS-B and MNLI below --data-dir, else they come from the Hub. Each task has a directory in
--output, as from `shrp-hf compare`, which can add to it. Started again, it does what is missing; started several times, the
processes share the work. What matters most comes first, so a run may be stopped when time is out. A small encoder leaves a
GPU idle: many processes fit on it, best under NVIDIA's MPS."""
TASKS = ("sst2", "sst5", "stsb", "mnli")


def settings(task: str, model: str) -> Settings:
    """What holds for every cell of a task."""
    return Settings(model, dense_epochs=6.0, examples_per_epoch=8000, signature_size=48 if task == "mnli" else 32)


def grids(task: str, seeds: Sequence[int]) -> list[Grid]:
    """What is compared on a task, the most important first."""

    def shrp(layers: Sequence[int] = (5,), epochs: float = 10, **options: Sequence) -> Grid:
        return Grid(expert_layers=layers, recovery_epochs=(epochs,), seeds=seeds, **options)

    def selected(names: Sequence[str], epochs: Sequence[float], **budget: Sequence) -> Grid:
        return Grid(selectors=names, recovery_epochs=epochs, seeds=seeds, **budget)

    routers = {"expert_selectors": ("usage",)}
    compared = ("hies", "his", "cahp", "dsp")
    plan = [
        shrp((5, 3), expert_selectors=("his", "usage")),
        selected(("hies", "his"), (0,), keep=(0.9, 0.8, 0.7, 0.6, 0.5)),
        Grid(truncate=(1,), recovery_epochs=(10,), seeds=seeds),
        shrp(expert_selectors=("his",), experts=(2,)),
        shrp(expert_selectors=("random",)),
    ]
    if task == "sst2":
        plan += [
            shrp((5, 4, 3, 2, 1), 0, recipes=("paper",)),
            shrp(epochs=0, recipes=("paper",), experts=(2, 4, 8, 12)),
            selected(compared, (1, 3), keep=(0.5,)),
            selected(compared, (1,), knee_degrees=(2, 3, 4, 5, 6)),
            shrp(epochs=3, balance_coefs=(0.0, 0.01, 0.1, 1.0), **routers),
            shrp(epochs=3, experts_per_sequence=(3, 5), **routers),
            shrp((4, 2, 1)),
            Grid(truncate=(2, 3, 4, 5), recovery_epochs=(10,), seeds=seeds),
            shrp(experts=(4, 8, 12)),
        ]
    elif task != "stsb":  # a regression has no classes for CAHP to tell apart
        plan.append(selected(compared, (1,), knee_degrees=(2, 3, 4, 5, 6)))
    return plan


def work(comparisons: Sequence[Comparison]) -> None:
    """Does what is missing, a job of each comparison in turn, until all is done or has failed."""
    # A list, so that each has its turn.
    while (is_busy := any([comparison.step() for comparison in comparisons])) or any(c.is_missing for c in comparisons):
        if not is_busy:
            time.sleep(1)  # other processes have all that can be done now


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is missing and writes the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m experiments.results",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="hub id or directory of the encoder to fine-tune")
    parser.add_argument("--data-dir", type=Path, help="directory with a folder of files for each task")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--speed", action="store_true", help="measure throughput at the end: the machine must do nothing else")
    parser.add_argument("--output", type=Path, required=True)
    words = parser.parse_args(arguments)
    tasks, seeds = words.tasks.split(","), [int(seed) for seed in words.seeds.split(",")]
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"--tasks must be of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    comparisons = [
        Comparison(settings(task, words.model), grids(task, seeds), load_task(task, words.data_dir), words.output / task)
        for task in tasks
    ]
    work(comparisons)
    for comparison in comparisons:
        if words.speed:
            measure_speed(comparison.output, read_cells(comparison.output), num_rounds=9)
        print("\n".join(f"Written: {path}" for path in write_results(comparison.output)))
    failures = [failure for comparison in comparisons for failure in comparison.failures().items()]
    for key, error in failures:
        print(f"Failed: {key}: {error}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
