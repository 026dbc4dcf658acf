"""A script as users write it, for `mypy --strict`: never run, and nothing in it may be untyped or of the wrong type."""

from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import torch
from transformers import PreTrainedModel

from shrp_hf import (
    Budget,
    CahpDirectSelector,
    HiesSelector,
    KeepPlan,
    ShrpBertConfig,
    ShrpBertForSequenceClassification,
    ShrpTrainer,
    ShrpTrainingArguments,
    ShrpViTModel,
    masked_heads,
    prune_heads,
    to_shrp,
    to_stock,
)


def cut(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> PreTrainedModel:
    selector = HiesSelector(budget=Budget.fraction(0.5), alpha=0.5)
    plan = selector.select(model, batches)
    assert_type(plan, KeepPlan)
    CahpDirectSelector(budget=Budget.knee(4)).select(model, batches)
    with masked_heads(model, plan):
        model(**batches[0])
    assert_type(prune_heads(model, plan), PreTrainedModel)
    assert_type(to_stock(to_shrp(model)), PreTrainedModel)
    return prune_heads(model, {0: [1, 2]})


def train(folder: Path) -> int:
    assert_type(ShrpViTModel.from_pretrained(folder), ShrpViTModel)
    model = ShrpBertForSequenceClassification(ShrpBertConfig(num_hidden_layers=3))
    model = ShrpBertForSequenceClassification.from_pretrained("org/bert-base-sst2", expert_layers=[1, 2])
    trainer = ShrpTrainer(model=model, args=ShrpTrainingArguments(str(folder), num_expert_layers=2))
    trainer.train()
    plan = trainer.usage_plan(keep=1)
    model.prune_heads(plan)
    model.save_pretrained(folder)
    plan.to_json(folder / "plan.json")
    return KeepPlan.from_json(folder / "plan.json").num_kept
