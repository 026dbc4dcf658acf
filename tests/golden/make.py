"""Writes the golden files of the present format, once: `python -m tests.golden.make`. All later versions must read them.

Each model comes with what it answered when it was saved.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from shrp_hf import Budget, CahpSelector, HiesSelector, KeepPlan, prune_heads, to_shrp
from shrp_hf.models.configuration_shrp import FORMAT_VERSION
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats
from tests.tiny import randomize_

HERE = Path(__file__).parent
TEXT = {"vocab_size": 24, "max_position_embeddings": 16, "num_labels": 3}
SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 8}
DISTIL = {"dim": 8, "n_layers": 2, "n_heads": 4, "hidden_dim": 8}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3}
STOCK = {
    "bert": ("BertForSequenceClassification", SHAPE | TEXT),
    "bert-masked-lm": ("BertForMaskedLM", SHAPE | TEXT),
    "roberta": ("RobertaForSequenceClassification", SHAPE | TEXT),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", SHAPE | TEXT),
    "distilbert": ("DistilBertForSequenceClassification", DISTIL | TEXT),
    "electra": ("ElectraForSequenceClassification", SHAPE | TEXT | {"embedding_size": 4}),
    "vit": ("ViTForImageClassification", SHAPE | IMAGE),
}
SHRP = ("bert", "bert-masked-lm", "roberta")
ALL = (0, 1, 2, 3)
# What format 1 cannot say: whatever it can is still written as format 1, and lies in v1.
MADE = [(family, kind) for family in STOCK for kind in ("thin", "bare") if family != "bert-masked-lm"]
MADE += [("bert", "mixed")]
PLANS = {
    "pruned": KeepPlan(((0, 2), (1, 2, 3)), 4),
    "silent": KeepPlan(((1,), ()), 4),
    "static1": KeepPlan((ALL, (2,)), 4),
    "static2": KeepPlan(((1, 3), (0, 3)), 4),
    "thin": KeepPlan(((0, 2), (3,)), 4, ((1, 2, 7), (0,)), 8),
    "bare": KeepPlan(((1,), ()), 4, ((), ()), 8),
    "mixed": KeepPlan(((0, 2), (2,)), 4, ((1, 2, 7), ()), (8, 0)),
}


def stock(family: str) -> PreTrainedModel:
    name, fields = STOCK[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**fields))
    randomize_(model)
    return model.eval()


def shrp(family: str, kind: str) -> PreTrainedModel:
    model = to_shrp(stock(family))
    if kind in ("routed", "pending", "static1", "mixed"):
        model.convert_layers_([1], pending=kind == "pending")
    if kind == "static2":
        model.convert_layers_([0, 1])
    if kind == "pending":
        model.activate_layer_(1)
    randomize_(model, seed=8)
    if kind == "routed":
        model.layers[1].router.usage.copy_(torch.tensor([3, 0, 5, 2**40]))
    return prune_heads(model, PLANS[kind]) if kind in PLANS else model


def inputs(family: str) -> dict[str, torch.Tensor]:
    """The same for ever: no generator, whose numbers might change."""
    if family == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}
    ids = torch.arange(3 * 6).view(3, 6) * 7 % 20 + 3
    return {"input_ids": ids, "attention_mask": (torch.arange(6) < torch.tensor([[6], [4], [1]])).long()}


def batches() -> list[dict[str, torch.Tensor]]:
    return [inputs("bert") | {"labels": torch.tensor(labels)} for labels in ([0, 1, 0], [1, 1, 0], [0, 2, 2])]


def measured(stats: HeadStats) -> dict[str, torch.Tensor]:
    """Everything that a scoring pass leaves."""
    mean, variance = stats.class_moments()
    salience = stats.importance("batch", first_quarter=True)
    found = {
        "importance": stats.importance(), "salience": salience, "entropy": stats.entropy(), "mean": mean, "variance": variance
    }  # fmt: skip
    if stats.request.neurons:
        means = stats.output_means()
        found |= {"neurons": torch.cat(stats.neuron_importance()), "neuron_means": torch.cat(means.neurons)}
        found["head_means"] = torch.cat(means.heads)
    return found


def make(folder: Path) -> None:
    """Writes everything into a new folder."""
    folder.mkdir()
    answers = {}
    for family, kind in MADE:
        model = shrp(family, kind)
        model.save_pretrained(folder / f"{family}-{kind}")
        with torch.no_grad():
            logits = model(**inputs(family)).logits
        answers[f"{family}-{kind}"] = {"class": type(model).__name__, "usage": model.usage(), "logits": logits.tolist()}
    model = shrp("bert", "dense")
    model.save_pretrained(folder / "bert-dense")
    hies = HiesSelector(budget=Budget.heads(4))
    cahp = CahpSelector(budget=Budget.heads(4), signature_size=3, perplexity=3)
    request = hies.request | cahp.request | StatsRequest(neurons=True, means=True)
    stats = collect_head_stats(model, batches(), request, cache=folder / "scores.safetensors")
    plan = hies.select(model, stats=stats).with_neurons(((0, 5), (1, 2, 7)), 8)
    plan.to_json(folder / "plan.json")
    answers["scores"] = {name: values.tolist() for name, values in measured(stats).items()}
    (folder / "answers.json").write_text(json.dumps(answers) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = HERE / f"v{FORMAT_VERSION}"
    if target.exists():
        sys.exit(f"{target} is there, and golden files are never made again: a new format has a new FORMAT_VERSION.")
    make(target)
