"""The model card, written from the record of what really ran: what was not measured is not in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig

from shrp_hf.card_parts import PIPELINES, loading_section
from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.publishing.record import RECORD_NAME, Measured, RunRecord, Score, kept_heads
from shrp_hf.publishing.report import write_text
from shrp_hf.tasks.task import shown

CARD_NAME = "README.md"
_TEMPLATE = Path(__file__).with_name("card_template.md")

_HEADS_SCORED = "Whole attention heads were cut out, in one shot, by a score of each head: "
METHODS = {
    "shrp": "SHRP: the heads of the expert layers became experts behind a router that picks one for each sequence; after "
    "training the most used experts stayed, the router went, and one small shared expander stands where the "
    "feed-forward network was.",
    "shrp-without-routers": "SHRP without routers: in the converted layers the heads that scored best in the dense model "
    "(`expert_selector` under the settings) became the experts at once, and one small shared expander stands where the "
    "feed-forward network was.",
    "thin": "Thin layers: the heads (by HIS) and the FFN neurons that matter most to the loss stayed, and what was cut left "
    "its mean contribution in the output biases.",
    "first-layers": "The first layers of the model alone, each as it was.",
    "spread-layers": "Some layers of the model, evenly spread over its depth, each as it was.",
    "hies": f"HIES. {_HEADS_SCORED}gradient importance and attention entropy together; the lowest went.",
    "his": f"HIS. {_HEADS_SCORED}the gradient of the loss with respect to the head's mask; the lowest went.",
    "cahp": "CAHP: heads were clustered over the whole model by how they tell the classes apart; the most important head "
    "of each cluster stayed.",
    "cahp-direct": "CAHP without its t-SNE plane, a variant of ours: heads were clustered over the whole model by how they "
    "tell the classes apart; the most important head of each cluster stayed.",
    "entropy": f"Attention entropy, a baseline. {_HEADS_SCORED}how focused its attention is; the least focused went.",
    "magnitude": f"Weight magnitude, a baseline. {_HEADS_SCORED}the norm of its weights; the smallest went.",
    "random": "Random heads, a baseline: which heads were cut out was drawn by lot.",
}
METHODS["usage"] = METHODS["shrp"]

_SHRP = """@misc{su2025shrp,
  title = {{SHRP}: Specialized Head Routing and Pruning for Efficient Encoder Compression},
  author = {Su, Zeli and Zhang, Ziyin and Zhang, Wenzheng and Liu, Zhou and Xu, Guixian and Zhang, Wentao},
  year = {2025}, eprint = {2512.20635}, archivePrefix = {arXiv}
}"""
_HIES = """@misc{choi2025hies,
  title = {Entropy Meets Importance: A Unified Head Importance-Entropy Score for Stable and Efficient Transformer Pruning},
  author = {Choi, Minsik and Son, Hyegang and Kim, Changhoon and Kim, Young Geun},
  year = {2025}, eprint = {2510.13832}, archivePrefix = {arXiv}
}"""
_CAHP = """@misc{livertovsky2026cahp,
  title = {Complementary Attention Head Pruning for Efficient Transformers},
  author = {Livertovsky, Yaniv and Somin, Shahar and Singer, Gonen},
  year = {2026}, eprint = {2606.19150}, archivePrefix = {arXiv}
}"""
_HIS = """@inproceedings{michel2019sixteen,
  title = {Are Sixteen Heads Really Better than One?},
  author = {Michel, Paul and Levy, Omer and Neubig, Graham},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {32}, year = {2019}
}"""
CITATIONS = {
    "shrp": _SHRP,
    "shrp-without-routers": _SHRP,
    "usage": _SHRP,
    "hies": _HIES,
    "cahp": _CAHP,
    "cahp-direct": _CAHP,
    "his": _HIS,
}


def write_card(folder: str | Path, record: RunRecord | None = None) -> Path:
    """Writes the card of the model in `folder`, from the record given (then also written there) or lying there.

    Args:
        folder: A saved model.
        record: How it was made; None reads `shrp_record.json`.

    Returns:
        Path of the card.

    Raises:
        ValueError: There is no model or no record, or the record is of a model with other heads.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`folder` must hold a saved model, but {str(folder)!r} has no config.json.")
    path = folder / RECORD_NAME
    if record is not None:
        record.to_json(path)
    elif not path.is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {RECORD_NAME}, and a card says only what is recorded: make the model with "
            "`shrp-hf train` or `shrp-hf prune`, or write its `RunRecord` there."
        )
    text = str(make_card(folder, record or RunRecord.from_json(path)))
    write_text(folder / CARD_NAME, text)
    return folder / CARD_NAME


def make_card(folder: Path, record: RunRecord) -> ModelCard:
    """Builds the card of the model in `folder`; the folder says how it opens, the record everything else.

    Raises:
        ValueError: The record is of a model with other heads.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (kept := kept_heads(AutoConfig.from_pretrained(folder))) != record.kept:
        raise ValueError(
            f"The record is of another model: it keeps {record.kept.kept}, the model in {str(folder)!r} {kept.kept}. "
            f"Remove {RECORD_NAME}, or make the model anew."
        )
    embeds = (folder / "modules.json").is_file()  # as sentence-transformers saves
    has_code = record.auto_class in config.get("auto_map", {})
    speed = record.model.speed if all(measured.speed for measured in record.measured) else None
    return ModelCard.from_template(
        _metadata(record, embeds),
        template_path=str(_TEMPLATE),
        record=record,
        title=_title(record),
        method=METHODS.get(record.method, f"Made by the method {record.method}."),
        loading=loading_section(record.auto_class, has_code=has_code, embeds=embeds),
        quality=_quality(record),
        cost=_cost(record),
        speed=speed,
        where=record.environment.get(
            "gpu" if speed and speed.device.startswith("cuda") else "machine", "machine not recorded"
        ),
        kept=_kept(record, config.get("intermediate_sizes")),
        drawn=[("Trained on", record.training), ("Heads chosen on (calibration)", record.calibration)],
        environment=", ".join(f"{name} {value}" for name, value in record.environment.items()),
        options=json.dumps(record.options) if record.options else "",
        limits=_limits(record, embeds),
        citation=CITATIONS.get(record.method),
    )


def _title(record: RunRecord) -> str:
    return "-".join(filter(None, (record.base_model.split("/")[-1], record.task, record.method)))


def _metadata(record: RunRecord, embeds: bool) -> ModelCardData:
    """Metadata of the card: what the Hub filters by, and the scores of this model as its `model-index`."""
    pipeline = "sentence-similarity" if embeds else PIPELINES.get(record.auto_class, "multiple-choice")
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=record.task,
            dataset_name=record.task,
            dataset_split=record.reported,
            metric_type=score.metric,
            metric_value=score.value,
            metric_args={"rows": score.total} | ({"interval_95": list(score.interval)} if score.interval else {}),
        )
        for score in record.model.scores
        if score.value is not None
    ]
    optional: dict[str, Any] = {}
    try:
        validate_repo_id(record.base_model)
        optional["base_model"] = record.base_model
    except HFValidationError:
        pass  # a directory: nothing that a reader of the card could follow
    if record.license:
        optional["license"] = record.license
    if results:
        optional |= {"eval_results": results, "model_name": _title(record)}
        optional["metrics"] = [result.metric_type for result in results]
    return ModelCardData(
        library_name="sentence-transformers" if embeds else "transformers",
        pipeline_tag=pipeline,
        tags=["shrp_hf", "pruned", record.method],
        **optional,
    )


def _score(score: Score) -> str:
    count = f"; {score.correct:,} of {score.total:,}" if score.correct is not None else ""
    interval = f" (95%: {score.interval[0]:.4f} to {score.interval[1]:.4f}{count})" if score.interval else ""
    return f"{shown(score.value)}{interval}"


def _quality(record: RunRecord) -> str:
    if not record.model.scores:
        return ""
    scores = [{score.metric: _score(score) for score in measured.scores} for measured in record.measured]
    cells = [[metric, *(cell.get(metric, "not measured") for cell in scores)] for metric in scores[-1]]
    return markdown_table(["metric", *(m.name for m in record.measured)], cells)


def _cost(record: RunRecord) -> str:
    first = record.measured[0]

    def parameters(measured: Measured, name: str) -> str:
        gone = measured.parameters.reduction_from(first.parameters)[name]
        return f"{getattr(measured.parameters, name):,}" + (f" ({-gone:+.1%})" if gone else "")

    names = {"encoder": "encoder", "encoder_and_pooler": "encoder + pooler", "whole": "whole model, without its head"}
    rows = [[f"parameters, {title}", *(parameters(m, name) for m in record.measured)] for name, title in names.items()]
    if all(m.flops for m in record.measured):
        flops = [f"{m.flops / 1e9:,.3f} G ({m.flops / first.flops:.1%})" for m in record.measured]
        rows.append(["FLOPs (a multiply-add is 2)", *flops])
    if all(m.speed for m in record.measured):
        speeds = [m.speed for m in record.measured]
        rows.append(["median latency of a batch", *(f"{speed.p50_ms:.2f} ms" for speed in speeds)])
        rows.append(["throughput", *(f"{s.sequences_per_second:,.1f} sequences/s ({s.ratio:.2f}x)" for s in speeds)])
    return markdown_table(["", *(m.name for m in record.measured)], rows)


def _kept(record: RunRecord, widths: Sequence[int] | None) -> str:
    total = record.kept.num_heads
    header = ["layer", "kind", "kept", "heads"]
    rows = [
        [
            str(layer),
            "expert layer" if layer in record.expert_layers else "ordinary",
            f"{len(heads)} of {total}",
            " ".join(map(str, heads)) if len(heads) < total else "all",
        ]
        for layer, heads in enumerate(record.kept.kept)
    ]
    if widths is not None:
        header.append("neurons")
        rows = [[*row, f"{width:,}" if width else ""] for row, width in zip(rows, widths, strict=True)]
    return markdown_table(header, rows)


def _limits(record: RunRecord, embeds: bool) -> list[str]:
    model, first, limits = record.model, record.baseline, []
    if model.scores:
        limits.append(
            f"Measured on {record.task} only; what pruning did to other data, other languages or groups of people, is not."
        )
    else:
        limits.append("Its quality was not measured.")
    if len(record.seeds) == 1:
        limits.append(f"One seed ({record.seeds[0]}): how much another one would change the figures was not measured.")
    if first and first.scores and model.scores:
        limits.append(_compared(first.scores[0], model.scores[0]))
    if first and model.speed and model.flops and first.flops:
        share = model.speed.ratio * model.flops / first.flops
        if share < 1:
            limits.append(f"The measured throughput is {share:.0%} of what the fewer FLOPs alone would give.")
    if record.expert_layers:
        limits.append("The expert layer is a reconstruction where the paper's text leaves details open.")
    library = "sentence-transformers" if embeds else "Transformers"
    limits.append(f"{library} alone cannot open it: it needs `shrp_hf`, or the trust to run the code beside the weights.")
    return limits


def _compared(first: Score, model: Score) -> str:
    if first.value is None or model.value is None:
        return f"The models are not compared: {first.metric} is undefined for a model whose predictions are constant."
    difference = f"{model.metric} is {abs(model.value - first.value):.4f}"
    text = f"{difference} {'below' if model.value < first.value else 'above'} that of the model it is compared with"
    if first.interval and model.interval and first.interval[0] <= model.interval[1] and model.interval[0] <= first.interval[1]:
        text += "; the intervals overlap, so this many rows do not tell the two apart"
    return f"{text[0].upper()}{text[1:]}."
