"""The pass over calibration batches that measures every head, and the one score that needs no data."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed
from transformers import PreTrainedModel

from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.models.outputs import probe_loss, vectors_of
from shrp_hf.models.rebuilding import check_plain
from shrp_hf.numerics import origin_of
from shrp_hf.scoring.progress import Progress
from shrp_hf.scoring.recorder import HeadRecorder
from shrp_hf.scoring.stats import HeadStats, StatsRequest


def collect_head_stats(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    request: StatsRequest,
    *,
    cache: str | Path | None = None,
    save_every: int = 50,
) -> HeadStats:
    """Measures all that `request` names in one pass; the model is afterwards as it was.

    Under `torch.distributed` every process calls this with its share of the batches (and its own `cache`), and all
    get the statistics of all. Sums are kept in float64 or exact integers whatever the model's precision.

    Args:
        model: An encoder whose loss is the mean over samples or over labelled tokens; or an embedding model, whose heads
            matter by how far they move its vectors (`probe_loss`).
        batches: What a Transformers collator yields: mappings with `input_ids` or `pixel_values`, `attention_mask` and
            `labels`.
        request: What to measure.
        cache: A file that keeps the sums. A pass that was interrupted goes on after the last batches saved; a finished
            one is read back. The batches must come in the same order.
        save_every: Batches between two saves.

    Raises:
        ValueError: The model has no scorable head; a batch is empty, has no labels where they are needed, or gives
            NaN; the task has no classes where signatures need them; attention maps are missing; or `cache` is of
            another pass.
        RuntimeError: Another process failed.
    """
    layout = head_layout(model)
    quarter = _first_quarter(batches) if request.salience else 0
    heads, classes = scored_heads(layout), _num_classes(model, request)
    if request.neurons and not layout.ffn_layers:
        raise ValueError("`model` has no FFN neurons left: leave `neurons` out of the request.")
    stats = HeadStats.empty(request, heads, layout.num_heads, classes, layout.num_neurons, layout.head_size)
    error: Exception | None = None
    try:
        progress = Progress(cache, model, stats, quarter)
        stats = progress.stats
        _run(model, batches, layout, progress, quarter, save_every)
    except Exception as failure:  # raised below: the other processes wait for this one
        error = failure
    return _joined(stats, error, model.device)


def scored_heads(layout: HeadLayout) -> tuple[tuple[int, ...], ...]:
    """Per layer the original indices of the heads that have a score: none in expert layers.

    Raises:
        ValueError: A router still runs, or there is no ordinary layer.
    """
    if layout.is_routed:
        raise ValueError(
            f"Layers {list(layout.expert_layers)} are routed: which expert runs depends on the input, so their heads "
            "have no post-hoc score. Choose experts by usage (`UsageSelector`, `trainer.usage_plan()`), prune first."
        )
    if not layout.ordinary_layers:
        raise ValueError("`model` has expert layers only, which have no post-hoc score: nothing is left to choose.")
    return tuple(heads if i in layout.ordinary_layers else () for i, heads in enumerate(layout.kept))


def weight_magnitude(model: PreTrainedModel) -> torch.Tensor:
    """L2 norm of a head's weights (rows of query, key and value, columns of the output), shape (layers, heads).

    NaN where a layer has no such head.

    Raises:
        ValueError: A projection is wrapped, so its weight is not all that it computes with.
    """
    layout = head_layout(model)
    check_plain({i: layout.layers[i] for i in layout.ordinary_layers}, layout.layer_map)
    stats = HeadStats.empty(StatsRequest(), scored_heads(layout), layout.num_heads)
    squares = []
    for layer in layout.ordinary_layers:
        weights = [weight for weight, _ in layout.heads_in(layer)] + [layout.output(layer).weight.T]
        parts = [weight.detach().double().unflatten(0, (-1, layout.head_size)) for weight in weights]
        squares.append(sum(part.square().sum(dim=(1, 2)) for part in parts))  # (heads of the layer,)
    return stats.grid(torch.cat(squares).sqrt().cpu())


def neuron_magnitude(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """L2 norm of a neuron's weights (its rows, its column): per layer shape (neurons,), float64; empty where it has none."""
    layout = head_layout(model)
    norms = [torch.zeros(0, dtype=torch.float64)] * layout.num_layers
    for layer in layout.ffn_layers:
        weights = [weight for weight, _ in layout.neurons_in(layer)] + [layout.neurons_out(layer).weight.T]
        norms[layer] = sum(weight.detach().double().square().sum(dim=1) for weight in weights).sqrt().cpu()
    return tuple(norms)


def _run(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    layout: HeadLayout,
    progress: Progress,
    quarter: int,
    save_every: int,
) -> None:
    request, num_batches = progress.stats.request, 0
    for name in ("signature", "signature_squares", "signature_counts") if request.signature_size else ():
        progress.stats.sums[name] = progress.stats.sums[name].to(model.device)
    recorder = HeadRecorder(layout, progress.stats)
    with _scoring(model, request), recorder.attached():
        for index, batch in enumerate(batches):
            if not isinstance(batch, Mapping):
                raise ValueError(f"Batch {index} is a {type(batch).__name__}, but must be a mapping of model inputs.")
            num_batches = index + 1
            if progress.is_done(index, batch):
                continue
            targets = ["importance"] * request.importance + ["salience"] * (request.salience and index < quarter)
            targets += ["neurons"] * request.neurons
            _score(model, recorder, index, batch, targets)
            if num_batches % save_every == 0:
                progress.save(num_batches)
    progress.save(num_batches)


def _score(
    model: PreTrainedModel, recorder: HeadRecorder, index: int, batch: Mapping[str, torch.Tensor], targets: list[str]
) -> None:
    batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    batch_size = next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), 0)
    if not batch_size:
        raise ValueError(f"Batch {index} is empty: it must hold `{model.main_input_name}` of at least one sample.")
    if recorder.stats.request.signature_size:
        _check_classes(model, index, batch)
    recorder.begin(index, batch, targets)
    with torch.inference_mode(False), torch.set_grad_enabled(bool(targets)):
        output = model(**batch, return_dict=True)
        loss, vectors = getattr(output, "loss", None), vectors_of(model, output, batch.get("attention_mask"))
        if targets and loss is None and vectors is not None:
            loss = probe_loss(vectors, index)
        if loss is not None and not loss.isfinite():
            raise ValueError(
                f"The loss of batch {index} is {loss.item()}: {origin_of(model, batch)}. Check that batch, or score in "
                "float32 if the model is in half precision."
            )
        recorder.end(loss, batch_size)


def _num_classes(model: PreTrainedModel, request: StatsRequest) -> int:
    """Returns the number of classes that signatures are told apart by, 0 where there are no signatures."""
    if not request.signature_size:
        return 0
    problem, count = getattr(model.config, "problem_type", None), model.config.num_labels
    if problem in ("regression", "multi_label_classification") or count < 2:
        raise ValueError(
            f"Signatures compare classes, but `model` has problem_type={problem!r} and num_labels={count}: take "
            "another selector (HIES, HIS) for this task."
        )
    return count


def _check_classes(model: PreTrainedModel, index: int, batch: Mapping[str, torch.Tensor]) -> None:
    labels, count = batch.get("labels"), model.config.num_labels
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"Batch {index} has no `labels`: signatures are summed per class.")
    if labels.dim() != 1 or labels.is_floating_point() or batch.get("input_ids", labels).dim() > 2:
        raise ValueError(
            f"`labels` of batch {index} have shape {tuple(labels.shape)} and type {labels.dtype}, but signatures need "
            "one class per sample: take another selector (HIES, HIS) for token, multiple-choice and regression tasks."
        )
    if labels.min() < 0 or labels.max() >= count:
        found = labels.unique().tolist()
        raise ValueError(f"`labels` of batch {index} must be classes 0 to {count - 1}, got {found}.")


def _first_quarter(batches: Iterable) -> int:
    if not isinstance(batches, Sized):
        raise ValueError(
            f"`batches` ({type(batches).__name__}) has no length, but the salience of CAHP is measured on its first "
            "quarter: give a list or a DataLoader."
        )
    return math.ceil(len(batches) / 4)


@contextmanager
def _scoring(model: PreTrainedModel, request: StatsRequest) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, eager attention where maps are read; undone at the end."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attention, problem = model.config._attn_implementation, getattr(model.config, "problem_type", None)
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        if request.needs_attention_maps:
            model.set_attn_implementation("eager")
        yield
    finally:
        model.config.problem_type = problem  # a first forward with labels fills it in
        if request.needs_attention_maps:
            model.set_attn_implementation(attention)
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


def _joined(stats: HeadStats, error: Exception | None, device: torch.device) -> HeadStats:
    """Adds the sums of all processes; raises in all of them when one has failed."""
    sums = {name: tensor.cpu() for name, tensor in stats.sums.items()}
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        where = device if distributed.get_backend() == "nccl" else torch.device("cpu")
        failed = torch.tensor([float(error is not None)], device=where)
        distributed.all_reduce(failed)
        if failed and error is None:
            raise RuntimeError(f"{int(failed)} other process(es) failed to score: their own message says why.")
        if error is None:
            for name, tensor in sums.items():
                total = tensor.to(where)
                distributed.all_reduce(total)
                sums[name] = total.cpu()
    if error is not None:
        raise error
    if any((sums[name] == 0).all() for name in sums if name.endswith("_counts")):
        raise ValueError("`batches` is empty (or all its labels are -100): give at least one batch.")
    return replace(stats, sums=sums)
