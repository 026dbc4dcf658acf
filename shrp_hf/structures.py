"""Smaller models cut from a dense one, ready for `recipes.recover`: thin layers, or fewer layers.

Expert layers (SHRP) are `recipes.convert`'s. A thin student from beginning to end:

    setup = Setup(task.tokenize(tokenizer, max_length=128, model=dense), tokenizer, Path("out"))
    student = recover(thin(dense, Budget.speedup(4), setup), dense, setup, find_recipe("default"))
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shrp_hf.defaults import CALIBRATION_SAMPLES
from shrp_hf.families import head_layout
from shrp_hf.measuring import CostTable
from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats
from shrp_hf.selectors import HisSelector
from shrp_hf.training.recipes import Setup
from shrp_hf.training.sampling import calibration_batches

_REQUEST = StatsRequest(importance=True, neurons=True, means=True)


def score(dense: PreTrainedModel, setup: Setup, *, cache: str | Path | None = None) -> HeadStats:
    """Scores heads and neurons, and collects their mean contributions, in one pass; on the GPU where there is one.

    Args:
        dense: The fine-tuned dense model; left as it is, and where it is.
        setup: Its training rows are those that are scored on, `CALIBRATION_SAMPLES` of them drawn by its seed.
        cache: A file that keeps what was collected; see `collect_head_stats`.
    """
    train, shape = setup.data["train"], {"batch_size": setup.batch_size, "seed": setup.seed}
    batches = calibration_batches(train, setup.tokenizer, CALIBRATION_SAMPLES, **shape)
    home = dense.device
    try:
        return collect_head_stats(dense.to("cuda" if torch.cuda.is_available() else home), batches, _REQUEST, cache=cache)
    finally:
        dense.to(home)


def thin_plan(dense: PreTrainedModel, budget: Budget, stats: HeadStats, *, uniform: bool = False) -> KeepPlan:
    """Chooses the heads (by HIS) and the FFN neurons (by importance) of thin layers.

    Args:
        dense: The fine-tuned dense model, on the CPU where a table of times is to be measured.
        budget: What fits: `Budget.speedup(4)`, `Budget.flops(keep=0.2)`, `Budget.parameters(keep=0.5)`, or
            `Budget.fraction(0.25)`, a quarter of both.
        stats: From `score`, of this model.
        uniform: As many heads and as many neurons in every layer; else as many as pay most in all, layer by layer.

    Raises:
        ValueError: The budget cannot be met, which the message says with what can, or says nothing about neurons.
    """
    return HisSelector(budget=budget, neurons=True, per_layer=uniform).select(dense, stats=stats)


def thin(
    dense: PreTrainedModel, budget: Budget, setup: Setup, *, uniform: bool = False, stats: HeadStats | None = None
) -> PreTrainedModel:
    """Cuts a copy of `dense` to thin layers: few heads and few neurons, those that matter most.

    What was cut leaves its mean contribution in the output biases.

    Args:
        dense: The fine-tuned dense model; left as it is.
        budget: As in `thin_plan`; one that the model cannot meet is refused before anything is scored.
        setup: Whose rows are scored on.
        uniform: As in `thin_plan`.
        stats: From `score`; None: scored here.

    Returns:
        The smaller model, in evaluation mode, not yet trained: `recover` it.

    Raises:
        ValueError: See `thin_plan`; or the family is not supported.
    """
    HisSelector(budget=budget, neurons=True, per_layer=uniform).check(dense)
    stats = score(dense, setup) if stats is None else stats
    return cut(dense, thin_plan(dense, budget, stats, uniform=uniform), stats)


def uniform_plan(dense: PreTrainedModel, heads: int, neurons: int, stats: HeadStats) -> KeepPlan:
    """Chooses as many heads and as many neurons of every layer, those that matter most in it.

    Args:
        dense: The fine-tuned dense model.
        heads: Heads of each layer.
        neurons: FFN neurons of each layer.
        stats: From `score`, of this model.

    Raises:
        ValueError: A layer has not as many, or `stats` are of another model.
    """
    layout = head_layout(dense)
    width = max(layout.num_neurons)
    if not 1 <= heads <= layout.num_heads or not 0 <= neurons <= width:
        raise ValueError(
            f"`heads` must be 1 to {layout.num_heads} and `neurons` 0 to {width}, those of a layer, got {heads} and {neurons}."
        )
    if stats.widths != layout.num_neurons:
        raise ValueError("`stats` are those of a model with other neurons: score this model.")
    plan = HisSelector(budget=Budget.heads(heads * layout.num_layers), per_layer=True).select(dense, stats=stats)
    best = [scores.sort(descending=True, stable=True).indices[:neurons] for scores in stats.neuron_importance()]
    return plan.with_neurons([sorted(kept.tolist()) for kept in best], layout.num_neurons)


def thin_reach(dense: PreTrainedModel, table: CostTable) -> float:
    """Returns how many times as fast thin layers can become, by a table: with the fewest heads and neurons in every layer.

    Args:
        dense: The dense model.
        table: What heads and neurons cost.
    """
    return 1 / HisSelector(budget=Budget.speedup(1, table=table), neurons=True).least_share(dense)


def cut(dense: PreTrainedModel, plan: KeepPlan, stats: HeadStats) -> PreTrainedModel:
    """Cuts a copy of `dense` by a plan; what goes leaves its mean contribution in the output biases.

    Args:
        dense: The dense model; left as it is.
        plan: What stays.
        stats: From `score`, of this model.

    Returns:
        The smaller model, all of it trainable, in evaluation mode.

    Raises:
        ValueError: The plan or the statistics are of another model.
    """
    # A dense model that taught before comes frozen.
    return prune_heads(dense, plan, stats.output_means()).requires_grad_(True).eval()


def keep_layers(dense: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Returns a new model of some layers of a dense model; all else is the same.

    Args:
        dense: A dense model of a supported family; left as it is.
        layers: Indices of the layers, ascending: `range(4)` are the first four, `spread_layers(12, 4)` four of them all.

    Raises:
        ValueError: The model is not dense, there are no such layers, or the first is left out of a family that needs it.
    """
    dense = to_shrp(dense)
    config = copy.deepcopy(dense.config)
    total, layers = config.num_hidden_layers, list(layers)
    is_cut = config.kept_heads is not None or config.intermediate_sizes is not None or config.expert_layers
    if not layers or layers != sorted(set(layers) & set(range(total))) or is_cut:
        raise ValueError(f"`layers` must be some of the {total} layers of a dense model, ascending, got {layers}.")
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    short = type(dense)(config).to(dense.device, dense.dtype)
    names = {id(module): name for name, module in dense.named_modules()}
    prefixes = {f"{names[id(layer)]}.": i for i, layer in enumerate(head_layout(dense).layers)}
    weights = {}
    for name, weight in dense.state_dict().items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            weights[name] = weight
        elif prefixes[prefix] in layers:
            start, end = prefix[:-1].rpartition(".")[0], name.removeprefix(prefix)
            weights[f"{start}.{layers.index(prefixes[prefix])}.{end}"] = weight
    if weights.keys() != short.state_dict().keys():
        raise ValueError(
            f"`layers` must begin with 0, got {layers}: the first layer of a {type(dense).__name__} has another form."
        )
    short.load_state_dict(weights)
    return short.train(dense.training)


def spread_layers(total: int, count: int) -> list[int]:
    """Returns `count` of `total` layers, as evenly spread as they can be, the first and the last among them.

    Args:
        total: Layers that there are.
        count: Layers that stay; of a single one it is the first.

    Raises:
        ValueError: `count` is out of range.
    """
    if not 1 <= count <= total:
        raise ValueError(f"`count` must be between 1 and the {total} layers of the model, got {count}.")
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
