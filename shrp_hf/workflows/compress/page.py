"""Parts of `report.html` of a compression: the frontier of what was tried, and the heads and neurons that each keeps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoConfig

from shrp_hf.publishing.page import Point, frontier, head_map, on_demand
from shrp_hf.tasks.task import shown
from shrp_hf.workflows.compress.candidates import Candidate
from shrp_hf.workflows.compress.search import Trial, share_text


def trial_frontier(
    trials: Sequence[Trial],
    speeds: Mapping[Candidate, float],
    points: Mapping[str, Sequence[tuple[float, float, float, float]]],
    dense: tuple[str, float, int],
    picture: Path,
) -> str:
    """Returns the HTML of held-out quality against measured speed, a series for each structure.

    Args:
        trials: What was tried.
        speeds: Predicted speed-up of each candidate.
        points: Name of a candidate -> (speed-up, quality, low, high), where its quality is defined.
        dense: Name of the metric, the dense model's quality by it, and its layers.
        picture: A PNG file of the same, which stands in where plotly is not installed.
    """
    name, quality, total = dense
    found = []
    for trial in trials:
        candidate = trial.candidate
        tells = (
            f"{candidate.name}: {candidate.describe(total)}",
            f"held-out {name} {shown(trial.quality)} ({share_text(trial.retention)} of dense)",
            f"{trial.speedup:.2f}x measured, {speeds[candidate]:.2f}x predicted",
        )
        found += [Point(candidate.structure, *point, tells) for point in points.get(candidate.name, ())]
    if math.isnan(quality):
        return ""
    return frontier(found, quality, f"held-out {name}", "measured throughput, times that of dense", picture)


def trial_maps(trials: Sequence[Trial], folder: Path, total: int) -> str:
    """Returns the HTML of which heads and neurons each trial keeps, shown on demand.

    Args:
        trials: What was tried.
        folder: Directory with the models of the trials, by name.
        total: Layers of the dense model.
    """
    parts = []
    for trial in trials:
        config = AutoConfig.from_pretrained(folder / trial.candidate.name)
        layers, heads = range(config.num_hidden_layers), range(config.num_attention_heads)
        rates = [[float(head in config.heads_of(layer)) for head in heads] for layer in layers]
        neurons = [config.num_neurons_of(layer) / config.ffn_width for layer in layers]
        drawn = head_map(rates, None if config.intermediate_sizes is None else neurons)
        parts.append(on_demand(f"{trial.candidate.name}: {trial.candidate.describe(total)}", drawn))
    return "".join(parts)
