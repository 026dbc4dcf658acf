"""Quality of every structure by one recipe, beside the dense model and its control: tasks x structures x seeds, on a GPU.

    python -m experiments.frontier prepare --grid minilm --model DIR --data-dir DIR --prepared out/minilm.pt
    python -m experiments.frontier run --grid minilm --prepared out/minilm.pt --output out/frontier --seconds 330
    python -m experiments.frontier table --grid minilm --output out/frontier --split reported

`prepare` tokenises with the package and packs what it writes; several files after `--prepared` share the weights.
Training needs nothing but torch, and writes `results.jsonl` as it goes. The recipe is the
package's default (docs/results/recipe.md); the control is the dense model trained on for as long, with labels too.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.recipe_screen import DENSE_RECIPE, Job, Pool, combined
from experiments.screen_data import prepare
from experiments.screen_training import Recipe

DEFAULT, LABELS_TOO = combined("teacher alone + hidden states weigh 10"), combined("base")


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Args:
        tasks: Names of the tasks.
        rows: Most training rows of a task.
        dense: Recipe of the dense model.
        dense_epochs: Its epochs, where a task needs others.
        structures: Names, and what `screen_model.layers_of` reads.
        variants: (structure, name, recipe) trained beside; chosen among by the held-out rows only.
    """

    tasks: tuple[str, ...]
    rows: int
    dense: Recipe
    dense_epochs: dict[str, float]
    structures: dict[str, str]
    variants: tuple[tuple[str, str, Recipe], ...] = ()


MINILM = Grid(
    tasks=("mnli", "banking77", "sst2", "sst5", "stsb"),
    rows=9000,
    dense=DENSE_RECIPE,
    dense_epochs={"banking77": 8.0},
    structures={
        "SHRP 5/6": "1:whole,5:expert",
        "thin 3x240": "6:3x240",
        "graded 6x512, 2x160": "1:6x512,5:2x160",
        "thin 6x768": "6:6x768",
        "first 1/6": "1:whole,5:none",
        "SHRP 4/6": "2:whole,4:expert",
        "thin 2x112": "6:2x112",
        "first 3/6": "3:whole,3:none",
        "spread 3/6": "1:whole,1:none,1:whole,2:none,1:whole",
        "thin 4x560": "6:4x560",
        "hybrid 6x512, experts": "1:6x512,5:expert",
        "spread 2/6": "1:whole,4:none,1:whole",
        "first 2/6": "2:whole,4:none",
        "hybrid thin, experts": "3:3x400,3:expert",
    },
    variants=(("thin 3x240", "10 epochs", replace(DEFAULT, epochs=10.0)), ("SHRP 5/6", "10 epochs", replace(DEFAULT, epochs=10.0))),
)
BASE = Grid(
    tasks=("mnli", "sst2"),
    rows=20000,
    dense=replace(DENSE_RECIPE, learning_rate=3e-5, warmup=0.1),
    dense_epochs={},
    structures={
        "thin 3x480": "12:3x480",
        "SHRP 10/12": "2:whole,10:expert",
        "thin 2x192": "12:2x192",
        "SHRP 11/12": "1:whole,11:expert",
        "spread 6 of thin 3x480": "1:3x480,1:none,1:3x480,1:none,1:3x480,1:none,1:none,1:3x480,1:none,1:3x480,1:none,1:3x480",
        "thin 1x160": "12:1x160",
        "graded 4x640, 1x160": "3:4x640,9:1x160",
        "thin 6x1536": "12:6x1536",
        "spread 6 of thin 2x256": "1:2x256,1:none,1:2x256,1:none,1:2x256,1:none,1:none,1:2x256,1:none,1:2x256,1:none,1:2x256",
        "hybrid 6x1536, experts": "1:6x1536,11:expert",
        "spread 3/12": "1:whole,5:none,1:whole,4:none,1:whole",
    },
    variants=tuple(
        (structure, "1e-4", replace(DEFAULT, learning_rate=1e-4)) for structure in ("thin 3x480", "thin 2x192", "SHRP 10/12")
    ),
)
GRIDS = {"minilm": MINILM, "base": BASE}


def jobs_of(grid: Grid, seeds: list[int]) -> Iterator[Job]:
    """The trainings after the dense ones, most important first."""
    wanted = [(structure, "default", DEFAULT) for structure in grid.structures]
    wanted = [wanted[0], wanted[1], ("dense", "control", LABELS_TOO), *wanted[2:], *grid.variants]
    for seed in seeds:
        for structure, name, recipe in wanted:
            for task in grid.tasks:
                yield Job("frontier", task, seed, grid.structures.get(structure, structure), name, recipe)


def run(words: argparse.Namespace) -> None:
    """Trains the dense models, then the structures."""
    grid = GRIDS[words.grid]
    words.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pool = Pool(words, scratch, grid.tasks)
        recipes = {task: replace(grid.dense, epochs=grid.dense_epochs.get(task, grid.dense.epochs)) for task in grid.tasks}
        dense = [Job("dense", task, seed, "dense", "dense", recipes[task]) for seed in words.seeds for task in grid.tasks]
        pool.do(dense, words.seconds)
        done = {(row["task"], row["seed"]) for row in pool.rows}
        pool.do([job for job in jobs_of(grid, words.seeds) if (job.task, job.seed) in done], words.seconds)
        pool.close()


def table(grid: Grid, output: Path, split: str) -> str:
    """Returns quality in percent, and of the control, for each structure and task: mean of the seeds and how many."""
    names = {spec: name for name, spec in grid.structures.items()}
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = names.get(row["structure"], row["name"]) + f" ({row['name']})" * (row["name"] not in ("default", "dense", "control"))
        found.setdefault((name, row["task"]), {})[row["seed"]] = row[split]
    lines = [f"| structure | {' | '.join(grid.tasks)} | mean, of the control |", "|---|" + "---:|" * (len(grid.tasks) + 1)]
    for name in dict.fromkeys(name for name, _ in found):
        cells, shares = [], []
        for task in grid.tasks:
            here, control = found.get((name, task), {}), found.get(("control", task), {})
            share = [here[seed] / control[seed] for seed in here if seed in control]
            shares.append(statistics.fmean(share) if share else None)
            mean = f"{100 * statistics.fmean(here.values()):.1f}" if here else "-"
            cells.append(f"{mean}, {100 * shares[-1]:.1f}% ({len(here)})" if share else f"{mean} ({len(here)})")
        mean = f"{100 * statistics.fmean(shares):.1f}%" if None not in shares else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def main() -> None:
    """Prepares, runs, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["prepare", "run", "table"])
    parser.add_argument("--grid", choices=list(GRIDS), default="minilm")
    parser.add_argument("--model", help="hub id or directory of a BERT or MPNet encoder, with its tokenizer")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--prepared", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="most rows of a split, for a trial")
    parser.add_argument("--split", choices=["held_out", "reported"], default="reported")
    words = parser.parse_args()
    grid = GRIDS[words.grid]
    words.rows = words.rows or grid.rows
    if words.verb == "prepare":
        prepare(words.model, words.data_dir, words.prepared, grid.tasks, grid.rows, extra=False, packed=True)
    elif words.verb == "table":
        print(table(grid, words.output, words.split))
    else:
        run(words)


if __name__ == "__main__":
    main()
