"""ShrpTrainingArguments: what follows from the stages, how it is parsed, what it refuses."""

import json
import re

import pytest
from transformers import HfArgumentParser

from shrp_hf.training.arguments import ShrpTrainingArguments, StageSchedule

# The old name of the option works with every release that we support.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def arguments(**options):
    return ShrpTrainingArguments("out", use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({}, 3.0, -1),
        ({"num_train_epochs": 7}, 7, -1),
        ({"num_expert_layers": 11}, 12.0, -1),
        ({"expert_layers": [1, 2], "balance_epochs_per_layer": 0.5, "specialise_epochs": 2}, 3.0, -1),
        ({"expert_layers": [1, 2], "num_train_epochs": 3}, 3.0, -1),
        ({"num_expert_layers": 2, "specialise_epochs": 0}, 2.0, -1),
        ({"num_expert_layers": 2, "balance_steps_per_layer": 10, "specialise_steps": 5}, 3.0, 25),
        ({"num_expert_layers": 2, "balance_steps_per_layer": 10, "specialise_steps": 5, "max_steps": 25}, 3.0, 25),
        ({"max_steps": 25}, 3.0, 25),
        ({"num_expert_layers": 11, "num_train_epochs": 3}, 3, -1),
        ({"num_expert_layers": 2, "max_steps": 20}, 3.0, 20),
        ({"num_expert_layers": 2, "max_steps": 20, "num_train_epochs": 5}, 5, 20),
    ],
    ids=str,
)
def test_length_is_given_or_follows_from_the_stages(options, epochs, steps):
    args = arguments(**options)
    assert (args.num_train_epochs, args.max_steps) == (epochs, steps)


def test_command_line_is_parsed():
    parser = HfArgumentParser(ShrpTrainingArguments)
    line = "--output_dir out --use_cpu --expert_layers 3 1 --balance_epochs_per_layer 0.5 --conversion_order first_first"
    (args,) = parser.parse_args_into_dataclasses(f"{line} --experts_per_sequence 3 --balance_learning_rate 1e-4".split())
    assert args.layers_to_convert(4) == [1, 3]
    assert (args.num_train_epochs, args.experts_per_sequence, args.balance_learning_rate) == (2.0, 3, 1e-4)
    (args,) = parser.parse_args_into_dataclasses("--output_dir out --use_cpu --num_expert_layers 2".split())
    assert (args.layers_to_convert(4), args.num_train_epochs) == ([3, 2], 3.0)
    (args,) = parser.parse_args_into_dataclasses("--output_dir out --use_cpu --num_train_epochs 2".split())
    assert (args.num_requested_layers, args.num_train_epochs) == (0, 2.0)


def test_length_that_was_derived_follows_when_a_stage_changes():
    args = arguments(num_expert_layers=2)
    args.num_expert_layers = 4
    args.settle_stages_()
    assert args.num_train_epochs == 5.0
    args.settle_stages_(1)
    assert args.num_train_epochs == 2.0
    args.balance_steps_per_layer, args.specialise_steps = 10, 5
    args.settle_stages_()
    assert args.max_steps == 45
    args.balance_steps_per_layer = args.specialise_steps = None
    args.settle_stages_()
    assert (args.num_train_epochs, args.max_steps) == (5.0, -1)
    args.num_train_epochs = 7
    args.settle_stages_()
    assert args.num_train_epochs == 7
    args.num_expert_layers, args.expert_layers = 2, [1]
    with pytest.raises(ValueError, match="not both"):
        args.settle_stages_()


@pytest.mark.parametrize(
    ("options", "num_layers", "scaled"),
    [
        ({}, 2, False),
        ({"num_train_epochs": 3}, 2, False),
        ({"num_train_epochs": 5}, 2, True),
        ({"max_steps": 20}, 2, True),
        ({"balance_steps_per_layer": 10, "specialise_steps": 5}, 2, False),
    ],
    ids=str,
)
def test_stages_are_scaled_to_another_length_alone(options, num_layers, scaled):
    assert arguments(num_expert_layers=num_layers, **options).are_stages_scaled(num_layers) is scaled


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("specialise", [0, 1])
def test_every_layer_is_converted_in_the_shortest_training(max_steps, specialise):
    args = arguments(num_expert_layers=3, specialise_epochs=specialise, max_steps=max_steps)
    schedule = args.schedule([2, 1, 0], max_steps)
    assert [layer for _, layer in schedule.conversions] == [2, 1, 0]
    assert all(0 <= step < max_steps for step, _ in schedule.conversions)
    assert 0 <= schedule.balance_steps <= max_steps


def test_survives_json():
    args = arguments(num_expert_layers=2, balance_coef=0.5)
    written = json.loads(args.to_json_string())
    assert (written["num_expert_layers"], written["balance_coef"], written["num_train_epochs"]) == (2, 0.5, 3.0)
    (read,) = HfArgumentParser(ShrpTrainingArguments).parse_dict(written, allow_extra_keys=True)
    assert read.num_requested_layers == 2
    assert not read.are_stages_scaled(2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, StageSchedule(((0, 2), (10, 1)), 20, 30), id="an epoch each"),
        pytest.param({"conversion_order": "first_first"}, StageSchedule(((0, 1), (10, 2)), 20, 30), id="first layer first"),
        pytest.param(
            {"balance_epochs_per_layer": 0.5, "specialise_epochs": 0.25},
            StageSchedule(((0, 2), (5, 1)), 10, 12),
            id="parts of an epoch",
        ),
        pytest.param({"specialise_epochs": 0}, StageSchedule(((0, 2), (10, 1)), 20, 20), id="no specialising"),
        pytest.param({"max_steps": 12}, StageSchedule(((0, 2), (4, 1)), 8, 12), id="scaled to steps"),
        pytest.param({"num_train_epochs": 6}, StageSchedule(((0, 2), (20, 1)), 40, 60), id="scaled to epochs"),
        pytest.param(
            {"balance_steps_per_layer": 3, "specialise_steps": 4}, StageSchedule(((0, 2), (3, 1)), 6, 10), id="in steps"
        ),
    ],
)
def test_schedule_at_ten_steps_an_epoch(options, expected):
    args = arguments(num_expert_layers=2, **options)
    schedule = args.schedule(args.layers_to_convert(3), expected.max_steps)
    assert schedule == expected
    stages = [schedule.stage(step) for step in range(schedule.max_steps)]
    assert stages == ["balance"] * expected.balance_steps + ["specialise"] * (expected.max_steps - expected.balance_steps)


def test_pending_layers_set_up_ddp_and_checkpointing():
    args = arguments(num_expert_layers=2, gradient_checkpointing=True)
    assert args.ddp_find_unused_parameters is True
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    plain = arguments()
    assert plain.ddp_find_unused_parameters is None
    assert not plain.gradient_checkpointing_kwargs
    assert arguments(num_expert_layers=2, ddp_find_unused_parameters=False).ddp_find_unused_parameters is False


TWO_LAYERS = {"num_expert_layers": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"num_expert_layers": 2, "expert_layers": [1]},
            "Give `num_expert_layers` or `expert_layers`, not both: got 2 and [1].",
            id="both",
        ),
        pytest.param({"num_expert_layers": 0}, "`num_expert_layers` must be at least 1, got 0.", id="none"),
        pytest.param(
            {"expert_layers": []}, "`expert_layers` must name at least one layer, and none twice, got [].", id="empty"
        ),
        pytest.param(
            {"expert_layers": [2, 2]},
            "`expert_layers` must name at least one layer, and none twice, got [2, 2].",
            id="twice",
        ),
        pytest.param(
            TWO_LAYERS | {"conversion_order": "random"},
            '`conversion_order` must be "last_first" or "first_first", got \'random\'.',
            id="order",
        ),
        pytest.param(
            TWO_LAYERS | {"balance_steps_per_layer": 10, "specialise_steps": 5, "balance_epochs_per_layer": 0.5},
            "`balance_epochs_per_layer=0.5` disagrees with `balance_steps_per_layer=10`: give the stages in epochs or in "
            "steps, not in both.",
            id="epochs against steps",
        ),
        pytest.param(
            TWO_LAYERS | {"balance_steps_per_layer": 10, "specialise_steps": 5, "max_steps": 30},
            "`max_steps=30` disagrees with the stages, which take 25 steps: leave it out, or give the stages in epochs, which "
            "are scaled to it.",
            id="steps disagree",
        ),
        pytest.param(
            TWO_LAYERS | {"balance_steps_per_layer": 10},
            "`balance_steps_per_layer` and `specialise_steps` go together: got 10 and None.",
            id="half of the steps",
        ),
        pytest.param(
            TWO_LAYERS | {"specialise_steps": 10},
            "`balance_steps_per_layer` and `specialise_steps` go together: got None and 10.",
            id="other half of the steps",
        ),
        *(
            pytest.param({name: 0}, f"`{name}` must be more than 0, got 0.", id=f"{name} 0")
            for name in ("balance_epochs_per_layer", "balance_steps_per_layer")
        ),
        *(
            pytest.param({name: -1}, f"`{name}` must be 0 or more, got -1.", id=f"{name} -1")
            for name in (
                "specialise_epochs",
                "specialise_steps",
                "balance_coef",
                "distillation_logits",
                "distillation_hidden_states",
            )
        ),
        pytest.param(
            {"distillation_temperature": 0}, "`distillation_temperature` must be more than 0, got 0.", id="temperature"
        ),
        *(
            pytest.param(
                {"usage_holdout": share}, f"`usage_holdout` must be a share between 0 and 1, got {share}.", id=f"share {share}"
            )
            for share in (0, 1, -0.5)
        ),
        pytest.param(
            TWO_LAYERS | {"fsdp": "full_shard"},
            "`fsdp='full_shard'` cannot be used while layers are pending, because what runs changes under way. Convert under "
            "DDP, or at once with `from_pretrained(..., expert_layers=n)`.",
            id="fsdp",
        ),
        pytest.param(
            TWO_LAYERS | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`gradient_checkpointing_kwargs={'use_reentrant': True}` cannot be used while layers are pending: set "
            "`use_reentrant` to False.",
            id="reentrant checkpointing",
        ),
    ],
)
def test_contradictory_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        arguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_expert_layers": 4}, "`num_expert_layers` must be between 1 and 3 layers, got 4."),
        ({"expert_layers": [0, 3]}, "`expert_layers` names layer 3, but the model's layers are 0 to 2."),
        ({"expert_layers": [-1]}, "`expert_layers` names layer -1, but the model's layers are 0 to 2."),
    ],
    ids=str,
)
def test_layers_that_the_model_has_not_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        arguments(**options).layers_to_convert(3)
