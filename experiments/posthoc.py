"""Speed of scoring and choosing heads, BERT-base shape, random weights, CPU, against the project's targets."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from experiments.foundation import BUSY_SPREAD, Target, environment
from shrp_hf.measuring import peak_memory
from shrp_hf.plans.budget import KNEE_DEGREES, KneeNotFoundError, find_knee
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.selectors.cahp_math import HeadClusters, embed, head_similarity

EXAMPLE = """example:
  python -m experiments.posthoc --threads 2 --output out/posthoc.json

The exit code is 1 when a target is missed. Let the machine do nothing else meanwhile; it takes minutes and 3 GB."""
NUM_CLASSES = 5
HIES = StatsRequest(importance=True, entropy=True)
SIGNATURES = StatsRequest(signature_size=32)
HEADS, NEURONS = StatsRequest(importance=True), StatsRequest(importance=True, neurons=True, means=True)
Batches = list[dict[str, torch.Tensor]]


def calibration(batch_size: int, shortest: int, longest: int, num_batches: int) -> Batches:
    """Makes batches of random tokens, lengths uniform, padded on the right to the longest of the batch."""
    batches = []
    for _ in range(num_batches):
        lengths = torch.randint(shortest, longest + 1, (batch_size, 1))
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        labels = torch.arange(batch_size) % NUM_CLASSES
        batches.append({"input_ids": torch.randint(1, 30522, mask.shape), "attention_mask": mask, "labels": labels})
    return batches


@contextmanager
def eager(model: BertForSequenceClassification) -> Iterator[None]:
    """Eager attention for as long as the context lasts."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


def forward_backward(model: BertForSequenceClassification, batches: Batches) -> None:
    """One plain eager forward and backward over the batches."""
    with eager(model):
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()


@torch.no_grad()
def forward_with_maps(model: BertForSequenceClassification, batches: Batches) -> None:
    """One eager forward that returns the attention maps."""
    with eager(model):
        for batch in batches:
            model(**batch, output_attentions=True)


def in_turns(calls: Sequence[Callable[[], object]], num_rounds: int, title: str) -> list[list[float]]:
    """Times the calls in turns, after one round to warm up. Returns the seconds per call and round."""
    seconds: list[list[float]] = [[] for _ in calls]
    for i in tqdm(range(num_rounds + 1), desc=title, leave=False):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if i:
                times.append(time.perf_counter() - start)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of their ratio."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def measure_scoring(num_rounds: int) -> tuple[list[Target], float]:
    """Scores against plain passes over the same batches.

    Returns:
        The targets, and the largest spread of a plain pass: interquartile range over median.
    """
    model = BertForSequenceClassification(BertConfig(num_labels=NUM_CLASSES)).eval()
    targets, spread = [], 0.0
    for title, batches in {
        "32 short sentences": calibration(32, 5, 45, 1),
        "8 x 128": calibration(8, 64, 128, 1),
    }.items():
        runs = (
            lambda batches=batches: collect_head_stats(model, batches, HIES),
            lambda batches=batches: forward_backward(model, batches),
            lambda batches=batches: collect_head_stats(model, batches, SIGNATURES),
            lambda batches=batches: forward_with_maps(model, batches),
        )
        hies, backward, signatures, forward = in_turns(runs, num_rounds, title)
        for times in (backward, forward):
            lower, middle, upper = statistics.quantiles(times, n=4)
            spread = max(spread, (upper - lower) / middle)
        targets += [
            Target(f"HIS + entropy against eager forward + backward, {title}", ratio(hies, backward), 1.5, False),
            Target(f"CAHP signatures against eager forward, B=32, {title}", ratio(signatures, forward), 1.15, False),
        ]
    return targets, spread


def backward_to_activations(model: BertForSequenceClassification, batches: Batches) -> None:
    """One plain forward and backward in which no weight needs a gradient."""
    for batch in batches:
        embedded = model.bert.embeddings(batch["input_ids"]).detach().requires_grad_()
        fields = {name: batch[name] for name in ("attention_mask", "labels")}
        torch.autograd.grad(model(inputs_embeds=embedded, **fields).loss, embedded)


def measure_neurons(num_rounds: int) -> list[Target]:
    """Scores of heads and neurons in one pass, against those of heads alone and against a plain pass."""
    model = BertForSequenceClassification(BertConfig(num_labels=NUM_CLASSES)).eval().requires_grad_(False)
    batches = calibration(8, 128, 128, 1)
    runs = (
        lambda: collect_head_stats(model, batches, NEURONS),
        lambda: collect_head_stats(model, batches, HEADS),
        lambda: backward_to_activations(model, batches),
    )
    neurons, heads, plain = in_turns(runs, num_rounds, "neurons")
    memory = [peak_memory(run) for run in runs[:2]]
    layer = 8 * 128 * model.config.intermediate_size * 4
    return [
        Target("heads, neurons and means against heads, 8 x 128", ratio(neurons, heads), 1.1, False),
        Target(
            "heads, neurons and means against forward + backward without weights, 8 x 128", ratio(neurons, plain), 1.7, False
        ),
        Target("memory beyond that of heads, in activations of one FFN", (memory[0] - memory[1]) / layer, 1.5, False),
    ]


def measure_selection() -> list[Target]:
    """Seconds from class statistics (random) to the choice, for all degrees at once."""
    targets = []
    for num_heads, bound in ((72, 10), (144, 60)):
        mean, variance = torch.rand(2, NUM_CLASSES, num_heads, 32 * 32, dtype=torch.float64)
        start = time.perf_counter()
        clusters = HeadClusters.in_plane(embed(head_similarity(mean, variance / 100)))
        for degree in KNEE_DEGREES:
            try:
                clusters.labels(round(find_knee(clusters.curve(), degree)))
            except KneeNotFoundError:
                continue
        targets.append(Target(f"CAHP's choice among {num_heads} heads, seconds", time.perf_counter() - start, bound, False))
    return targets


def markdown(about: dict[str, str | int], targets: Sequence[Target], spread: float) -> str:
    """Returns the report."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| Target | Bound | Measured | Met |", "| --- | ---: | ---: | --- |"]
    for target in targets:
        unit = "s" if "seconds" in target.name else "x"
        met = "yes" if target.is_met else "**no**"
        lines.append(f"| {target.name} | <= {target.bound:.2f}{unit} | {target.measured:.3f}{unit} | {met} |")
    if spread > BUSY_SPREAD:
        lines += ["", f"**A spread is {spread:.0%}: the machine was doing something else; run it again.**"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m experiments.posthoc",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which the passes take turns (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    scoring, spread = measure_scoring(options.rounds)
    targets = [*measure_selection(), *scoring, *measure_neurons(options.rounds)]
    about = environment(options.threads)
    sys.stdout.write(markdown(about, targets, spread))
    if options.output is not None:
        figures = {"environment": about, "targets": [{**asdict(t), "is_met": t.is_met} for t in targets]}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(target.is_met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
