"""A plan checks itself, composes with the next one, and is read back as it was written."""

import json
import re

import pytest

from shrp_hf import KeepPlan, prune_heads
from tests.tiny import tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)
PLAN = KeepPlan(((0, 2), (), (3,)), 4, ((7, 1), (), range(64)), 64)


def test_indices_are_sorted_and_counts_are_one_per_layer():
    assert PLAN.neurons == ((1, 7), (), tuple(range(64)))
    assert PLAN.num_neurons == (64, 64, 64)
    assert (PLAN.num_kept, PLAN.num_kept_neurons) == (3, 66)
    assert KeepPlan.full(3, 4).num_kept_neurons is None
    assert KeepPlan(PLAN.kept, 4, PLAN.neurons, [64, 64, 64]) == PLAN == KeepPlan(PLAN.kept, 4).with_neurons(PLAN.neurons, 64)
    assert PLAN.with_neurons(None, None) == KeepPlan(PLAN.kept, 4)
    assert hash(PLAN) == hash(KeepPlan.from_json(PLAN.to_json()))


@pytest.mark.parametrize("plan", [PLAN, KeepPlan(PLAN.kept, 4)], ids=["neurons", "heads"])
def test_written_and_read(plan, tmp_path):
    text = plan.to_json(tmp_path / "plan.json")
    assert KeepPlan.from_json(text) == KeepPlan.from_json(tmp_path / "plan.json") == plan
    assert set(json.loads(text)) == {"kept", "num_heads"} | ({"neurons", "num_neurons"} if plan is PLAN else set())


def test_file_of_format_1_is_read():
    assert KeepPlan.from_json('{"kept": [[0, 2], []], "num_heads": 4}') == KeepPlan(((0, 2), ()), 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neurons": ((1,), (), (64,))}, "`neurons[2]` names neuron 64, but neurons are whole numbers from 0 to 63."),
        ({"neurons": ((1,), (-1,), ())}, "`neurons[1]` names neuron -1, but neurons are whole numbers from 0 to 63."),
        ({"neurons": ((1,), (2, 2), ())}, "`neurons[1]` names a neuron twice: (2, 2)."),
        ({"neurons": ((1,), 5, ())}, "`neurons[1]` must be a tuple of neuron indices, got 5."),
        ({"neurons": ((1,), ())}, "`neurons` must hold one tuple of indices for each of 3 layers, got ((1,), ())."),
        (
            {"num_neurons": (64, 64)},
            "`num_neurons` must be a whole number from 0, or one for each of 3 layers, got (64, 64).",
        ),
        ({"num_neurons": -1}, "`num_neurons` must be a whole number from 0, or one for each of 3 layers, got -1."),
        (
            {"num_neurons": None, "neurons": ((), (), ())},
            "`neurons` and `num_neurons` go together: give which stay, and how many each layer has now, got neurons=((), (), "
            "()) and num_neurons=None.",
        ),
    ],
)
def test_neurons_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        KeepPlan(**{"kept": ((0,), (1,), (2,)), "num_heads": 4, "neurons": PLAN.neurons, "num_neurons": 64} | fields)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (KeepPlan.full(2, 4), "`other` is for 2 layers of 4 heads, but this plan is for 3 layers of 4."),
        (KeepPlan(((0,), (1,), (3,)), 4), "`other` keeps heads [1] of layer 1, but this plan leaves []."),
        (
            KeepPlan(((0,), (), ()), 4, ((1,), (), ()), 64),
            "`other` counts 64 neurons in layer 0, but this plan leaves 2.",
        ),
    ],
)
def test_plan_for_another_model_does_not_follow(second, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PLAN.then(second)


def test_composed_plans():
    assert PLAN.then(KeepPlan(((2,), (), ()), 4)) == KeepPlan(((2,), (), ()), 4, PLAN.neurons, 64)
    assert KeepPlan(PLAN.kept, 4).then(KeepPlan(((2,), (), ()), 4, ((5,), (), ()), 64)).neurons == ((5,), (), ())
    assert PLAN.then(KeepPlan(PLAN.kept, 4, ((1,), (), (0, 9)), (2, 0, 64))).neurons == ((7,), (), (0, 9))


@pytest.mark.parametrize(
    ("build", "plan", "message"),
    [
        pytest.param(
            tiny_bert,
            KeepPlan.full(3, 4).with_neurons(((1,), (2,), ()), 32),
            "`plan` counts 32 neurons in layer 0, but this model has 64 there: neurons are counted among those that the model "
            "has now, so make the plan from this model.",
            id="other width",
        ),
        pytest.param(
            lambda: prune_heads(tiny_bert(), PLAN),
            KeepPlan(PLAN.kept, 4, ((0,), (), (1,)), (2, 64, 64)),
            "`plan` counts 64 neurons in layer 1, but this model has 0 there: neurons are counted among those that the model "
            "has now, so make the plan from this model.",
            id="width before the cut",
        ),
        pytest.param(
            lambda: tiny_routed([2]),
            KeepPlan((ALL, ALL, (1,)), 4, ((1,), (2,), (3,)), 64),
            "`plan` keeps 1 neurons of layer 2, but that is an expert layer, which has no neurons: leave its entry empty.",
            id="expert layer",
        ),
    ],
)
def test_model_refuses_a_plan_of_other_widths(build, plan, message):
    model = build()
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prune_heads(model, plan)
    assert model.config.to_dict() == config
