"""What a model can become, and how fast each shape runs before anything is trained."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from shrp_hf.families import head_layout
from shrp_hf.measuring import CostTable, Timing
from shrp_hf.measuring.latency import NEURON_STEP
from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import to_shrp
from shrp_hf.structures import spread_layers

DENSE = "dense"
STRUCTURES = ("thin", "uniform", "experts", "spread", "first")
"""Names of the structures, in the order in which they are tried: what kept most quality at equal speed comes first."""
Measure = Callable[..., Mapping[str, Timing]]
"""`measure_throughput`, or what stands in for it: (models, batch_size, length) -> a timing for each name."""
_MARGINS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.6)
_LADDER = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0)


class Candidate(ABC):
    """A smaller model that could be trained."""

    structure: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name, for files and tables."""

    @property
    @abstractmethod
    def size(self) -> tuple[float, ...]:
        """Numbers; of two candidates of a structure, one that is as large in each is expected to be as good or better."""

    @abstractmethod
    def describe(self, total: int) -> str:
        """Spells it out, for a model of `total` layers."""

    @abstractmethod
    def shrink_(self, model: PreTrainedModel) -> None:
        """Gives a dense Shrp model the candidate's shape, whatever its weights; for a measurement."""

    @property
    def expected_rank(self) -> tuple[float, ...]:
        """Sorts the candidates of a structure by expected quality, best first."""
        return tuple(-number for number in self.size)


@dataclass(frozen=True)
class Thin(Candidate):
    """Thin layers whose heads and neurons were searched by the table of times, layer by layer.

    Args:
        speedup: Speed-up by the table.
        plan: What stays.
    """

    structure: ClassVar[str] = "thin"
    speedup: float
    plan: KeepPlan = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """For example "thin-4x": 4 times as fast by the table."""
        return f"thin-{self.speedup:g}x"

    @property
    def size(self) -> tuple[float, ...]:
        """The slower the larger."""
        return (-self.speedup,)

    def describe(self, total: int) -> str:
        """Spells it out, for a model of `total` layers."""
        kept = f"{self.plan.num_kept} heads and {self.plan.num_kept_neurons:,} neurons in all"
        return f"{total} thin layers, {kept}, searched for {self.speedup:g}x"

    def shrink_(self, model: PreTrainedModel) -> None:
        """Cuts it by the plan."""
        model.prune_heads(self.plan)


@dataclass(frozen=True)
class Uniform(Candidate):
    """Thin layers that are all alike.

    Args:
        heads: Heads of each layer.
        neurons: FFN neurons of each layer.
    """

    structure: ClassVar[str] = "uniform"
    heads: int
    neurons: int

    @property
    def name(self) -> str:
        """For example "uniform-3h384n": 3 heads and 384 neurons."""
        return f"uniform-{self.heads}h{self.neurons}n"

    @property
    def size(self) -> tuple[float, ...]:
        """Heads and neurons."""
        return self.heads, self.neurons

    def describe(self, total: int) -> str:
        """Spells it out, for a model of `total` layers."""
        return f"{total} thin layers, {self.heads} head{'s' * (self.heads > 1)} and {self.neurons:,} neurons in each"

    def shrink_(self, model: PreTrainedModel) -> None:
        """Cuts it to the first heads and neurons."""
        layout = head_layout(model)
        heads = (tuple(range(self.heads)),) * layout.num_layers
        neurons = (tuple(range(self.neurons)),) * layout.num_layers
        model.prune_heads(KeepPlan(heads, layout.num_heads, neurons, layout.num_neurons))


@dataclass(frozen=True)
class Experts(Candidate):
    """A static SHRP model.

    Args:
        num_layers: Layers to convert, counted from the last.
        keep: Experts that stay in each of them.
    """

    structure: ClassVar[str] = "experts"
    num_layers: int
    keep: int

    @property
    def name(self) -> str:
        """For example "5x1": 5 layers, 1 expert in each."""
        return f"{self.num_layers}x{self.keep}"

    @property
    def size(self) -> tuple[float, ...]:
        """Fewer layers converted, then more experts."""
        return -self.num_layers, self.keep

    def describe(self, total: int) -> str:
        """Spells it out, for a model of `total` layers."""
        return f"{self.num_layers} of {total} layers converted, {self.keep} expert{'s' * (self.keep > 1)} in each"

    def layers(self, total: int) -> range:
        """Indices of the layers to convert, of `total`."""
        return range(total - self.num_layers, total)

    def shrink_(self, model: PreTrainedModel) -> None:
        """Converts it, and keeps the first experts."""
        total, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        layers = self.layers(total)
        model.convert_layers_(list(layers))
        model.prune_heads(KeepPlan(tuple(tuple(range(self.keep if i in layers else heads)) for i in range(total)), heads))


@dataclass(frozen=True)
class FirstLayers(Candidate):
    """The first layers alone, each as it is.

    Args:
        count: How many.
    """

    structure: ClassVar[str] = "first"
    count: int

    @property
    def name(self) -> str:
        """For example "first-2"."""
        return f"{self.structure}-{self.count}"

    @property
    def size(self) -> tuple[float, ...]:
        """Layers."""
        return (self.count,)

    def describe(self, total: int) -> str:
        """Spells it out, for a model of `total` layers."""
        return f"the first {self.count} of {total} layers" if self.count > 1 else f"the first of {total} layers"

    def layers(self, total: int) -> list[int]:
        """Indices of the layers that stay, of `total`."""
        return list(range(self.count))

    def shrink_(self, model: PreTrainedModel) -> None:
        """Drops the other layers."""
        layout = head_layout(model)
        path = next(name for name, module in model.named_modules() if module is layout.layers[0]).rpartition(".")[0]
        owner, _, attribute = path.rpartition(".")
        kept = [layout.layers[i] for i in self.layers(layout.num_layers)]
        setattr(model.get_submodule(owner), attribute, nn.ModuleList(kept))
        model.config.num_hidden_layers = self.count


@dataclass(frozen=True)
class SpreadLayers(FirstLayers):
    """Layers that are evenly spread, the first and the last among them, each as it is.

    Args:
        count: How many.
    """

    structure: ClassVar[str] = "spread"

    def describe(self, total: int) -> str:
        """Spells it out, for a model of `total` layers."""
        return f"{self.count} of {total} layers, evenly spread"

    def layers(self, total: int) -> list[int]:
        """Indices of the layers that stay, of `total`."""
        return spread_layers(total, self.count)


def candidates(
    model: PreTrainedModel, structures: Iterable[str] | None = None, experts: Iterable[int] | None = None
) -> list[Candidate]:
    """Lists the candidates whose shape is known before anything is scored: all but those of `Thin`.

    Uniform layers keep about the same share of heads and neurons, each number of heads once. Expert layers come in every
    depth, from the last layer alone to all of them, with every number of experts. Of layers, every number.

    Args:
        model: The dense model.
        structures: Names in `STRUCTURES`; None: all that its family can be.
        experts: Numbers of experts; None: 1, 2, 4 and so on, up to all heads.

    Raises:
        ValueError: A number of experts is out of range.
    """
    structures = possible(model, experts is not None) if structures is None else tuple(structures)
    config, layout = model.config, head_layout(model)
    heads, width, total = layout.num_heads, max(layout.num_neurons), layout.num_layers
    step = max(1, min(NEURON_STEP, width // 8))
    found: list[Candidate] = []
    if "uniform" in structures:
        found += [Uniform(count, max(step, width * count // heads // step * step)) for count in range(1, heads)]
    if "experts" in structures:
        if experts is None:
            experts = {2**i for i in range(heads.bit_length()) if 2**i <= heads} | {heads}
        keeps = sorted(set(experts))
        if not keeps or not 1 <= keeps[0] <= keeps[-1] <= heads:
            raise ValueError(f"`experts` must be between 1 and {heads}, the heads of a layer, got {keeps}.")
        found += [Experts(layers, keep) for layers in range(1, config.num_hidden_layers + 1) for keep in keeps]
    if "spread" in structures:
        found += [SpreadLayers(count) for count in range(2, total)]
    if "first" in structures:
        found += [FirstLayers(count) for count in range(1, total)]
    return found


def possible(model: PreTrainedModel, with_experts: bool = False) -> tuple[str, ...]:
    """Returns the structures that the family of a model can be.

    Args:
        model: The dense model.
        with_experts: Whether expert layers were asked for, and are not to be left out where there are none.
    """
    can_convert = with_experts or to_shrp(model).config.has_expert_layers
    return tuple(name for name in STRUCTURES if name != "experts" or can_convert)


def rungs(speedup: float | None, reach: float) -> list[float]:
    """Returns the speed-ups, by the table of times, that thin layers are searched for.

    The table is off by some percent, so what is to be reached is searched for with several margins.

    Args:
        speedup: What is to be reached; None: a quality alone is, and the rungs are those of a ladder.
        reach: The most that the table allows.
    """
    wanted = _LADDER if speedup is None else [speedup * margin for margin in _MARGINS]
    return [times for times in dict.fromkeys(round(times, 2) for times in wanted) if 1 < times <= reach]


def probes(model: PreTrainedModel) -> list[Candidate]:
    """Returns uniform layers whose measured speed tells a table of times that can be trusted: small, large, and one-sided.

    Args:
        model: The dense model.
    """
    layout = head_layout(model)
    sizes = [(c.heads, c.neurons) for c in candidates(model, ["uniform"]) if isinstance(c, Uniform)]
    if not sizes:
        return [Uniform(1, max(layout.num_neurons) // 2)]
    one_sided = [Uniform(sizes[0][0], sizes[-1][1]), Uniform(sizes[-1][0], sizes[0][1])]
    return [*(Uniform(*size) for size in (sizes[0], sizes[len(sizes) // 2])), *one_sided]


def table_error(table: CostTable, dense: PreTrainedModel, speeds: Mapping[Candidate, float]) -> float:
    """Returns by how much a table of times misjudges the measured speed of uniform layers: 0.1 is 10%, at the worst of them.

    Args:
        table: The table.
        dense: The dense model.
        speeds: Measured speed-ups; those of other structures are left out.

    Raises:
        ValueError: There is no measurement of uniform layers.
    """
    layout = head_layout(dense)
    whole = table.total(zip(map(len, layout.kept), layout.num_neurons, strict=True))
    predicted = {c: whole / table.total([(c.heads, c.neurons)] * layout.num_layers) for c in speeds if isinstance(c, Uniform)}
    if not predicted:
        raise ValueError("`speeds` must hold at least one of uniform layers, got none.")
    return math.exp(max(abs(math.log(times / speeds[c])) for c, times in predicted.items())) - 1


def untrained(dense: PreTrainedModel, candidate: Candidate) -> PreTrainedModel:
    """Returns a static model of the candidate's shape; it shares the weights that stay with `dense`, which is left alone."""
    shared: dict[int, nn.Parameter] = {id(parameter): parameter for parameter in dense.parameters()}
    model = to_shrp(copy.deepcopy(dense, shared))  # dozens of candidates would not fit into memory otherwise
    candidate.shrink_(model)
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
    """Returns, by speed, the candidates that no other of their structure beats: faster than dense, and than all better ones.

    Expected better than a candidate is one that is as large in every number (`Candidate.size`): as many layers converted or
    fewer, say, and as many experts or more. So what measured noise puts out of order is never trained.
    """

    def is_beaten(candidate: Candidate) -> bool:
        return any(
            other != candidate
            and other.structure == candidate.structure
            and all(theirs >= own for theirs, own in zip(other.size, candidate.size, strict=True))
            and speed >= speeds[candidate]
            for other, speed in speeds.items()
        )

    kept = (candidate for candidate in speeds if speeds[candidate] > 1 and not is_beaten(candidate))
    return sorted(kept, key=lambda candidate: (speeds[candidate], candidate.size))


def speed_table(speeds: Mapping[Candidate, float], speedup: float | None) -> str:
    """Returns Markdown: a line a candidate, and for expert layers a grid of layers and experts; bold where it reaches."""

    def cell(candidate: Candidate) -> str:
        text = f"{speeds[candidate]:.2f}x"
        return f"**{text}**" if speedup and speeds[candidate] >= speedup else text

    tables = []
    others = [candidate for candidate in speeds if not isinstance(candidate, Experts)]
    if others:
        tables.append(markdown_table(("candidate", "speed"), ((candidate.name, cell(candidate)) for candidate in others)))
    grid = {(c.num_layers, c.keep): cell(c) for c in speeds if isinstance(c, Experts)}
    if grid:
        keeps = sorted({keep for _, keep in grid})
        header = ["layers converted", *(f"{keep} expert{'s' * (keep > 1)}" for keep in keeps)]
        lines = ([str(layers), *(grid[layers, keep] for keep in keeps)] for layers in sorted({layers for layers, _ in grid}))
        tables.append(markdown_table(header, lines, 0))
    return "\n\n".join(tables)
