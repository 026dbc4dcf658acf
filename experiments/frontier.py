"""Quality of every structure by one recipe, beside the dense model and its control: tasks x structures x seeds, on a GPU.

    python -m experiments.frontier prepare --grid minilm --model DIR --data-dir DIR --prepared out/minilm.pt
    python -m experiments.frontier run --grid minilm --prepared out/minilm.pt --output out/frontier --seconds 330
    python -m experiments.frontier table --grid minilm --output out/frontier --split reported
    python -m experiments.frontier speed --grid minilm --output out/frontier --shapes 8x128 --threads 2
    python -m experiments.frontier plot --grid minilm --output out/frontier

`prepare` tokenises with the package and packs what it writes; several files after `--prepared` share the weights.
Training needs nothing but torch, and writes `results.jsonl` as it goes. The recipe is the
package's default (docs/results/recipe.md); the control is the dense model trained on for as long, with labels too.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.recipe_screen import DENSE_RECIPE, Job, Pool, add_options, combined
from experiments.screen_data import prepare
from experiments.screen_model import layers_of
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
        shape: Sizes of the encoder that `speed` builds.
        variants: (structure, name, recipe) trained beside; chosen among by the held-out rows only.
    """

    tasks: tuple[str, ...]
    rows: int
    dense: Recipe
    dense_epochs: dict[str, float]
    structures: dict[str, str]
    shape: dict[str, int]
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
    shape={"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    variants=tuple((structure, "10 epochs", replace(DEFAULT, epochs=10.0)) for structure in ("thin 3x240", "SHRP 5/6")),
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
    shape={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    variants=tuple(
        (structure, "1e-4", replace(DEFAULT, learning_rate=1e-4)) for structure in ("thin 3x480", "thin 2x192", "SHRP 10/12")
    ),
)
GRIDS = {"minilm": MINILM, "base": BASE}
COLORS = {
    "thin": "tab:blue",
    "graded": "tab:blue",
    "SHRP": "tab:red",
    "hybrid": "tab:purple",
    "first": "tab:orange",
    "spread": "tab:green",
}
BELOW = ("graded", "spread", "SHRP 4/6")  # whose names stand below their points
# As their papers have them: (speed-up, percent of the dense model).
PUBLISHED = {
    "SHRP, BERT-base": (4.2, 84.0),
    "CoFi, MNLI": (12.0, 95.0),
    "ZipLM, GLUE (at least)": (15.0, 95.0),
    "XtremeDistil, MNLI": (8.7, 99.3),
}


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


def shares(grid: Grid, output: Path, split: str) -> dict[str, dict[str, tuple[float, float | None, int]]]:
    """Returns for each structure and task: quality, the same over the control's of that seed, and how many seeds."""
    names = {spec: name for name, spec in grid.structures.items()}
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = names.get(row["structure"], row["name"])
        if row["name"] not in ("default", "dense", "control"):
            name = f"{name}, {row['name']}"
        found.setdefault((name, row["task"]), {})[row["seed"]] = row[split]
    rows: dict[str, dict[str, tuple[float, float | None, int]]] = {}
    for (name, task), here in found.items():
        control = found.get(("control", task), {})
        share = [here[seed] / control[seed] for seed in here if seed in control]
        mean = statistics.fmean(share) if share else None
        rows.setdefault(name, {})[task] = statistics.fmean(here.values()), mean, len(here)
    return rows


def mean_share(row: dict[str, tuple[float, float | None, int]], grid: Grid) -> float | None:
    """The mean over the tasks of the share of the control; None where a task is missing."""
    parts = [row[task][1] for task in grid.tasks if task in row]
    return None if len(parts) < len(grid.tasks) or None in parts else statistics.fmean(parts)


def table(grid: Grid, output: Path, split: str) -> str:
    """Returns quality in percent, of the control, and on how many seeds, for each structure and task."""
    lines = [f"| structure | {' | '.join(grid.tasks)} | mean, of the control |", "|---|" + "---:|" * (len(grid.tasks) + 1)]
    for name, row in shares(grid, output, split).items():
        cells = []
        for task in grid.tasks:
            quality, share, seeds = row.get(task, (None, None, 0))
            of_control = "" if share is None else f", {100 * share:.1f}%"
            cells.append("-" if quality is None else f"{100 * quality:.1f}{of_control} ({seeds})")
        mean = mean_share(row, grid)
        lines.append(f"| {name} | {' | '.join(cells)} | {'-' if mean is None else f'{100 * mean:.1f}%'} |")
    return "\n".join(lines)


def plot(grid: Grid, output: Path, split: str) -> Path:
    """Draws the mean share of the control against the speed that `speed` measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = json.loads((output / "speed.json").read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for name, row in shares(grid, output, split).items():
        mean, structure = mean_share(row, grid), name.removesuffix(", 10 epochs")
        if mean is None or structure not in speeds:
            continue
        kind = next(color for start, color in COLORS.items() if structure.startswith(start))
        hollow = name != structure
        axes.scatter(speeds[structure], 100 * mean, s=60, color="white" if hollow else kind, edgecolors=kind, zorder=3)
        place = (6, -12) if structure.startswith(BELOW) else (6, 10 if hollow else 5)
        axes.annotate(name, (speeds[structure], 100 * mean), place, textcoords="offset points", fontsize=8, color=kind)
    for name, (times, kept) in PUBLISHED.items():
        axes.scatter(times, kept, marker="x", color="grey", zorder=2)
        axes.annotate(name, (times, kept), (6, -10), textcoords="offset points", fontsize=7, color="grey")
    axes.axhline(100, color="grey", linewidth=0.7)
    axes.set(xscale="log", xlabel="throughput, stock in eager = 1 (8 x 128, two CPU cores)", xlim=(1.8, 22), ylim=(82, 102))
    axes.set_ylabel(f"mean of {len(grid.tasks)} tasks, % of the control")
    axes.set_xticks([2, 3, 4, 6, 8, 12, 15], labels=["2x", "3x", "4x", "6x", "8x", "12x", "15x"])
    axes.minorticks_off()
    axes.set_title("Cut in many ways, trained by one recipe (grey: published, other models, tasks, hardware)", fontsize=10)
    figure.tight_layout()
    path = output / "structures.png"
    figure.savefig(path, dpi=120)
    return path


def speed(grid: Grid, options: argparse.Namespace) -> str:
    """Measures every structure, with random weights, against stock in eager within one run on the CPU."""
    from transformers import BertConfig, BertModel

    from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
    from shrp_hf.models.modeling_shrp_bert import ShrpBertModel
    from shrp_hf.workflows.benchmark import ServingOptions, measure_serving

    models = {"stock": (BertModel(BertConfig(**grid.shape)).eval(), None)}
    whole = f"{grid.shape['num_attention_heads']}x{grid.shape['intermediate_size']}"
    for name, structure in grid.structures.items():
        kinds = [kind.replace("whole", whole).replace("expert", "1x0") for kind in layers_of(structure) if kind != "none"]
        counts = [[int(count) for count in kind.split("x")] for kind in kinds]
        layers = {
            "num_hidden_layers": len(counts),
            "kept_heads": [list(range(heads)) for heads, _ in counts],
            "intermediate_sizes": [neurons for _, neurons in counts],
            "expert_layers": [place for place, (_, neurons) in enumerate(counts) if not neurons],
        }
        models[name] = (ShrpBertModel(ShrpBertConfig(**grid.shape | layers, routed=False)).eval(), None)
    shapes = tuple(tuple(int(size) for size in shape.split("x")) for shape in options.shapes)
    wanted = ServingOptions(tuple(options.runtimes), shapes, num_threads=options.threads, num_rounds=options.rounds)
    result = measure_serving(models, wanted)
    if options.output:
        workload = f"{shapes[0][0]} x {shapes[0][1]}"
        options.output.mkdir(parents=True, exist_ok=True)
        speeds = {name: round(result.row(name, options.runtimes[0], workload).speedup, 2) for name in models}
        (options.output / "speed.json").write_text(json.dumps(speeds, indent=1), encoding="utf-8")
    return result.markdown()


def main() -> None:
    """Prepares, runs, or prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["prepare", "run", "table", "speed", "plot"])
    parser.add_argument("--grid", choices=list(GRIDS), default="minilm")
    add_options(parser)
    parser.add_argument("--rows", type=int, help="most rows of a split, for a trial")
    parser.add_argument("--split", choices=["held_out", "reported"], default="reported")
    parser.add_argument("--runtimes", nargs="+", default=["eager"], help="of `speed`")
    parser.add_argument("--shapes", nargs="+", default=["8x128"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    words = parser.parse_args()
    grid = GRIDS[words.grid]
    words.rows = words.rows or grid.rows
    if words.verb == "prepare":
        prepare(words.model, words.data_dir, words.prepared, grid.tasks, grid.rows, extra=False, packed=True)
    elif words.verb == "table":
        print(table(grid, words.output, words.split))
    elif words.verb == "plot":
        print(plot(grid, words.output, words.split))
    elif words.verb == "speed":
        print(speed(grid, words))
    else:
        run(words)


if __name__ == "__main__":
    main()
