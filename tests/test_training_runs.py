"""Whole runs of ShrpTrainer: resuming, logs, the best model, and experts chosen by usage."""

import copy
import logging
import re

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.pruning import to_shrp
from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.trainer import ShrpTrainer
from tests.tiny import examples, force_experts_, randomize_, same_state, tiny_routed
from tests.tiny_training import DATA, SHRP, STOCK, bert, logged, trainer_for

# The old name of the option works with every release that we support.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
ALL = (0, 1, 2, 3)


# --- resuming ---


RESUMED = (
    {},
    {"train_sampling_strategy": "group_by_length"},
    {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
)


@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_resumed_training_is_uninterrupted_training(options, tmp_path):
    options = {"num_expert_layers": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None} | options
    whole = trainer_for(tmp_path, **options)
    whole.train()
    steps, plan = whole.state.global_step, whole.usage_plan(keep=2)
    resume_at = (1, 4, 6, 9) if options.get("gradient_accumulation_steps") else (5, 6, 7, 12, 16)
    for step in resume_at:  # before, at and after a conversion, and in stage specialise
        resumed = trainer_for(tmp_path / "again", **options | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == steps
        assert resumed.model.config.expert_layers == whole.model.config.expert_layers
        assert resumed.model.config.router_aux_loss_coef == whole.model.config.router_aux_loss_coef
        assert resumed.usage_plan(keep=2) == plan
        assert same_state(resumed.model, whole.model)
        if step % 3 == 0:  # otherwise the first log covers fewer steps
            assert resumed.state.log_history[:-1] == whole.state.log_history[:-1]


# --- logs ---


def test_logs_carry_stage_losses_usage_and_entropy(tmp_path):
    sent = []

    class Report(TrainerCallback):  # what `report_to` names is a callback of this kind
        def on_log(self, args, state, control, logs=None, **kwargs):
            sent.append(dict(logs))

    trainer = trainer_for(tmp_path, num_expert_layers=2, extra={"callbacks": [Report()]})
    trainer.train()
    logs = [entry for entry in sent if "loss" in entry]
    assert [entry["stage"] for entry in logs] == [1, 1, 1, 1, 2, 2]
    for entry in logs:
        coef = 0.1 if entry["stage"] == 1 else 0.0
        assert float(entry["loss"]) == pytest.approx(entry["task_loss"] + coef * entry["balance_loss"], abs=2e-4)
    layers = [{name for name in entry if name.startswith(("usage_max", "routing_entropy"))} for entry in logs]
    last, both = ({f"{kind}/layer_{i}" for kind in ("usage_max", "routing_entropy") for i in n} for n in ([2], [1, 2]))
    assert layers == [last] * 2 + [both] * 4
    values = [entry[name] for entry, names in zip(logs, layers, strict=True) for name in names]
    assert all(0 <= value <= 1 for value in values)
    for entry in logs:  # shares of the 3 x 8 sequences since the last log
        assert entry["usage_max/layer_2"] * 24 == pytest.approx(round(entry["usage_max/layer_2"] * 24), abs=2e-3)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_usage_is_that_of_stage_specialise(options, tmp_path):
    trainer = trainer_for(tmp_path, num_expert_layers=2, **options)
    trainer.train()
    assert {layer: sum(counts) for layer, counts in trainer.model.usage().items()} == {1: 48, 2: 48}


def collapsing(folder, layer=2, **options):
    model = to_shrp(bert())
    model.convert_layers_([layer], pending=True)
    force_experts_(model, layer, [3])
    return trainer_for(folder, model, num_expert_layers=1, learning_rate=1e-6, **options)


def test_collapse_is_reported_once_a_stage(tmp_path, caplog):
    collapsing(tmp_path).train()
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message for message in found if "layer 2" in message] == [
        "Routing of layer 2 collapsed: expert 3 takes 100% of the sequences in stage balance. Raise `balance_coef`, lower "
        "the learning rate, or give `balance_epochs_per_layer` more.",
        "Expert 3 of layer 2 takes 100% of the sequences in stage specialise: keeping one expert loses little there. If "
        "several are to stay, raise `balance_coef` or shorten stage specialise.",
    ]


def test_a_single_expert_has_no_entropy_and_cannot_collapse(tmp_path, caplog):
    trainer = trainer_for(tmp_path, bert(num_attention_heads=1), num_expert_layers=2)
    trainer.train()
    values = [value for i in (1, 2) for value in logged(trainer, f"routing_entropy/layer_{i}")]
    assert len(values) == 10
    assert set(values) == {0.0}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert trainer.usage_plan().num_kept == 3


def test_balanced_routing_is_not_reported(tmp_path, caplog):
    model = to_shrp(bert())
    model.convert_layers_([2], pending=True)
    randomize_(model.layers[2].router, std=0.5)  # decided, and differently from sequence to sequence
    trainer_for(tmp_path, model, num_expert_layers=1, learning_rate=1e-6).train()
    assert not [message for message in caplog.messages if "takes" in message]


# --- the last stage decides ---


def scores(*values):
    remaining = iter(values)
    return lambda prediction: {"score": next(remaining)}


BEST = {
    "num_expert_layers": 2,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def test_best_model_is_looked_for_in_the_last_stage(tmp_path):
    extra = {"eval_dataset": DATA[:8], "compute_metrics": scores(0.9, 0.8, 0.3, 0.5, 0.4)}
    trainer = trainer_for(tmp_path, extra=extra, specialise_epochs=3, load_best_model_at_end=True, **BEST)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 24)
    checkpoint = ShrpBertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-24")
    checkpoint.finish_conversion_()
    assert same_state(trainer.model, checkpoint)
    assert trainer.model.config.pending_layers == []


def test_early_stopping_waits_for_the_last_stage(tmp_path):
    extra = {
        "eval_dataset": DATA[:8],
        "compute_metrics": scores(0.9, 0.8, 0.5, 0.4, 0.3),
        "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)],
    }
    trainer = trainer_for(tmp_path, extra=extra, specialise_epochs=3, load_best_model_at_end=True, **BEST)
    trainer.train()
    assert trainer.state.global_step == 24
    assert trainer.state.best_global_step == 18


# --- usage plans ---


class Untouchable(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise AssertionError("what is reported must not choose")


def numbered(count=64):
    return Dataset.from_list([
        {"input_ids": row["input_ids"].tolist(), "labels": row["labels"], "number": i, "text": "not a tensor"}
        for i, row in enumerate(examples(count))
    ])  # fmt: skip


def by_hand(model, rows, top=1):
    """Counts by single sequences, in a loop."""
    counts = {layer: [0] * 4 for layer in model.config.expert_layers}
    with torch.no_grad():
        for row in rows:
            ids = torch.as_tensor(row["input_ids"])[None]
            for layer, logits in zip(counts, model.eval()(input_ids=ids).router_logits, strict=True):
                for expert in logits[0].topk(top).indices.tolist():
                    counts[layer][expert] += 1
    return counts


def test_experts_are_chosen_on_a_slice_of_the_training_set(tmp_path):
    data = numbered()
    extra = {"eval_dataset": Untouchable()}
    trainer = trainer_for(tmp_path, data=data, extra=extra, num_expert_layers=2, per_device_eval_batch_size=5)
    trained, held_out = set(trainer.train_dataset["number"]), set(trainer._usage_dataset["number"])
    assert (len(trained), len(held_out)) == (48, 16)
    assert trained | held_out == set(range(64))
    assert held_out != set(range(16))
    trainer.train()
    trainer.model.train()
    plan = trainer.usage_plan(keep=2)
    assert trainer.model.training
    counts = by_hand(trainer.model, [data[i] for i in sorted(held_out)])
    assert trainer.model.usage() == counts
    assert plan.kept[0] == ALL
    for layer in (1, 2):
        assert set(plan.kept[layer]) == set(sorted(ALL, key=lambda e: -counts[layer][e])[:2])
    assert sum(map(len, trainer.usage_plan(keep=2, scope="model").kept)) == 8
    trainer.model.prune_heads(plan)
    assert trainer.model.config.kept_heads == [list(heads) for heads in plan.kept]
    assert len(trainer.predict(data).predictions) == 64


def test_slice_is_drawn_by_the_seed(tmp_path):
    def numbers(**options):
        return trainer_for(tmp_path, data=numbered(), num_expert_layers=1, **options)._usage_dataset["number"]

    assert numbers() == numbers()
    assert numbers() != numbers(seed=1)
    assert numbers(seed=1) != numbers(data_seed=3, seed=1)
    assert len(numbers(usage_holdout=0.5)) == 32


def test_plan_can_be_made_on_given_data(tmp_path):
    model = tiny_routed(2, num_labels=2, experts_per_sequence=2)
    trainer = ShrpTrainer(model, TrainingArguments(tmp_path, **STOCK))
    plan = trainer.usage_plan(DATA[:7], keep=1)
    assert model.usage() == by_hand(model, DATA[:7], top=2)
    assert plan.num_kept == 6


def test_model_init_also_sets_a_slice_aside(tmp_path):
    args = ShrpTrainingArguments(tmp_path, num_expert_layers=1, **SHRP)
    trainer = ShrpTrainer(args=args, model_init=lambda: bert(), train_dataset=numbered())
    assert len(trainer.train_dataset) == 48
    trainer.train()
    assert trainer.model.config.expert_layers == [2]
    assert trainer.usage_plan().num_kept == 9


def test_without_routers_nothing_is_held_out(tmp_path):
    trainer = ShrpTrainer(bert(), TrainingArguments(tmp_path, **STOCK), train_dataset=DATA)
    assert trainer.train_dataset is DATA
    message = "The model has no routed expert layers: convert some with `num_expert_layers`."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.usage_plan()


@pytest.mark.parametrize("data", [None, Dataset.from_list(DATA[:8]).to_iterable_dataset()], ids=["none", "without a length"])
def test_plan_without_a_slice_is_refused(data, tmp_path):
    trainer = ShrpTrainer(tiny_routed(2), TrainingArguments(tmp_path, max_steps=1, **STOCK), train_dataset=data)
    message = (
        "`usage_plan()` counts on a slice held out of `train_dataset`, but there is none (no training set, or one without a "
        "length): give `usage_plan(dataset)` data that is not what you report on."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.usage_plan()


# --- all together ---


@pytest.mark.slow
def test_what_was_learned_survives_conversion_and_pruning(tmp_path):
    """Are most tokens from the first half of the vocabulary? One expert is left in each of two of three layers."""

    def rows(count, seed):
        return [row | {"labels": int((row["input_ids"] < 50).sum() > 6)} for row in examples(count, length=12, seed=seed)]

    def accuracy(trainer):
        prediction = trainer.predict(unseen)
        return (prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean()

    seen, unseen = rows(1024, seed=1), rows(512, seed=2)
    options = {"learning_rate": 2e-3, "per_device_train_batch_size": 32, "logging_steps": 50}
    dense = Trainer(bert(), TrainingArguments(tmp_path, num_train_epochs=8, **STOCK | options), train_dataset=seen)
    dense.train()
    stages = {"num_expert_layers": 2, "balance_epochs_per_layer": 3, "specialise_epochs": 6}
    teacher = copy.deepcopy(dense.model)
    trainer = trainer_for(tmp_path, dense.model, seen, extra={"teacher": teacher}, **options, **stages)
    trainer.train()
    assert accuracy(trainer) > 0.8
    trainer.model.prune_heads(trainer.usage_plan(keep=1))
    assert trainer.model.config.kept_heads[0] == [0, 1, 2, 3]
    assert [len(heads) for heads in trainer.model.config.kept_heads] == [4, 1, 1]
    assert accuracy(trainer) > 0.75
