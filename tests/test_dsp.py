"""DSP: the relaxed choice equals a loop, training finds the heads that count, and resumes exactly; recovery."""

import copy
import os
import socket
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import masked_heads, prune_heads
from shrp_hf.selectors.dsp import DspCallback, relaxed_top_k
from shrp_hf.training.arguments import ShrpTrainingArguments, recovery_arguments
from shrp_hf.training.trainer import ShrpTrainer
from tests.tiny import NO_DROPOUT, examples, same_state, tiny_bert, tiny_routed

PLAIN = {"gradient_accumulation_steps": 1, "gradient_checkpointing": False, "per_device_train_batch_size": 8}
TELLING = ((1, 3), (), (0,))  # the heads that this module's models listen to
NEEDED = KeepPlan(kept=TELLING, num_heads=4)


def listening_model(**fields):
    """A regressor in which all heads but the telling ones are nearly silent."""
    model = tiny_bert(num_labels=1, **(NO_DROPOUT | fields))
    with torch.no_grad():
        for layer, telling in zip(model.bert.encoder.layer, TELLING, strict=True):
            columns = layer.attention.output.dense.weight.unflatten(1, (4, -1))  # (hidden, heads, head_size)
            for head in range(4):
                columns[:, head] *= 4.0 if head in telling else 0.01
    return model


@torch.no_grad()
def own_outputs(model, count=48):
    """A task that the model solves with all its heads: its own outputs."""
    rows = examples(count)
    tokens = torch.stack([row["input_ids"] for row in rows])
    return [row | {"labels": float(value)} for row, value in zip(rows, model(tokens).logits, strict=True)]


def arguments(folder, kind=TrainingArguments, **options):
    defaults = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    return kind(str(folder), **(defaults | quiet | options))


def trained(folder, dsp, model=None, trainer=Trainer, resume=None, data=None, others=(), **options):
    model = listening_model() if model is None else model
    args = arguments(folder, **options)
    data = own_outputs(model) if data is None else data
    trainer = trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:8], callbacks=[dsp, *others])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def hooks_of(model):
    return [name for name, module in model.named_modules() if module._forward_pre_hooks]


class Watch(TrainerCallback):
    """Calls a function at the beginning, before the batches, and at the end of every step."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look(kwargs["model"])

    on_step_begin = on_step_end


class TestRelaxedTopK:
    @pytest.mark.parametrize("temperature", [1000.0, 1.0, 0.1])
    @pytest.mark.parametrize("count", [1, 3, 6])
    def test_equals_the_loop(self, count, temperature):
        scores = torch.randn(2, 3, dtype=torch.float64)
        rest, expected = scores.flatten().tolist(), [0.0] * 6
        for _ in range(count):
            weights = [torch.tensor(r / temperature).double().exp().item() for r in rest]
            p = [weight / sum(weights) for weight in weights]
            expected = [a + b for a, b in zip(expected, p, strict=True)]
            rest = [r + torch.tensor(1 - q).double().log().item() for r, q in zip(rest, p, strict=True)]
        taken = relaxed_top_k(scores, count, temperature)
        torch.testing.assert_close(taken.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("temperature", [1000.0, 10.0, 1.0, 1e-2, 1e-8])
    @pytest.mark.parametrize("count", [1, 5, 12])
    def test_sums_to_the_count_with_a_finite_gradient(self, count, temperature):
        scores = (30 * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
        taken = relaxed_top_k(scores, count, temperature)
        assert taken.sum().item() == pytest.approx(count)
        (taken * torch.randn(3, 4)).sum().backward()
        assert scores.grad.isfinite().all()

    @pytest.mark.parametrize("spread", [0.1, 1.0, 5000.0])
    def test_hard_limit_is_the_top_k_of_the_perturbed_scores(self, spread):
        scores = spread * torch.randn(5, 6, dtype=torch.float64) - torch.empty(5, 6).exponential_().log()
        taken = relaxed_top_k(scores, 7, 1e-8)
        assert set(taken.flatten().topk(7).indices.tolist()) == set(scores.flatten().topk(7).indices.tolist())
        assert taken.round().equal(taken)

    def test_spreads_when_hot(self):
        taken = relaxed_top_k(torch.randn(12, dtype=torch.float64), 3, 1e9)
        torch.testing.assert_close(taken, torch.full((12,), 0.25, dtype=torch.float64))

    def test_never_takes_what_is_closed(self):
        scores = torch.tensor([-torch.inf, 0.3, -torch.inf, 0.1], dtype=torch.float64, requires_grad=True)
        taken = relaxed_top_k(scores, 2, 1.0)
        assert taken[[0, 2]].tolist() == [0.0, 0.0]
        taken[1].backward()
        assert scores.grad.isfinite().all()
        assert scores.grad[1] != 0

    def test_gradient_is_that_of_finite_differences(self):
        scores = torch.randn(5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s: relaxed_top_k(s, 3, 0.5), (scores,))


@pytest.mark.parametrize("kind", [Trainer, ShrpTrainer])
@pytest.mark.parametrize("mode", ["joint", "pipelined"])
def test_finds_the_heads_that_count(tmp_path, kind, mode):
    model = listening_model()
    before = copy.deepcopy(model)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    dsp = DspCallback(3, mode, min_heads_per_layer=0)
    trained(tmp_path, dsp, model, kind, learning_rate=1e-4)
    assert dsp.plan == NEEDED
    assert hooks_of(model) == []
    assert same_state(model, before) == (mode == "pipelined")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["bert.embeddings.word_embeddings.weight"]
    assert prune_heads(model, dsp.plan).config.kept_heads == [list(heads) for heads in TELLING]


def test_every_layer_keeps_its_best_head_by_default(tmp_path):
    dsp = DspCallback(3, "pipelined")
    trained(tmp_path, dsp, max_steps=12)
    assert [len(heads) for heads in dsp.plan.kept] == [1, 1, 1]
    assert dsp.plan.kept == tuple((row.argmax().item(),) for row in dsp.importances)


def test_evaluation_in_training_uses_the_hard_choice(tmp_path):
    dsp, model = DspCallback(4, "pipelined"), listening_model()
    data = own_outputs(model)
    tokens, seen = data[0]["input_ids"][None], []

    @torch.no_grad()
    def look(model):
        model.eval()
        inside = model(tokens).logits
        model.train()
        assert dsp._choose().num_kept == 4
        seen.append((inside, dsp._choose()))

    trained(tmp_path, dsp, model, data=data, others=[Watch(look)], max_steps=5)
    model.eval()
    for inside, plan in seen:
        with masked_heads(model, plan), torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, inside)
    assert len(seen) == 10


@pytest.mark.parametrize(
    ("mode", "restored_by_trainer"),
    [pytest.param("joint", False, id="joint"), pytest.param("pipelined", True, id="pipelined, restored by Trainer")],
)
def test_resumed_equals_uninterrupted(tmp_path, mode, restored_by_trainer):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "data": own_outputs(listening_model())}
    whole = DspCallback(5, mode)
    expected = trained(tmp_path / "whole", whole, **options)
    options |= {"resume": str(tmp_path / "whole" / "checkpoint-3")}
    options |= {"restore_callback_states_from_checkpoint": restored_by_trainer}
    actual = trained(tmp_path / "resumed", DspCallback(5, mode), **options)
    resumed = next(callback for callback in actual.callback_handler.callbacks if isinstance(callback, DspCallback))
    assert actual.state.global_step == 8
    assert torch.equal(resumed.importances, whole.importances)
    assert resumed.plan == whole.plan
    assert same_state(actual.model, expected.model)


def test_resuming_is_refused_with_other_arguments_or_without_a_state(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "data": own_outputs(listening_model())}
    trained(tmp_path / "dsp", DspCallback(5), **options)
    with pytest.raises(ValueError, match="'num_heads': 5.*'num_heads': 6.*same arguments"):
        trained(tmp_path / "x", DspCallback(6), resume=str(tmp_path / "dsp" / "checkpoint-1"), **options)
    trained(tmp_path / "plain", TrainerCallback(), **options)
    with pytest.raises(ValueError, match="step 1 holds no state of one DspCallback"):
        trained(tmp_path / "x", DspCallback(5), resume=str(tmp_path / "plain" / "checkpoint-1"), **options)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        pytest.param("joint", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, id="accumulation"),
        pytest.param("joint", {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param("pipelined", {"gradient_checkpointing": True}, id="checkpointing, pipelined"),
        pytest.param(
            "joint",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            id="reentrant checkpointing",
        ),
    ],
)
def test_accumulation_and_checkpointing_change_nothing(tmp_path, mode, options):
    options = {"max_steps": 4, "learning_rate": 1e-5, **options}
    plain, other = DspCallback(5, mode), DspCallback(5, mode)
    model = listening_model(dtype=torch.float64)
    data = own_outputs(model)
    data = [row | {"labels": torch.tensor(row["labels"], dtype=torch.float64)} for row in data]
    trained(tmp_path, plain, copy.deepcopy(model), data=data, **(options | PLAIN))
    trained(tmp_path, other, model, ShrpTrainer, data=data, **options)
    # Adam's first steps divide a gradient by its own size, which magnifies what rounding changed.
    torch.testing.assert_close(other.importances, plain.importances, rtol=0, atol=1e-4)


def test_a_gradient_scaler_changes_nothing(tmp_path):
    model, moved = listening_model(), []
    before = copy.deepcopy(model)
    inputs, target = torch.stack([row["input_ids"] for row in examples(8)]), torch.ones(8, 1)
    for fp16 in (False, True):
        args = arguments(tmp_path, fp16=fp16)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=fp16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        dsp, state = DspCallback(5, "pipelined"), TrainerState(max_steps=3)
        handed = {"model": model.train(), "optimizer": SimpleNamespace(scaler=scaler if fp16 else None)}
        dsp.on_train_begin(args, state, None, **handed)
        for state.global_step in range(3):
            dsp.on_step_begin(args, state, None, **handed)
            scaler.scale(((model(inputs).logits - target) ** 2).mean()).backward()
            scaler.unscale_(optimizer)
            dsp.on_pre_optimizer_step(args, state, None, **handed)
            scaler.step(optimizer)
            scaler.update()
        dsp.on_train_end(args, state, None, **handed)
        moved.append(dsp.importances)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-6)
    assert same_state(model, before)


def train_on_process(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.manual_seed(0)
    for mode in ("joint", "pipelined"):
        torch.save(trained_in_double(folder, mode, size=4), f"{folder}/{mode}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort now and then while the interpreter is torn down; all is written by now


def trained_in_double(folder, mode, size):
    model, dsp = listening_model(dtype=torch.float64), DspCallback(5, mode)
    data = [row | {"labels": torch.tensor(row["labels"], dtype=torch.float64)} for row in own_outputs(model)]
    options = {"max_steps": 4, "learning_rate": 1e-5, "per_device_train_batch_size": size}
    trained(folder, dsp, model, ShrpTrainer, data=data, **options)
    return {"importances": dsp.importances} | dict(model.state_dict())


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    torch.manual_seed(0)
    expected = {mode: trained_in_double(tmp_path, mode, size=8) for mode in ("joint", "pipelined")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train_on_process, args=(port, str(tmp_path)), nprocs=2)
    for mode, one in expected.items():
        first, second = (torch.load(tmp_path / f"{mode}-{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        torch.testing.assert_close(first, one, rtol=0, atol=1e-5)


def test_temperature_falls_log_linearly():
    dsp = DspCallback(3, initial_temperature=1000, final_temperature=1e-8)
    temperatures = [dsp.temperature(step, 12) for step in range(12)]
    assert temperatures == pytest.approx([10.0 ** (3 - step) for step in range(12)])
    assert dsp.temperature(0, 1) == 1000


def test_noise_follows_from_seed_and_step(tmp_path):
    generators = [DspCallback(5, seed=seed)._generator(step) for seed in (0, 1) for step in (-1, 0, 1)]
    assert len({torch.rand(1, dtype=torch.float64, generator=generator).item() for generator in generators}) == 6
    data = own_outputs(listening_model())
    first, same, other = (DspCallback(5, seed=seed) for seed in (1, 1, 2))
    for dsp in (first, same, other):
        trained(tmp_path, dsp, max_steps=1, data=data)
    assert torch.equal(first.importances, same.importances)
    assert not torch.allclose(first.importances, other.importances)


def test_expert_layers_and_cut_heads_are_no_choice(tmp_path):
    model = tiny_routed([2], num_labels=2, **NO_DROPOUT)
    model.prune_heads(KeepPlan(kept=((0, 1, 3), (1, 2), (2,)), num_heads=4))
    dsp = DspCallback(3, "pipelined")
    trained(tmp_path, dsp, model, data=examples(16), max_steps=3)
    assert dsp.plan.num_kept == 4
    assert dsp.plan.kept[2] == (2,)
    assert set(dsp.plan.kept[0]) <= {0, 1, 3}
    assert set(dsp.plan.kept[1]) <= {1, 2}
    assert dsp.importances.isnan().sum() == 7
    assert prune_heads(model, dsp.plan).config.kept_heads == [list(heads) for heads in dsp.plan.kept]


def test_another_family(tmp_path):
    sizes = {"vocab_size": 99, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 20}
    dsp = DspCallback(2)
    trained(tmp_path, dsp, DistilBertForSequenceClassification(DistilBertConfig(**sizes)), data=examples(16), max_steps=2)
    assert [len(heads) for heads in dsp.plan.kept] == [1, 1]


def test_release_after_a_training_that_broke_off(tmp_path):
    def fail(model):
        raise InterruptedError

    dsp, model = DspCallback(5, "pipelined"), listening_model()
    with pytest.raises(InterruptedError):
        trained(tmp_path, dsp, model, others=[Watch(fail)])
    assert len(hooks_of(model)) == 3
    dsp.release()
    assert hooks_of(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="`plan` is there once training has ended"):
        _ = dsp.plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "`num_heads` must be a whole number from 1, got 0"),
        ({"num_heads": 2.0}, "`num_heads` must be a whole number from 1, got 2.0"),
        ({"num_heads": 3, "mode": "both"}, "`mode` must be .* got 'both'"),
        ({"num_heads": 3, "learning_rate": 0}, "`learning_rate` must be more than 0"),
        ({"num_heads": 3, "final_temperature": 0}, "`final_temperature` must be more than 0"),
        ({"num_heads": 3, "initial_temperature": 1e-9}, "at most `initial_temperature`"),
        ({"num_heads": 3, "min_heads_per_layer": -1}, "`min_heads_per_layer` must be a whole number from 0, got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DspCallback(**options)


@pytest.mark.parametrize(
    ("dsp", "options", "message"),
    [
        pytest.param((13,), {}, "`num_heads` is 13, .* 12 heads to choose from allow 3 to 12", id="too many"),
        pytest.param((2,), {}, "`num_heads` is 2, .*allow 3 to 12", id="under the floor"),
        pytest.param(
            (5, "pipelined"),
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "set `use_reentrant` to False",
            id="reentrant checkpointing",
        ),
    ],
)
def test_what_does_not_suit_is_refused_and_leaves_the_model_alone(tmp_path, dsp, options, message):
    model = listening_model()
    dsp = DspCallback(*dsp)
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, dsp, model, **options)
    assert hooks_of(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    data = [row | {"labels": float("nan")} for row in examples(16)]
    with pytest.raises(ValueError, match="not finite at step 0"):
        trained(tmp_path, DspCallback(5), data=data, max_steps=2)


def test_not_yet_trained():
    with pytest.raises(ValueError, match="`plan` is there once training has ended"):
        _ = DspCallback(3).plan
    with pytest.raises(ValueError, match="`importances` are there once training has begun"):
        _ = DspCallback(3).importances


class TestRecovery:
    def test_recipe(self, tmp_path):
        args = recovery_arguments(str(tmp_path))
        assert isinstance(args, ShrpTrainingArguments)
        assert (args.num_train_epochs, args.learning_rate, args.per_device_train_batch_size) == (3, 2e-5, 32)
        assert (args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == ("linear", 0.01, 1.0)
        assert args.get_warmup_steps(250) == 25

    def test_overrides_win(self, tmp_path):
        args = recovery_arguments(str(tmp_path), num_train_epochs=1, warmup_steps=7, seed=3)
        assert (args.num_train_epochs, args.get_warmup_steps(250), args.seed) == (1, 7, 3)
        assert args.learning_rate == 2e-5

    def test_brings_a_pruned_model_back(self, tmp_path):
        torch.manual_seed(0)
        # In float64 and without dropout the rounding of no kernel shows, so the loss falls alike everywhere.
        model = tiny_bert(num_labels=2, dtype=torch.float64, **NO_DROPOUT)
        pruned = prune_heads(model, KeepPlan(kept=((0,), (1, 2), (3,)), num_heads=4))
        args = arguments(tmp_path, recovery_arguments, max_steps=-1, num_train_epochs=3, learning_rate=2e-3)
        trainer = ShrpTrainer(pruned, args, train_dataset=examples(64), eval_dataset=examples(64))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.9 * before
        assert trainer.model.config.kept_heads == [[0], [1, 2], [3]]
