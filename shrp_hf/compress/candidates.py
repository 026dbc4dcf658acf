"""What a model can become, and how fast each shape runs before anything is trained."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shrp_hf.benchmark import Timing
from shrp_hf.plan import KeepPlan
from shrp_hf.surgery import to_shrp

DENSE = "dense"
Measure = Callable[..., Mapping[str, Timing]]
"""`measure_throughput`, or what stands in for it: (models, batch_size, length) -> a timing for each name."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A static SHRP model that could be trained.

    Args:
        num_layers: Layers to convert, counted from the last.
        keep: Experts that stay in each of them.
    """

    num_layers: int
    keep: int

    @property
    def name(self) -> str:
        """For example "5x1": 5 layers, 1 expert in each."""
        return f"{self.num_layers}x{self.keep}"

    @property
    def expected_rank(self) -> tuple[int, int]:
        """Sorts by expected quality, best first: the fewest layers converted, then the most experts."""
        return self.num_layers, -self.keep

    def describe(self, total: int) -> str:
        """Spells it out, for a model of `total` layers."""
        return f"{self.num_layers} of {total} layers converted, {self.keep} expert{'s' * (self.keep > 1)} in each"

    def layers(self, total: int) -> range:
        """Indices of the layers to convert, of `total`."""
        return range(total - self.num_layers, total)


def candidates(config: PreTrainedConfig, experts: Iterable[int] | None = None) -> list[Candidate]:
    """Lists every depth, from the last layer alone to all of them, with every number of experts.

    Args:
        config: The dense model's.
        experts: Numbers of experts; None: 1, 2, 4 and so on, up to all heads.

    Raises:
        ValueError: A number of experts is out of range.
    """
    heads = config.num_attention_heads
    if experts is None:
        experts = {2**i for i in range(heads.bit_length()) if 2**i <= heads} | {heads}
    keeps = sorted(set(experts))
    if not keeps or not 1 <= keeps[0] <= keeps[-1] <= heads:
        raise ValueError(f"`experts` must be between 1 and {heads}, the heads of a layer, got {keeps}.")
    return [Candidate(layers, keep) for layers in range(1, config.num_hidden_layers + 1) for keep in keeps]


def untrained(dense: PreTrainedModel, candidate: Candidate) -> PreTrainedModel:
    """Returns a static model of the candidate's shape; it shares the weights that stay with `dense`, which is left alone."""
    shared: dict[int, nn.Parameter] = {id(parameter): parameter for parameter in dense.parameters()}
    model = to_shrp(copy.deepcopy(dense, shared))  # dozens of candidates would not fit into memory otherwise
    layers = candidate.layers(model.config.num_hidden_layers)
    model.convert_layers_(list(layers))
    heads = model.config.num_attention_heads
    kept = [tuple(range(candidate.keep if i in layers else heads)) for i in range(model.config.num_hidden_layers)]
    model.prune_heads(KeepPlan(tuple(kept), heads))
    return model.eval()


def predict_speeds(
    dense: PreTrainedModel, choices: Iterable[Candidate], shape: tuple[int, int], measure: Measure
) -> dict[Candidate, float]:
    """Measures how many times the dense model's throughput every shape has: all in turns, in one run, untrained.

    Args:
        dense: The dense model, on the device to measure on; its weights do not matter.
        choices: The candidates.
        shape: Sequences and tokens per call.
        measure: `measure_throughput`, or what stands in for it.
    """
    choices = list(choices)
    models = {DENSE: dense, **{candidate.name: untrained(dense, candidate) for candidate in choices}}
    timings = measure(models, *shape, num_rounds=5)
    return {candidate: timings[candidate.name].ratio_to(timings[DENSE]) for candidate in choices}


def worthwhile(speeds: Mapping[Candidate, float]) -> list[Candidate]:
    """Returns, by speed, the candidates that no other beats: faster than dense, and than all that are expected better.

    Expected better than a candidate is one with as many layers converted or fewer, and as many experts or more. So
    what measured noise puts out of order is never trained.
    """

    def is_beaten(candidate: Candidate) -> bool:
        return any(
            other != candidate
            and other.num_layers <= candidate.num_layers
            and other.keep >= candidate.keep
            and speed >= speeds[candidate]
            for other, speed in speeds.items()
        )

    return sorted((c for c in speeds if speeds[c] > 1 and not is_beaten(c)), key=lambda c: (speeds[c], c))


def speed_table(speeds: Mapping[Candidate, float], speedup: float | None) -> str:
    """Returns Markdown: layers converted down, experts kept across, the speed-up in each cell; bold where it reaches."""
    keeps = sorted({candidate.keep for candidate in speeds})
    lines = ["| layers converted | " + " | ".join(f"{keep} expert{'s' * (keep > 1)}" for keep in keeps) + " |"]
    lines.append("|---:|" + "---:|" * len(keeps))
    for layers in sorted({candidate.num_layers for candidate in speeds}):
        cells = [speeds[Candidate(layers, keep)] for keep in keeps]
        shown = [f"**{cell:.2f}x**" if speedup and cell >= speedup else f"{cell:.2f}x" for cell in cells]
        lines.append(f"| {layers} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
