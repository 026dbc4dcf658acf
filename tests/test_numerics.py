"""What is not finite stops training before it reaches the weights, and half precision scores as full precision does."""

import copy
import re

import pytest
import torch

from shrp_hf.numerics import first_not_finite, rounding_bound
from shrp_hf.pruning import to_shrp
from shrp_hf.scoring import StatsRequest, collect_head_stats
from tests.tiny import batch, tiny_bert
from tests.tiny_training import bert, trainer_for

ADVICE = (
    "The weights are as they were before this step. Check that batch, lower the learning rate, or train in bf16 or float32 "
    "if this is fp16."
)
LAYER = "bert.encoder.layer.1.output.dense"


def stopped_by(trainer, message):
    """Trains until the message, and holds the last step's weights against those that the error leaves."""
    before = []
    step = trainer.training_step

    def remember(model, *args):
        before.append(copy.deepcopy(model.state_dict()))
        return step(model, *args)

    trainer.training_step = remember
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before[-1].items() if "usage" not in name)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def broken_from(model, call, value, backward=False):
    """Lets a layer return `value` (or a gradient that is not finite) from this training batch on."""
    calls = []

    def spoil(module, args, output):
        calls.append(module.training)
        if len(calls) >= call:
            return output + (output * 0).abs().sqrt() if backward else output * value

    model.get_submodule(LAYER).register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_training_stops_at_a_loss_that_is_not_finite(value, tmp_path):
    model = broken_from(to_shrp(bert()), 4, value)
    trainer = trainer_for(tmp_path, model, num_expert_layers=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    stopped_by(
        trainer,
        f"The loss is nan at step 2, batch 2 of 2: the first output that is not finite is that of `{LAYER}`. {ADVICE}",
    )


def test_training_stops_at_a_gradient_that_is_not_finite(tmp_path):
    trainer = trainer_for(tmp_path, broken_from(to_shrp(bert()), 3, None, backward=True), num_expert_layers=1)
    stopped_by(
        trainer,
        f"A gradient is not finite at step 3, batch 1 of 1: coming from the loss, the first one is that of `{LAYER}.bias`. "
        f"{ADVICE}",
    )


def test_gradients_whose_squares_overflow_are_finite(tmp_path):
    trainer = trainer_for(tmp_path, num_expert_layers=1)
    trainer.model.classifier.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = bert()
    model.bert.encoder.layer[1].attention.self.key.weight.data[0, 0] = torch.nan
    trainer = trainer_for(tmp_path, model, num_expert_layers=1)
    message = (
        "The loss is nan at step 1, batch 1 of 1: the weight `bert.encoder.layer.1.attention.self.key.weight` is not finite "
        f"itself, so load a checkpoint from before that. {ADVICE}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.train()


def test_a_loss_that_is_not_the_models_own_is_told_apart(tmp_path):
    extra = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum() / 0}
    stopped_by(
        trainer_for(tmp_path, num_expert_layers=1, extra=extra),
        "The loss is inf at step 1, batch 1 of 1: the outputs of all layers are finite, so look at the labels and at what is "
        f"added to the model's own loss. {ADVICE}",
    )


def test_finite_outputs_are_not_blamed():
    model = tiny_bert(attn_implementation="eager")
    model(**batch(), output_attentions=True, output_hidden_states=True)  # Transformers then leaves hooks of its own
    before = [len(module._forward_hooks) for module in model.modules()]
    assert first_not_finite(model, batch() | {"output_attentions": True, "output_hidden_states": True}) is None
    assert [len(module._forward_hooks) for module in model.modules()] == before


# --- rounding ---


def test_bound_follows_from_precision_and_scale():
    assert rounding_bound(0.3, torch.float32) == rounding_bound(1.0, torch.float32) == 1024 * 2**-23
    assert rounding_bound(50.0, torch.float32) == 50 * rounding_bound(1.0, torch.float32)
    assert rounding_bound(2.0, torch.bfloat16, roundings=4) == 2 * 4 * 2**-7
    torch.manual_seed(0)
    a, b = torch.randn(8, 3072), torch.randn(3072, 8)
    exact = a.double() @ b.double()
    assert (a @ b - exact).abs().max() < rounding_bound(float(exact.abs().max()), torch.float32)


# --- half precision ---

EVERYTHING = StatsRequest(importance=True, entropy=True, signature_size=8)


def scored(model, batches):
    return collect_head_stats(model, batches, EVERYTHING)


def labelled(seed=1):
    return batch(seed=seed) | {"labels": torch.arange(5) % 3}


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_half_precision_scores_as_full_precision_does(dtype, precision):
    """To within a few roundings of the largest score: what is summed is not rounded again."""
    half = tiny_bert(dtype=dtype)
    batches = [labelled(seed) for seed in range(6)]
    ours, full = scored(half, batches), scored(copy.deepcopy(half).float(), batches)
    for a, b in ((ours.importance(), full.importance()), (ours.entropy(), full.entropy())):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * precision * float(b.max()))
    for a, b in zip(ours.class_moments(), full.class_moments(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * precision)


def equal_batches_score_as_one(dtype, count):
    """bfloat16 sums of equal terms stall after 256 of them, float16 sums after 2,048."""
    model = tiny_bert(dtype=dtype, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    one = {name: value[:1] for name, value in labelled().items()}
    many, single = scored(model, (one for _ in range(count))), scored(model, [one])
    assert {value.dtype for value in many.sums.values()} == {torch.float64, torch.int64}
    for name, value in single.sums.items():
        torch.testing.assert_close(many.sums[name].double() / count, value.double(), rtol=1e-6, atol=0, msg=name)


def test_sums_of_many_batches_do_not_stall():
    equal_batches_score_as_one(torch.bfloat16, 400)


@pytest.mark.load
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_five_thousand_batches_do_not_stall(dtype):
    equal_batches_score_as_one(dtype, 5000)
