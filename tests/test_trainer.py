"""ShrpTrainer: conversion under way, gradients, resuming, logs, and experts chosen by usage."""

import math
import re
from functools import partial

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from shrp_hf import ShrpBertForSequenceClassification
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.trainer import ShrpTrainer
from tests.test_families import TABLE, stock
from tests.tiny import NO_DROPOUT, batch, examples, same_state, tiny_routed
from tests.tiny_training import DATA, SHRP, STOCK, bert, logged, trainer_for

ALL = (0, 1, 2, 3)


class Watch(TrainerCallback):
    """Notes at every step which layers are expert layers and how much the balance loss weighs."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((tuple(model.config.expert_layers), model.config.router_aux_loss_coef))


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


@pytest.mark.parametrize("family", [family for family in TABLE if family not in ("bert", "xlm-roberta", "camembert")])
def test_every_family_is_converted_trained_with_a_teacher_and_pruned(family, tmp_path):
    model, teacher = (stock(family, dtype=torch.float32) for _ in range(2))
    data = DATA[:32] if family != "vit" else [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(32)]
    steps = {"num_expert_layers": 2, "balance_steps_per_layer": 1, "specialise_steps": 2, "hidden_dropout": 0.0}
    steps |= {"distillation_hidden_states": 1.0, "distillation_value_relations": 1.0}
    if model.supports_gradient_checkpointing:
        steps |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    watch = Watch()
    trainer = trainer_for(tmp_path, model, data, {"callbacks": [watch], "teacher": teacher}, **steps)
    trainer.train()
    assert watch.seen == [((2,), 0.1), ((1, 2), 0.1), ((1, 2), 0.0), ((1, 2), 0.0)]
    config = trainer.model.config
    assert (config.expert_layers, config.pending_layers) == ([1, 2], [])
    counted = {layer: sum(counts) for layer, counts in trainer.model.usage().items()}
    assert counted == {1: 16, 2: 16}  # two steps of stage "specialise", 8 rows each, once in spite of checkpointing
    plan = trainer.usage_plan(keep=1)
    assert {layer: sum(counts) for layer, counts in trainer.model.usage().items()} == {1: 8, 2: 8}  # the rows held out
    trainer.model.prune_heads(plan)
    assert [len(kept) for kept in trainer.model.config.kept_heads] == [4, 1, 1]
    assert not trainer.model.config.is_routed
    assert all(values > 0 for values in logged(trainer, "loss"))
    assert trainer.evaluate(data[:8])["eval_loss"] > 0


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
        pytest.param(
            {"num_expert_layers": 2, "max_steps": 6},
            [((2,), 0.1)] * 2 + [((1, 2), 0.1)] * 2 + [((1, 2), 0.0)] * 2,
            id="scaled to steps",
        ),
        pytest.param(
            {"num_expert_layers": 2, "num_train_epochs": 1},
            [((2,), 0.1)] * 2 + [((1, 2), 0.1)] * 2 + [((1, 2), 0.0)] * 2,
            id="scaled to epochs",
        ),
        pytest.param({"num_expert_layers": 3, "max_steps": 1}, [((0, 1, 2), 0.1)], id="one step"),
    ],
)
def test_layers_are_converted_when_the_arguments_say(options, seen, tmp_path):
    watch = Watch()
    trainer = trainer_for(tmp_path, extra={"callbacks": [watch]}, **options)
    trainer.train()
    assert watch.seen == seen
    assert trainer.model.config.pending_layers == []


@pytest.mark.parametrize(("options", "said"), [({"max_steps": 6}, 1), ({}, 0), ({"num_train_epochs": 3}, 0)], ids=str)
def test_scaling_is_said_once(options, said, tmp_path, caplog):
    trainer_for(tmp_path, num_expert_layers=2, **options).train()
    message = (
        "The stages are scaled to the length that was given: stage balance takes 4 of 6 steps, stage specialise the rest."
    )
    assert [text for text in caplog.messages if "scaled" in text] == [message] * said


def test_given_length_is_that_of_what_is_left_too(tmp_path):
    trainer = trainer_for(tmp_path, tiny_routed([2], num_labels=2), num_expert_layers=2, num_train_epochs=1)
    trainer.train()
    assert (trainer.args.num_train_epochs, trainer.state.global_step) == (1, 6)
    assert trainer.model.config.expert_layers == [1, 2]


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    args = ShrpTrainingArguments(tmp_path, num_expert_layers=1, **SHRP)
    assert args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = (
        "`WORLD_SIZE=2` in the environment, but `args.world_size` is 1: each of these processes would train alone and write "
        "over the others' files. Without a GPU give `use_cpu=True` (`--use_cpu`); to train in one process, unset WORLD_SIZE "
        "or start it without a launcher."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpTrainer(bert(), args, train_dataset=DATA)
    monkeypatch.setenv("WORLD_SIZE", "1")
    ShrpTrainer(bert(), args, train_dataset=DATA)


# --- hyperparameter search ---


@pytest.fixture
def searching(tmp_path, monkeypatch):
    """Makes a trainer as `hyperparameter_search` sets it up, for trials that are given as a dict, as Ray does."""
    monkeypatch.setattr("transformers.integrations.integration_utils.is_ray_tune_available", lambda: True)
    monkeypatch.setattr(ShrpTrainer, "_get_output_dir", lambda self, trial: self.args.output_dir)
    return partial(searcher, tmp_path)


def searcher(folder, **options):
    args = ShrpTrainingArguments(folder, **(SHRP | options))
    trainer = ShrpTrainer(model_init=lambda: bert(), args=args, train_dataset=DATA)
    trainer.hp_search_backend = HPSearchBackend.RAY
    return trainer


def test_every_trial_has_its_own_stages(searching):
    trainer = searching(num_expert_layers=1)
    found = []
    for trial in (
        {"num_expert_layers": 2},
        {"num_expert_layers": 1, "specialise_epochs": 2.0},
        {"num_expert_layers": 3, "specialise_epochs": 0.0, "conversion_order": "first_first"},
        {"num_expert_layers": 2, "specialise_epochs": 1.0},
        {"num_expert_layers": 1, "experts_per_sequence": 2, "learning_rate": 1e-4},
        {"num_expert_layers": 2, "num_train_epochs": 1.0},
    ):
        trainer.train(trial=trial)
        config = trainer.model.config
        assert config.pending_layers == []
        found.append((config.expert_layers, trainer.state.max_steps, trainer._schedule.balance_steps))
    assert found == [
        ([1, 2], 18, 12),
        ([2], 18, 6),
        ([0, 1, 2], 18, 18),
        ([1, 2], 18, 12),
        ([2], 12, 6),
        ([1, 2], 6, 4),
    ]
    assert trainer.model.config.experts_per_sequence == 2
    # The recipe of Transformers' documentation: the best trial's values, then an ordinary training.
    trainer.hp_search_backend = None
    for name, value in {"num_expert_layers": 3, "num_train_epochs": 2}.items():
        setattr(trainer.args, name, value)
    trainer.train()
    found = trainer.model.config.expert_layers, trainer.state.max_steps, trainer._schedule.balance_steps
    assert found == ([0, 1, 2], 12, 9)


def test_trial_that_names_the_first_layers_sets_rows_aside(searching):
    trainer = searching()
    assert trainer._usage_dataset is None
    trainer.train(trial={"num_expert_layers": 1})
    assert (len(trainer.train_dataset), trainer.state.max_steps) == (48, 12)
    assert trainer.usage_plan().num_kept == 9
    trainer.args.num_expert_layers = None
    trainer.train(trial={"learning_rate": 1e-4})
    assert (trainer.model.config.model_type, trainer.state.max_steps) == ("bert", 18)


def test_trial_with_contradictory_stages_is_refused(searching):
    trainer = searching(num_expert_layers=1)
    with pytest.raises(ValueError, match=r"^Give `num_expert_layers` or `expert_layers`, not both: got 1 and \[0\]\.$"):
        trainer.train(trial={"expert_layers": [0]})


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
    # In float64 and without dropout the rounding of no kernel shows, so the loss falls alike everywhere.
    model = tiny_routed(2, num_labels=2, dtype=torch.float64, **NO_DROPOUT)
    model = prune_heads(model, KeepPlan(((0, 3), (1,), (0, 2)), 4))
    names = set(model.state_dict())
    args = TrainingArguments(tmp_path, max_steps=30, **STOCK | {"learning_rate": 5e-3})
    trainer = trainer_class(model, args, train_dataset=DATA[:8])
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
    message = (
        "`expert_layers=[2]` cannot be converted: this model is already pruned, and a warm start needs all heads. Convert "
        "the unpruned checkpoint."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
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


class OwnLoss(ShrpTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class ScaledLoss(ShrpTrainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("trainer_class", "build", "teacher", "times"),
    [
        pytest.param(OwnLoss, routed, None, 1, id="routed"),
        pytest.param(OwnLoss, bert, bert, 1, id="taught"),
        pytest.param(OwnLoss, bert, None, 0, id="nothing to lose"),
        pytest.param(ScaledLoss, routed, bert, 0, id="calls ours"),
    ],
)
def test_own_loss_without_ours_is_warned_about_once(trainer_class, build, teacher, times, tmp_path, caplog):
    args = ShrpTrainingArguments(tmp_path, **(STOCK | {"max_steps": 3}))
    trainer_class(build(), args, train_dataset=DATA, teacher=teacher and teacher(seed=5)).train()
    said = [message for message in caplog.messages if "compute_loss` does not call ShrpTrainer's: " in message]
    assert len(said) == times
    assert all(message.startswith("`OwnLoss.") for message in said)


def test_bfloat16_on_the_cpu_trains(tmp_path):
    """Products in bfloat16, weights in float32, every one of them with a gradient and moved, and the losses logged."""
    trainer, products, gradients = trainer_for(tmp_path, num_expert_layers=2, bf16=True, logging_steps=1), set(), set()
    model = trainer.model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.classifier.register_forward_hook(lambda module, args, output: products.add(output.dtype))

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            moving = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            assert all(gradient.isfinite().all() for gradient in moving.values())
            gradients.update(name for name, gradient in moving.items() if gradient.any())

    trainer.add_callback(Look())
    trainer.train()
    assert products == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    after = dict(model.named_parameters())
    assert set(after) <= gradients
    assert not [name for name, weight in after.items() if torch.equal(weight, before[name])]
    losses = logged(trainer, "task_loss")
    assert len(losses) == trainer.state.global_step == 18
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


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
        pytest.param({"balance_lr_scheduler_type": "linear"}, [1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-3, 5e-4], id="linear in both"),
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


def test_routers_and_expanders_have_a_rate_of_their_own(tmp_path):
    trainer = trainer_for(tmp_path, num_expert_layers=2, expander_learning_rate=1e-2, weight_decay=0.1)
    trainer.create_optimizer()
    rates, decays = {}, {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)], decays[id(parameter)] = group["lr"], group["weight_decay"]
    for name, parameter in trainer.model.named_parameters():
        assert rates[id(parameter)] == (1e-2 if ".router." in name or ".expander." in name else 1e-3), name
        assert decays[id(parameter)] == (0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name


def test_schedule_that_cannot_be_laid_over_a_stage_is_refused(tmp_path):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "num_expert_layers": 1}
    trainer = trainer_for(tmp_path, extra={"eval_dataset": DATA[:8]}, **options)
    message = (
        "The learning-rate schedule `reduce_lr_on_plateau` cannot be laid over a stage: choose one such as linear or cosine."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.train()
