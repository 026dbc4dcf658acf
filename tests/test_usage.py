"""Usage of experts: counted once per sequence, spread by the balance loss, turned into a plan, printed."""

import copy
import re

import pytest
import torch

from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.selectors.usage import plan_by_usage, usage_table
from tests.tiny import NO_DROPOUT, batch, tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)


def static_model():
    return prune_heads(tiny_routed(2), KeepPlan((ALL, (2,), (0, 3)), 4))


@pytest.mark.parametrize("top", [1, 2])
def test_usage_counts_each_sequence_once(top):
    model = tiny_routed(2, experts_per_sequence=top).train()
    expected = {1: [0] * 4, 2: [0] * 4}
    for seed in (1, 2):
        output = model(**batch(size=7, seed=seed))
        output.balance_loss.backward()
        for layer, logits in zip((1, 2), output.router_logits, strict=True):
            for expert in logits.topk(top).indices.flatten().tolist():
                expected[layer][expert] += 1
    assert model.usage() == expected
    assert sum(expected[1]) == 14 * top
    model.eval()(**batch())
    with torch.no_grad():
        model.train()(**batch())
    assert model.usage() == expected  # only training counts
    assert model.state_dict()["bert.encoder.layer.1.router.usage"].dtype == torch.int64
    model.reset_usage_()
    assert model.usage() == {1: [0] * 4, 2: [0] * 4}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_neither_usage_nor_gradients(reentrant):
    plain = tiny_routed(2, **NO_DROPOUT).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(**batch() | {"labels": torch.arange(5) % 3}).loss.backward()
    assert checkpointed.layers[1].gradient_checkpointing
    assert checkpointed.usage() == plain.usage()
    assert sum(plain.usage()[1]) == 5
    ours, theirs = dict(checkpointed.named_parameters()), dict(plain.named_parameters())
    assert all(torch.equal(ours[n].grad, theirs[n].grad) for n in theirs if theirs[n].grad is not None)
    assert theirs["bert.encoder.layer.1.router.weight"].grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_that_cuts_the_gradient_is_refused():
    model = tiny_routed([0, 1, 2]).train()
    model.bert.embeddings.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    message = (
        "The routers get no gradient: reentrant gradient checkpointing cuts it. Set "
        '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(inputs_embeds=torch.randn(5, 9, 32))


def test_balance_loss_alone_spreads_one_middle_layer_evenly():
    model = tiny_routed([1], dtype=torch.float64, **NO_DROPOUT).train()  # no kernel's rounding shows
    router, steps = model.layers[1].router, 100
    with torch.no_grad():
        router.bias[2] = 3.0  # it starts far from uniform
    optimizer = torch.optim.AdamW([router.weight, router.bias], lr=0.03)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)

    def usage_of_unseen():
        with torch.no_grad():
            output = model(**batch(size=512, length=6, seed=99))
        return output.router_logits[0].argmax(dim=-1).bincount(minlength=4) / 512

    assert usage_of_unseen()[2] > 0.9
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(size=64, length=6, seed=100 + step)).balance_loss.backward()
        optimizer.step()
        decay.step()
    share = usage_of_unseen()
    assert torch.special.entr(share).sum() / torch.tensor(4.0).log() > 0.95, share


# --- plans ---

COUNTS = {1: [5, 9, 9, 0], 2: [90, 2, 5, 3]}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param({}, (ALL, (1,), (0,)), id="one a layer"),
        pytest.param({"keep": 2}, (ALL, (1, 2), (0, 2)), id="two a layer"),
        pytest.param({"keep": 4}, (ALL, ALL, ALL), id="all"),
        pytest.param({"keep": 2, "scope": "model"}, (ALL, (0, 1, 2), (0,)), id="over the model"),
    ],
)
def test_plan_keeps_what_is_used_most(options, kept):
    assert plan_by_usage(tiny_routed(2), COUNTS, **options) == KeepPlan(kept, 4)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        pytest.param(COUNTS, {"keep": 0}, "`keep` must be between 1 and 4 experts, got 0.", id="none"),
        pytest.param(COUNTS, {"keep": 5}, "`keep` must be between 1 and 4 experts, got 5.", id="too many"),
        pytest.param(COUNTS, {"keep": 0.5}, "`keep` must be between 1 and 4 experts, got 0.5.", id="a share"),
        pytest.param(COUNTS, {"keep": True}, "`keep` must be between 1 and 4 experts, got True.", id="a bool"),
        pytest.param(COUNTS, {"scope": "global"}, '`scope` must be "layer" or "model", got \'global\'.', id="unknown scope"),
        pytest.param(
            {1: [1, 2, 3, 4], 2: [0, 0, 0, 0]},
            {},
            "No usage is recorded for expert layer 2: train with ShrpTrainer, or count on a dataset with "
            "`trainer.usage_plan(dataset)`.",
            id="no usage",
        ),
        pytest.param(
            {2: [1, 2, 3, 4]},
            {},
            "No usage is recorded for expert layer 1: train with ShrpTrainer, or count on a dataset with "
            "`trainer.usage_plan(dataset)`.",
            id="layer not counted",
        ),
    ],
)
def test_plan_by_usage_refuses(counts, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_by_usage(tiny_routed(2), counts, **options)


@pytest.mark.parametrize("build", [static_model, lambda: to_shrp(tiny_bert())], ids=["static", "dense"])
def test_plan_by_usage_needs_a_router(build):
    message = "The model has no routed expert layers: convert some with `from_pretrained(..., expert_layers=n)`."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_by_usage(build(), COUNTS)


def test_usage_prints_as_a_table():
    assert usage_table({2: [90, 2, 5, 3], 1: [0, 0, 0, 0]}).splitlines() == [
        "layer  sequences  e0    e1    e2    e3   ",
        "    1          0      -     -     -     -",
        "    2        100   90.0   2.0   5.0   3.0",
    ]
    assert usage_table({}) == "no routed expert layers"
