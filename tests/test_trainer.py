"""ShrpTrainer: conversion under way, gradients, resuming, logs, and experts chosen by usage."""

import logging
import re
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from shrp_hf import ShrpBertForSequenceClassification
from shrp_hf.plan import KeepPlan
from shrp_hf.surgery import prune_heads, to_shrp
from shrp_hf.trainer import ShrpTrainer
from shrp_hf.training_args import ShrpTrainingArguments
from tests.tiny import NO_DROPOUT, batch, examples, force_experts_, randomize_, same_state, tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)
DATA = examples(64)  # 48 to train on, 16 held out: 6 steps an epoch
STOCK = {
    "use_cpu": True,
    "report_to": "none",
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_steps": 3,
    "disable_tqdm": True,
}
SHRP = STOCK | {"usage_holdout": 0.25}


def bert(**fields):
    return tiny_bert(num_labels=2, **fields)


def trainer_for(folder, model=None, data=DATA, extra=None, **options):
    """A ShrpTrainer on a stock BERT; `extra` goes to the trainer, `options` to its arguments."""
    args = ShrpTrainingArguments(folder, **(SHRP | options))
    return ShrpTrainer(bert() if model is None else model, args, train_dataset=data, **(extra or {}))


class Watch(TrainerCallback):
    """Notes at every step which layers are expert layers and how much the balance loss weighs."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((tuple(model.config.expert_layers), model.config.router_aux_loss_coef))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- conversion ---


def test_stock_bert_is_converted_and_lives_in_the_trainer(tmp_path):
    stock, watch = bert(), Watch()
    trainer = trainer_for(tmp_path, stock, num_expert_layers=2, extra={"callbacks": [watch]})
    assert isinstance(trainer.model, ShrpBertForSequenceClassification)
    trainer.train()
    assert watch.seen == [((2,), 0.1)] * 6 + [((1, 2), 0.1)] * 6 + [((1, 2), 0.0)] * 6
    assert (trainer.model.config.expert_layers, trainer.model.config.pending_layers) == ([1, 2], [])
    names = [name for name in trainer.model.state_dict() if re.search(r"layer\.[12]\.", name)]
    assert not [name for name in names if re.search(r"\.(intermediate|output)\.", name)]
    assert logged(trainer, "epoch")[-1] == 3


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        pytest.param(
            {"expert_layers": [0, 2], "conversion_order": "first_first", "balance_coef": 0.5},
            [((0,), 0.5)] * 6 + [((0, 2), 0.5)] * 6 + [((0, 2), 0.0)] * 6,
            id="named, first first",
        ),
        pytest.param(
            {"num_expert_layers": 2, "balance_steps_per_layer": 2, "specialise_steps": 3},
            [((2,), 0.1)] * 2 + [((1, 2), 0.1)] * 2 + [((1, 2), 0.0)] * 3,
            id="in steps",
        ),
        pytest.param(
            {"num_expert_layers": 2, "balance_epochs_per_layer": 0.5, "specialise_epochs": 0},
            [((2,), 0.1)] * 3 + [((1, 2), 0.1)] * 3,
            id="parts of an epoch, no specialising",
        ),
        pytest.param(
            {"num_expert_layers": 1, "gradient_accumulation_steps": 2},
            [((2,), 0.1)] * 3 + [((2,), 0.0)] * 3,
            id="accumulation",
        ),
    ],
)
def test_layers_are_converted_when_the_arguments_say(options, seen, tmp_path):
    watch = Watch()
    trainer = trainer_for(tmp_path, extra={"callbacks": [watch]}, **options)
    trainer.train()
    assert watch.seen == seen
    assert trainer.model.config.pending_layers == []


def test_plain_arguments_convert_nothing_and_train_as_trainer_does(tmp_path):
    args = TrainingArguments(tmp_path, max_steps=5, **STOCK)
    by_stock = Trainer(to_shrp(bert()), args, train_dataset=DATA)
    by_stock.train()
    for arguments in (args, ShrpTrainingArguments(tmp_path, max_steps=5, **STOCK)):
        model = bert()
        ours = ShrpTrainer(model, arguments, train_dataset=DATA)
        assert ours.model is model
        ours.train()
        assert same_state(ours.model, by_stock.model)


def test_layers_that_are_experts_already_are_only_trained(tmp_path):
    model = tiny_routed([2], num_labels=2)
    start = model.layers[2].attention.self.query.weight.detach().clone()
    trainer = ShrpTrainer(model, TrainingArguments(tmp_path, max_steps=4, **STOCK), train_dataset=DATA)
    trainer.train()
    assert trainer.model is model
    assert (model.config.expert_layers, model.config.pending_layers) == ([2], [])
    assert not torch.equal(model.layers[2].attention.self.query.weight, start)
    assert sum(model.usage()[2]) == 4 * 8


@pytest.mark.parametrize(("converted", "epochs", "seen"), [
    ([2], 2, [((1, 2), 0.1)] * 6 + [((1, 2), 0.0)] * 6),
    ([1, 2], 1, [((1, 2), 0.25)] * 6),
])  # fmt: skip
def test_only_what_is_left_is_converted(converted, epochs, seen, tmp_path):
    model, watch = tiny_routed(converted, num_labels=2), Watch()
    model.config.router_aux_loss_coef = 0.25
    trainer = trainer_for(tmp_path, model, num_expert_layers=2, extra={"callbacks": [watch]})
    assert trainer.args.num_train_epochs == epochs
    trainer.train()
    assert watch.seen == seen
    assert model.config.expert_layers == [1, 2]


@pytest.mark.parametrize("trainer_class", [Trainer, ShrpTrainer])
def test_static_model_is_trained_as_it_is(trainer_class, tmp_path):
    model = prune_heads(tiny_routed(2, num_labels=2), KeepPlan(((0, 3), (1,), (0, 2)), 4))
    names = set(model.state_dict())
    trainer = trainer_class(model, TrainingArguments(tmp_path, max_steps=30, **STOCK | {"learning_rate": 5e-3}), train_dataset=DATA[:8])
    trainer.train()
    assert set(trainer.model.state_dict()) == names
    assert float(logged(trainer, "loss")[-1]) < 0.5 * float(logged(trainer, "loss")[0])
    assert not logged(trainer, "balance_loss")


def test_training_that_ends_early_leaves_layers_pending_and_says_so(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = trainer_for(tmp_path, num_expert_layers=2, extra={"callbacks": [Stop()]})
    trainer.train()
    assert (trainer.model.config.expert_layers, trainer.model.config.pending_layers) == ([2], [1, 2])
    assert "Training ended before layers [1] were converted; they stay pending." in caplog.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_expert_layers": 4}, "`num_expert_layers` must be between 1 and 3 layers, got 4."),
        ({"expert_layers": [1, 3]}, "`expert_layers` names layer 3, but the model's layers are 0 to 2."),
    ],
)
def test_layers_that_are_not_there_are_refused(options, message, tmp_path):
    stock = bert()
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer_for(tmp_path, stock, **options)
    assert all(torch.equal(before[name], value) for name, value in stock.state_dict().items())


def test_pruned_model_is_not_converted(tmp_path):
    model = prune_heads(bert(), {0: [1]})
    with pytest.raises(ValueError, match=r"^`expert_layers=\[2\]` cannot be converted: this model is already pruned"):
        trainer_for(tmp_path, model, num_expert_layers=1)


def test_data_parallel_is_refused(tmp_path):
    args = ShrpTrainingArguments(tmp_path, num_expert_layers=1, **SHRP)
    args.n_gpu  # noqa: B018 - sets the devices up, after which the number can be set
    args._n_gpu = 2
    message = (
        "DataParallel over 2 GPUs cannot count usage: start with `accelerate launch` for one process per GPU, or show one "
        "GPU with CUDA_VISIBLE_DEVICES."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpTrainer(bert(), args, train_dataset=DATA)


def test_fsdp_of_the_launcher_is_refused_while_layers_are_pending(tmp_path):
    trainer = trainer_for(tmp_path, num_expert_layers=1)
    trainer.is_fsdp_enabled = True  # as `accelerate launch --use_fsdp` sets it
    message = (
        "`fsdp` cannot be used while layers are pending, because what runs changes under way. Convert under DDP, or at once "
        "with `from_pretrained(..., expert_layers=n)`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer._check_parallelism()


# --- losses and gradients ---


def routed(coef=0.0, **fields):
    model = tiny_routed(2, num_labels=2, dtype=torch.float64, **NO_DROPOUT, **fields)
    model.config.router_aux_loss_coef = coef
    return model


def static():
    return prune_heads(routed(), KeepPlan((ALL, (1,), (0, 2)), 4))


def one_step_gradients(trainer_class, model, folder, micro_batch, accumulation, **options):
    """What one step of plain SGD at rate 1 takes off each weight."""
    args = TrainingArguments(folder, **STOCK | {
        "per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation, "max_steps": 1,
        "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    } | options)  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    is_held_out = trainer_class is ShrpTrainer and getattr(model.config, "is_routed", False)  # one of nine, then
    trainer = trainer_class(model, args, train_dataset=examples(9 if is_held_out else 8))
    trainer.train()
    return torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2}], ids=["plain", "label smoothing"])
@pytest.mark.parametrize("build", [lambda: to_shrp(bert(dtype=torch.float64, **NO_DROPOUT)), routed, static], ids=[
    "dense", "routed", "static",
])  # fmt: skip
@pytest.mark.parametrize("trainer_class", [Trainer, ShrpTrainer])
def test_accumulated_gradients_are_those_of_the_whole_batch(trainer_class, build, options, tmp_path):
    whole = one_step_gradients(trainer_class, build(), tmp_path, 8, 1, **options)
    parts = one_step_gradients(trainer_class, build(), tmp_path, 2, 4, **options)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


def test_stock_heads_inflate_the_gradients_without_our_flag(tmp_path, monkeypatch):
    whole = one_step_gradients(Trainer, static(), tmp_path, 8, 1)
    monkeypatch.delattr("shrp_hf.models.modeling_shrp.ShrpModelMixin.accepts_loss_kwargs")
    inflated = one_step_gradients(Trainer, static(), tmp_path, 2, 4)
    torch.testing.assert_close(inflated, 4 * whole, rtol=0, atol=1e-9)


def test_stock_model_is_not_inflated_by_our_trainer(tmp_path):
    whole = one_step_gradients(ShrpTrainer, bert(dtype=torch.float64, **NO_DROPOUT), tmp_path, 8, 1)
    parts = one_step_gradients(ShrpTrainer, bert(dtype=torch.float64, **NO_DROPOUT), tmp_path, 2, 4)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2}], ids=["plain", "label smoothing"])
def test_balance_loss_is_in_the_training_loss_only(options, tmp_path):
    model, inputs = routed(coef=0.5), batch() | {"labels": torch.arange(5) % 2}
    trainer = ShrpTrainer(model.train(), TrainingArguments(tmp_path, **STOCK | options), train_dataset=DATA)
    loss = trainer.compute_loss(model, dict(inputs))
    output = model(**inputs)
    task = output.task_loss
    if options:
        log_p = output.logits.log_softmax(dim=-1)
        task = 0.8 * task + 0.2 * -log_p.mean()
    torch.testing.assert_close(loss, task + 0.5 * output.balance_loss)
    torch.testing.assert_close(trainer.compute_loss(model.eval(), dict(inputs)), task)


def test_own_loss_function_keeps_the_balance_loss_and_its_scale(tmp_path):
    def cross_entropy(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def gradients(**extra):
        args = TrainingArguments(tmp_path, **STOCK | {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, "optim": "sgd",
            "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        })  # fmt: skip
        model = routed(coef=0.5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ShrpTrainer(model, args, train_dataset=examples(9), **extra).train()
        return torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])

    torch.testing.assert_close(gradients(compute_loss_func=cross_entropy), gradients(), rtol=0, atol=1e-10)


def test_bfloat16_on_the_cpu_trains(tmp_path):
    trainer = trainer_for(tmp_path, num_expert_layers=2, bf16=True)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    losses = logged(trainer, "task_loss")
    assert losses[-1] < losses[0]


def test_predictions_hold_logits_alone(tmp_path):
    trainer = ShrpTrainer(tiny_routed(2), TrainingArguments(tmp_path, **STOCK))
    assert trainer.predict(DATA).predictions.shape == (64, 3)


# --- learning rate ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [1e-3] * 4 + [1e-3, 5e-4], id="constant, then linear"),
        pytest.param({"lr_scheduler_type": "constant"}, [1e-3] * 6, id="constant throughout"),
        pytest.param({"balance_learning_rate": 4e-3}, [4e-3] * 4 + [1e-3, 5e-4], id="a rate for each stage"),
        pytest.param(
            {"balance_lr_scheduler_type": "linear"}, [1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-3, 5e-4], id="linear in both"
        ),
        pytest.param({"warmup_steps": 2}, [0, 5e-4, 1e-3, 1e-3, 1e-3, 5e-4], id="warm-up"),
    ],
)
def test_learning_rate_is_constant_in_balance_then_decays(options, expected, tmp_path):
    class Rates(TrainerCallback):
        seen = []

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.seen.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    rates.seen = []
    steps = {"num_expert_layers": 2, "balance_steps_per_layer": 2, "specialise_steps": 2}
    trainer_for(tmp_path, extra={"callbacks": [rates]}, **steps, **options).train()
    assert rates.seen == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_schedule_that_cannot_be_laid_over_a_stage_is_refused(tmp_path):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "num_expert_layers": 1}
    trainer = trainer_for(tmp_path, extra={"eval_dataset": DATA[:8]}, **options)
    with pytest.raises(ValueError, match="cannot be laid over a stage: choose one such as linear or cosine"):
        trainer.train()


# --- resuming ---


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}], ids=str)
def test_resumed_training_is_uninterrupted_training(options, tmp_path):
    options = {"num_expert_layers": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's old name, which works with every release
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
    assert all(entry["usage_max/layer_2"] * 24 == pytest.approx(round(entry["usage_max/layer_2"] * 24), abs=2e-3) for entry in logs)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
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


