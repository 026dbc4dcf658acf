"""Which training recipe keeps most of the dense model: one change at a time, for two structures, on held-out rows.

    python -m experiments.recipe_screen prepare --model DIR --data-dir DIR --prepared out/screen.pt
    python -m experiments.recipe_screen screen --prepared out/screen.pt --output out/screen --seconds 150
    python -m experiments.recipe_screen confirm --prepared out/screen.pt --output out/screen --recipes "base;10 epochs"
    python -m experiments.recipe_screen table --output out/screen

`prepare` tokenises with the package; training needs nothing but torch. `screen` trains every change on STS-B and SST-5,
`confirm` some of them, or several together ("10 epochs + teacher alone"), on all tasks. Results are added to `results.jsonl`
as they come, for as long as `--seconds` allow. Choose by the held-out rows: the reported rows are only reported.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import multiprocessing

from experiments.screen_data import WORDS, prepare, read
from experiments.screen_model import Dropout, Encoder, Scores, score, student_of
from experiments.screen_training import Lesson, Recipe, Rows, joined, task_losses, teach, train

TRAIN_ROWS = 9000
TASKS = ("stsb", "sst5", "sst2", "mnli")
SCREENED = ("stsb", "sst5")
STRUCTURES = {"shrp": "1:whole,5:expert", "thin": "6:3x240"}
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "dropout 0.1 everywhere": {"dropout": Dropout(0.1, 0.1, 0.1)},
    "10 epochs": {"epochs": 10.0},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 6e-4": {"learning_rate": 6e-4},
    "no hidden states": {"hidden_states": 0.0},
    "hidden states weigh 10": {"hidden_states": 10.0},
    "no logits": {"logits": 0.0},
    "teacher alone": {"task": 0.0},
    "label alone": {"logits": 0.0, "hidden_states": 0.0},
    "batches of 16": {"batch_size": 16},
    "dropout of hidden states": {"dropout": Dropout(hidden=0.1)},
    "dropout of attention": {"dropout": Dropout(attention=0.1)},
    "dropout before the classifier": {"dropout": Dropout(pooler=0.1)},
    "new modules 3e-4": {"new_learning_rate": 3e-4},
    "new modules 5e-3": {"new_learning_rate": 5e-3},
    "temperature 1": {"temperature": 1.0},
    "temperature 4": {"temperature": 4.0},
    "logits weigh 4": {"logits": 4.0},
    "value relations": {"value_relations": 1.0},
    "layer by layer": {"stepwise": True},
    "last layer followed": {"followed": "last"},
    "every second layer followed": {"followed": "every second"},
    "embeddings followed too": {"followed": "embeddings too"},
    "masked copies": {"augmentation": "masked", "epochs": 2.5},
    "early stopping": {"early_stopping": True},
    "cosine": {"schedule": "cosine"},
    "constant": {"schedule": "constant"},
    "warm-up of a tenth": {"warmup": 0.1},
    "cold start": {"warm": False},
    "weight decay 0.01": {"weight_decay": 0.01},
    "batches of 64": {"batch_size": 64},
    "learning rate 1e-3": {"learning_rate": 1e-3},
}
EXPERTS_ONLY = {"new modules 3e-4", "new modules 5e-3"}
CLASSES_ONLY = {"temperature 1", "temperature 4"}
UNLABELLED = {"unlabelled rows": {"augmentation": "rows", "epochs": 2.5}}
DENSE_RECIPE = Recipe(epochs=3.0, learning_rate=1e-4, dropout=Dropout(0.1, 0.1, 0.1), logits=0.0, hidden_states=0.0)


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        stage: "dense", "screen" or "confirm".
        task: Name of the task.
        seed: Of everything that is drawn.
        structure: See `student_of`.
        name: What the recipe is called.
        recipe: How it is trained.
    """

    stage: str
    task: str
    seed: int
    structure: str
    name: str
    recipe: Recipe = field(default=Recipe())


class Bench:
    """What a worker holds of one task and seed: rows, the dense model, what it teaches, what is cut by.

    Args:
        prepared: From `prepare`.
        task: Name of the task.
        seed: The seed.
        scratch: Directory of the dense models.
        device: Where to train.
        max_rows: Most rows of a split; the reported rows are whole unless this is less than `TRAIN_ROWS`.
    """

    def __init__(self, prepared: Mapping[str, Any], task: str, seed: int, scratch: Path, device: str, max_rows: int) -> None:
        parts = prepared["tasks"][task]
        used = torch.cat(
            [part["ids"].long().flatten() for part in parts["splits"].values()] + [torch.tensor([0, prepared["mask_id"]])]
        )
        vocabulary = used.unique()
        self.mask_id = int((vocabulary == prepared["mask_id"]).nonzero())
        self.splits = {}
        for name, part in parts["splits"].items():
            # Rows of the embedding that no task row uses would only cost time.
            ids = torch.searchsorted(vocabulary, part["ids"].long()).int()
            labels, lengths = part["labels"].float(), part["lengths"].long()
            self.splits[name] = Rows(*(x.to(device) for x in (ids, part["types"], lengths, labels)))
        for name, rows in self.splits.items():
            self.splits[name] = rows[: len(rows) if name == "reported" and max_rows >= TRAIN_ROWS else max_rows]
        weights = prepared["weights"] | {WORDS: prepared["weights"][WORDS][vocabulary]}
        torch.manual_seed(seed)
        self.seed, self.device, self.scratch = seed, device, scratch
        self.dense = Encoder(weights, parts["num_labels"], **prepared["shape"]).to(device)
        self.file = scratch / f"dense-{task}-{seed}.pt"
        self.scores: Scores | None = None
        self.taught: dict[str, Any] = {}

    def do(self, job: Job) -> dict[str, float]:
        """Trains what the job says; returns its quality on held-out and reported rows."""
        if job.stage == "dense":
            lesson = Lesson(self.splits["train"], teach(self.dense, self.splits["train"]), self.dense, job.recipe)
            found = train(self.dense, lesson, job.recipe, job.seed, lambda: self.quality(self.dense))
            torch.save(self.dense.state_dict(), self.file.with_suffix(".partial"))
            self.file.with_suffix(".partial").replace(self.file)
            return found
        self._open()
        recipe = job.recipe
        structure = STRUCTURES.get(job.structure, job.structure)
        student = student_of(self.dense, structure, self.scores, warm=recipe.warm, stepwise=recipe.stepwise)
        student = student.to(self.device)
        rows, taught = self._taught(recipe.augmentation)
        return train(student, Lesson(rows, taught, self.dense, recipe), recipe, job.seed, lambda: self.quality(student))

    def _open(self) -> None:
        if self.scores is not None:
            return
        self.dense.load_state_dict(torch.load(self.file, map_location=self.device))
        self.dense.eval().requires_grad_(True)
        order = torch.randperm(len(self.splits["train"]), generator=torch.Generator().manual_seed(self.seed))[:1024]
        batches = [batch for _, batch in self.splits["train"][order.to(self.device)].batches(64)]
        self.scores = score(self.dense, batches, task_losses)

    def _taught(self, augmentation: str) -> tuple[Rows, Any]:
        if augmentation not in self.taught:
            self.taught = {}
            rows = self.splits["train"]
            if augmentation:
                more = self.splits["extra"] if augmentation == "rows" else self._masked(rows)
                rows = joined(rows, replace(more, labels=torch.full_like(more.labels, -100.0)))
            self.taught[augmentation] = rows, teach(self.dense, rows)
        return self.taught[augmentation]

    def _masked(self, rows: Rows) -> Rows:
        """A copy in which 15% of the tokens, but not the first, are the mask."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = (torch.rand(rows.ids.shape, generator=generator) < 0.15).to(rows.ids.device)
        drawn[:, 0] = False
        return replace(rows, ids=rows.ids.masked_fill(drawn, self.mask_id))

    @torch.no_grad()
    def quality(self, model: Encoder) -> dict[str, float]:
        """Pearson's correlation or accuracy on the held-out and on the reported rows."""
        was_training = model.training
        model.eval()
        found = {}
        for name in ("held_out", "reported"):
            rows = self.splits[name]
            logits = torch.empty(len(rows), model.classifier.out_features, device=self.device)
            for index, batch in rows.batches(256):
                logits[index] = model(batch["ids"], batch["types"], batch["mask"], Dropout())[0]
            if logits.shape[1] == 1:
                found[name] = float(torch.corrcoef(torch.stack([logits[:, 0], rows.labels]))[0, 1])
            else:
                found[name] = float((logits.argmax(dim=1) == rows.labels).float().mean())
        model.train(was_training)
        return found


def screening(seeds: Sequence[int]) -> Iterator[Job]:
    """Every change on the tasks that are screened, and the control: the dense model trained on."""
    for seed in seeds:
        for name, changes in CHANGES.items():
            for task in SCREENED:
                for structure in STRUCTURES:
                    if (name in EXPERTS_ONLY and structure != "shrp") or (name in CLASSES_ONLY and task == "stsb"):
                        continue
                    yield Job("screen", task, seed, structure, name, replace(Recipe(), **changes))
                if name in ("base", "dropout 0.1 everywhere", "learning rate 1e-4"):
                    yield Job("screen", task, seed, "dense", name, replace(Recipe(), **changes))


def combined(name: str) -> Recipe:
    """The recipe of one change, or of several whose names are joined by " + "."""
    recipe = Recipe()
    for part in name.split(" + "):
        recipe = replace(recipe, **(CHANGES | UNLABELLED)[part])
    return recipe


def confirming(names: Sequence[str], controls: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """Recipes on all tasks, and the control by some of them."""
    for seed in seeds:
        for name in dict.fromkeys((*names, *controls)):
            for task in tasks:
                if task in SCREENED and not set(name.split(" + ")).isdisjoint(UNLABELLED):
                    continue  # all rows of these are trained on
                structures = [*STRUCTURES] * (name in names) + ["dense"] * (name in controls)
                for structure in structures:
                    yield Job("confirm", task, seed, structure, name, combined(name))


def work(words: argparse.Namespace, scratch: str, place: int, jobs: Mapping[str, Any], results: Any) -> None:
    """Does jobs for as long as it lives, those of its own task first."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = read(words.prepared)
    benches: dict[tuple[str, int], Bench] = {}
    while True:
        job = _next(jobs, place)
        start = time.perf_counter()
        key = (job.task, job.seed)
        try:
            if key not in benches:
                benches.clear()  # one at a time: what a teacher says takes gigabytes
                benches[key] = Bench(prepared, *key, Path(scratch), device, words.rows)
            found, error = benches[key].do(job), None
        except Exception as caught:  # reported; a new process takes the place, whatever state this one is in
            found, error = None, f"{type(caught).__name__}: {str(caught)[:200]}"
        if job.stage == "dense":
            benches.clear()
        gc.collect()
        if device == "cuda" and not error:
            torch.cuda.empty_cache()
        results.put((job, found, time.perf_counter() - start, error and (place, error)))
        if error:
            return


def _next(jobs: Mapping[str, Any], place: int) -> Job:
    """Waits for a job: of a task of its own, so that the rows stay, else of another."""
    while True:
        for stride in range(len(jobs)):
            try:
                return list(jobs.values())[(place + stride) % len(jobs)].get_nowait()
            except Empty:
                continue
        time.sleep(0.02)


class Pool:
    """Workers, and the file that results are added to."""

    def __init__(self, words: argparse.Namespace, scratch: str, tasks: Sequence[str]) -> None:
        self.context = context = multiprocessing.get_context("spawn")
        self.start = time.monotonic()
        self.file = words.output / "results.jsonl"
        self.jobs = {task: context.Queue() for task in tasks}
        self.results = context.Queue()
        self.arguments = (words, scratch), (self.jobs, self.results)
        self.workers: list[Any] = []
        for place in range(words.workers):
            self._hire(place)
        self.rows: list[dict[str, Any]] = []

    def _hire(self, place: int) -> None:
        first, last = self.arguments
        self.workers.append(self.context.Process(target=work, args=(*first, place, *last), daemon=True))
        self.workers[-1].start()

    def do(self, jobs: Sequence[Job], until: float) -> None:
        """Does `jobs` until `until` seconds after the start."""
        if not jobs:
            return
        for job in jobs:
            self.jobs[job.task].put(job)
        waiting, done, steps, begun, told = len(jobs), 0, 0, time.monotonic(), time.monotonic()
        while waiting and any(worker.is_alive() for worker in self.workers):
            if time.monotonic() - self.start > until:
                break
            try:
                job, found, seconds, error = self.results.get(timeout=1.0)
            except Empty:
                continue
            waiting -= 1
            if error:
                print(f"failed: {job.task} {job.structure} {job.name}: {error[1]}", flush=True)
                self._hire(error[0])
            if found is None:
                continue
            done, steps = done + 1, steps + found["steps"]
            row = {"stage": job.stage, "task": job.task, "seed": job.seed, "structure": job.structure, "name": job.name}
            self.rows.append(row | found | {"seconds": round(seconds, 2)})
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
            if time.monotonic() - told > 10:
                told = time.monotonic()
                rate = steps / (told - begun)
                print(f"{told - self.start:.0f} s: {done} done, {waiting} left, {rate:.0f} steps/s", flush=True)
        spent = time.monotonic() - begun
        print(f"{jobs[0].stage}: {done} of {len(jobs)} in {spent:.0f} s, {steps / spent:.0f} steps/s", flush=True)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.terminate()


def run(words: argparse.Namespace) -> None:
    """Trains the dense models, then what the verb says."""
    words.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = SCREENED if words.verb == "screen" else words.tasks
        pool = Pool(words, scratch, tasks)
        dense = [Job("dense", task, seed, "dense", "dense", DENSE_RECIPE) for seed in words.seeds for task in tasks]
        pool.do(dense, words.seconds)
        if words.verb == "screen":
            jobs = screening(words.seeds)
        else:
            jobs = confirming(words.recipes, words.controls, tasks, words.seeds)
        done = {(row["task"], row["seed"]) for row in pool.rows}
        pool.do([job for job in jobs if (job.task, job.seed) in done], words.seconds)
        pool.close()


def table(output: Path) -> str:
    """Returns the results as Markdown: means over seeds on held-out and reported rows."""
    lines = (output / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["task"], row["structure"], row["name"]), []).append(row)
    text = ["| stage | task | structure | change | held out | reported | seeds |", "|---|---|---|---|---:|---:|---:|"]
    for key, members in groups.items():
        means = [f"{statistics.fmean(row[name] for row in members):.4f}" for name in ("held_out", "reported")]
        text.append(f"| {' | '.join((*key, *means, str(len(members))))} |")
    return "\n".join(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `prepare` and every run on a `Pool` take."""
    parser.add_argument("--model", help="hub id or directory of a BERT or MPNet encoder, with its tokenizer")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--prepared", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])


def main() -> None:
    """Prepares, runs, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["prepare", "screen", "confirm", "table"])
    add_options(parser)
    names = {"type": lambda text: text.split(";"), "help": "separated by semicolons"}
    parser.add_argument("--recipes", default=["base"], **names)
    parser.add_argument("--controls", default=["base"], **names)
    parser.add_argument("--tasks", default=list(TASKS), **names)
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="most rows of a split, for a trial")
    words = parser.parse_args()
    if words.verb == "prepare":
        prepare(words.model, words.data_dir, words.prepared, words.tasks, TRAIN_ROWS, extra=True, packed=False)
    elif words.verb == "table":
        print(table(words.output))
    else:
        run(words)


if __name__ == "__main__":
    main()
