import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from shrp_hf.measuring import (
    ModelReport,
    ParameterCount,
    Timing,
    accuracy_interval,
    count_flops,
    count_parameters,
    measure_throughput,
    measure_training_step,
    peak_memory,
    random_inputs,
    report_table,
    training_step,
)
from shrp_hf.measuring import timing as timing_module
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification, ShrpBertModel

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
TINY_VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
)


def on_meta(build, config):
    with torch.device("meta"):
        return build(config)


def static_config(num_layers):
    layers = list(range(12 - num_layers, 12))
    kept = [[0] if layer in layers else list(range(12)) for layer in range(12)]
    return ShrpBertConfig(expert_layers=layers, kept_heads=kept, routed=False)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing_module, "MIN_ROUND_SECONDS", 0.0)


# --- parameters ---


def test_bert_base_has_the_parameters_of_the_paper():
    count = count_parameters(on_meta(BertModel, BertConfig()))
    assert count == ParameterCount(85_054_464, 85_645_056, 109_482_240, 23_837_184)


@pytest.mark.parametrize(
    ("num_layers", "encoder_and_pooler", "reductions"),
    [(6, 44_312_448, (0.4860, 0.4826, 0.3775)), (11, 9_868_608, (0.8909, 0.8848, 0.6921))],
    ids=["6 of 12", "11 of 12"],
)
def test_static_models_shrink_as_the_paper_counts(num_layers, encoder_and_pooler, reductions):
    dense = count_parameters(on_meta(BertModel, BertConfig()))
    static = count_parameters(on_meta(ShrpBertModel, static_config(num_layers)))
    assert static.encoder_and_pooler == encoder_and_pooler
    found = static.reduction_from(dense)
    assert list(found) == ["encoder", "encoder_and_pooler", "whole"]
    assert tuple(found.values()) == pytest.approx(reductions, abs=5e-5)


@pytest.mark.parametrize(
    ("build", "config"),
    [
        pytest.param(BertForSequenceClassification, BertConfig(), id="bert, classifier"),
        pytest.param(DistilBertForSequenceClassification, DistilBertConfig(), id="distilbert, classifier"),
        pytest.param(RobertaForMaskedLM, RobertaConfig(), id="roberta, language model"),
        pytest.param(ViTForImageClassification, ViTConfig(), id="vit, classifier"),
    ],
)
def test_task_head_is_not_counted(build, config):
    model = on_meta(build, config)
    assert count_parameters(model) == count_parameters(model.base_model)


@pytest.mark.parametrize(
    ("build", "config", "layer", "num_layers", "pooler"),
    [
        pytest.param(DistilBertModel, DistilBertConfig(), "transformer.layer.0", 6, 0, id="distilbert"),
        pytest.param(ViTModel, ViTConfig(), "layers.0", 12, 590_592, id="vit"),
    ],
)
def test_other_families(build, config, layer, num_layers, pooler):
    model = on_meta(build, config)
    count = count_parameters(model)
    final_norm = 2 * 768 if hasattr(model, "layernorm") else 0
    assert count.encoder == num_layers * 7_087_872 + final_norm
    assert sum(p.numel() for p in model.get_submodule(layer).parameters()) == 7_087_872
    assert count.encoder_and_pooler - count.encoder == pooler
    assert count.whole == count.encoder_and_pooler + count.embeddings == sum(p.numel() for p in model.parameters())


def test_pooler_that_is_not_there_counts_nothing():
    count = count_parameters(on_meta(BertForTokenClassification, BertConfig()))
    assert count.encoder == count.encoder_and_pooler == 85_054_464


def test_model_without_embeddings_is_refused():
    with pytest.raises(ValueError, match="GPT2Model"):
        count_parameters(on_meta(GPT2Model, GPT2Config()))


# --- FLOPs ---


def test_flops_of_bert_base_by_hand():
    batch, length, hidden = 8, 128, 768
    linear = 2 * batch * length * (4 * hidden * hidden + 2 * hidden * 3072)
    attention = 2 * 2 * batch * 12 * length * length * 64
    pooler = 2 * batch * hidden * hidden
    model = on_meta(BertModel, BertConfig())
    assert count_flops(model, batch, length) == 12 * (linear + attention) + pooler


def test_flops_of_a_static_model_are_the_papers_share():
    dense = count_flops(on_meta(BertModel, BertConfig()), 8, 128)
    assert count_flops(on_meta(ShrpBertModel, static_config(11)), 8, 128) / dense == pytest.approx(0.110, abs=5e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_counting_flops_leaves_the_model_as_it_was(implementation):
    model = BertForSequenceClassification._from_config(BertConfig(**TINY), attn_implementation=implementation).train()
    model.bert.pooler.eval()
    before = state(model)
    flops = count_flops(model, 2, 8)
    assert flops == count_flops(on_meta(BertForSequenceClassification, BertConfig(**TINY)), 2, 8)
    assert model.config._attn_implementation == implementation
    assert model.bert.encoder.training
    assert not model.bert.pooler.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_state(model, before)


def test_attention_is_restored_when_the_forward_pass_fails():
    model = BertModel(BertConfig(**TINY))
    model.encoder.layer[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        count_flops(model, 1, 4)
    assert model.config._attn_implementation == "sdpa"


def test_task_head_counts_in_flops():
    config = BertConfig(**TINY, num_labels=3)
    head = count_flops(on_meta(BertForSequenceClassification, config), 2, 8) - count_flops(on_meta(BertModel, config), 2, 8)
    assert head == 2 * 2 * 16 * 3


@pytest.mark.parametrize(
    ("build", "config", "shape"),
    [
        pytest.param(ViTModel, TINY_VIT, (2, 3, 8, 8), id="vit"),
        pytest.param(BertForMultipleChoice, BertConfig(**TINY), (2, 1, 6), id="multiple choice"),
        pytest.param(BertModel, BertConfig(**TINY), (2, 6), id="bert"),
    ],
)
def test_random_inputs_fit_the_model(build, config, shape):
    model = build(config)
    (batch,) = random_inputs(model, 2, 6).values()
    assert batch.shape == shape
    assert count_flops(model, 2, 6) > 0


def test_random_ids_are_repeatable_and_hold_no_padding():
    model = BertModel(BertConfig(**{**TINY, "vocab_size": 3, "pad_token_id": 1}))
    ids = random_inputs(model, 4, 16)["input_ids"]
    assert set(ids.flatten().tolist()) == {0, 2}
    assert torch.equal(ids, random_inputs(model, 4, 16)["input_ids"])


@pytest.mark.parametrize(
    ("batch_size", "length", "message"),
    [(0, 4, "`batch_size`.*got 0"), (1, 0, "`length`.*got 0"), (1, 17, "`length`.*16.*got 17")],
)
def test_shapes_that_do_not_fit_are_refused(batch_size, length, message):
    with pytest.raises(ValueError, match=message):
        count_flops(BertModel(BertConfig(**TINY)), batch_size, length)


# --- time ---


@pytest.mark.usefixtures("quick")
def test_throughput_times_every_model_in_every_round_in_inference_mode():
    models = {name: BertModel(BertConfig(**TINY)).train() for name in ("a", "b")}
    order = []
    for name, model in models.items():

        def record(module, args, output, name=name):
            order.append((name, module.training, torch.is_inference_mode_enabled()))

        model.register_forward_hook(record)
    seen = []
    threads = torch.get_num_threads()
    timings = measure_throughput(
        models, 2, 8, num_rounds=3, num_threads=2, progress=lambda done, total: seen.append((done, total))
    )
    assert torch.get_num_threads() == threads
    assert order[-6:] == [("a", False, True), ("b", False, True)] * 3
    assert seen == [(turn, 6) for turn in range(1, 7)]
    assert all(model.training for model in models.values())
    assert list(timings) == ["a", "b"]
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]
    assert (timings["a"].num_threads, timings["a"].device) == (2, "cpu")
    assert (timings["a"].batch_size, timings["a"].length) == (2, 8)
    assert all(second > 0 for calls in timings["a"].seconds for second in calls)


def timing(name, *rounds, batch_size=4):
    return Timing(name, batch_size, 8, "cpu", 1, rounds)


def test_ratio_is_the_median_of_the_ratios_within_rounds():
    # The machine is ten times slower in the last round: the ratio of medians over all calls would be 2.5.
    slow = timing("slow", (2.0, 2.0, 9.0), (4.0,), (40.0,))
    fast = timing("fast", (1.0, 1.0, 1.0), (1.0, 1.0), (10.0,))
    assert fast.ratio_to(slow) == 4.0
    assert slow.ratio_to(fast) == 0.25


def test_timing_summarises():
    found = timing("a", (1.0, 2.0), (3.0, 4.0, 5.0))
    assert (found.p50, found.p95) == (3.0, pytest.approx(4.8))
    assert found.sequences_per_second == pytest.approx(4 / 3)
    assert found.spread == pytest.approx(2 / 3)
    assert found.summary()["p50_ms"] == pytest.approx(3000)
    assert found.summary()["num_rounds"] == 2


def test_ratio_of_different_runs_is_refused():
    with pytest.raises(ValueError, match="'b'.*Measure both in one call"):
        timing("a", (1.0,)).ratio_to(timing("b", (1.0,), batch_size=8))


@pytest.mark.parametrize(
    "kwargs", [{"num_rounds": 0}, {"num_threads": 0}, {"models": {}}], ids=["rounds", "threads", "models"]
)
def test_nothing_to_measure_is_refused(kwargs):
    arguments = {"models": {"a": BertModel(BertConfig(**TINY))}, "batch_size": 1, "length": 4, **kwargs}
    with pytest.raises(ValueError, match="At least one model, round and thread"):
        measure_throughput(**arguments)


# --- training ---


@pytest.mark.usefixtures("quick")
def test_timing_training_leaves_the_models_as_they_were():
    config = ShrpBertConfig(**TINY, expert_layers=[1])
    models = {"dense": BertModel(BertConfig(**TINY)), "routed": ShrpBertForSequenceClassification(config)}
    before = {name: state(model) for name, model in models.items()}
    timings = measure_training_step(models, 2, 8, num_rounds=2)
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]
    for name, model in models.items():
        assert_same_state(model, before[name])
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "config"),
    [
        pytest.param(BertModel, BertConfig(**TINY), id="base model"),
        pytest.param(BertForSequenceClassification, BertConfig(**TINY), id="classifier"),
        pytest.param(BertForSequenceClassification, BertConfig(**TINY, num_labels=1), id="regressor"),
        pytest.param(
            BertForSequenceClassification, BertConfig(**TINY, num_labels=3, problem_type="regression"), id="three numbers"
        ),
        pytest.param(
            BertForSequenceClassification,
            BertConfig(**TINY, num_labels=3, problem_type="multi_label_classification"),
            id="several labels",
        ),
        pytest.param(RobertaForMaskedLM, RobertaConfig(**TINY), id="language model"),
    ],
)
def test_training_step_changes_the_model(build, config):
    model = build(config).eval()
    before = state(model)
    training_step(model, 2, 8)()
    assert model.training
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("layer.0.attention" in name for name in changed)


def test_training_step_of_a_routed_classifier_counts_usage_and_trains_the_router():
    model = ShrpBertForSequenceClassification(ShrpBertConfig(**TINY, expert_layers=[1]))
    before = model.base_model.layers[1].router.weight.clone()
    training_step(model, 3, 8)()
    assert sum(model.usage()[1]) == 3
    assert not torch.equal(before, model.base_model.layers[1].router.weight)


# --- memory ---


def test_peak_memory_counts_what_is_held_at_once():
    megabyte = 2**20

    def call():
        first = torch.zeros(megabyte, dtype=torch.uint8)
        second = torch.zeros(2 * megabyte, dtype=torch.uint8)
        del first, second
        return torch.zeros(megabyte, dtype=torch.uint8)

    assert peak_memory(call) == pytest.approx(3 * megabyte, rel=1e-3)
    held = torch.zeros(megabyte, dtype=torch.uint8)
    assert peak_memory(lambda: held.add_(1)) < megabyte / 100


def test_peak_memory_of_training_holds_weights_gradients_and_optimizer_states():
    config = BertConfig(**{**TINY, "vocab_size": 5000})

    def train():
        step = training_step(BertModel(config), 1, 4)
        step()
        step()

    weights = 4 * count_parameters(BertModel(config)).whole
    assert peak_memory(train) == pytest.approx(4 * weights, rel=0.02)
    assert peak_memory(train) == peak_memory(train)


# --- accuracy and table ---


@pytest.mark.parametrize(
    ("num_correct", "total", "expected"),
    [(50, 100, (0.4038, 0.5962)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (1, 1, (0.2065, 1.0))],
)
def test_accuracy_interval_against_published_values(num_correct, total, expected):
    assert accuracy_interval(num_correct, total) == pytest.approx(expected, abs=5e-5)


def test_accuracy_interval_solves_the_score_equation():
    for bound in accuracy_interval(37, 120):
        assert abs(37 / 120 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 120), rel=1e-5)


def test_accuracy_interval_holds_none_and_all_correct_whatever_the_number_of_rows():
    for total in [*range(1, 200), *range(200, 3001, 23)]:
        none, every = accuracy_interval(0, total), accuracy_interval(total, total)
        assert (none[0], every[1]) == (0, 1)
        assert 0 < none[1] == pytest.approx(1 - every[0], abs=1e-12)


@pytest.mark.parametrize(("num_correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_accuracy_is_refused(num_correct, total):
    with pytest.raises(ValueError, match=f"got {num_correct} of {total}"):
        accuracy_interval(num_correct, total)


DENSE = ParameterCount(800, 900, 1000, 100)
STATIC = ParameterCount(80, 180, 280, 100)


def test_report_table_is_markdown_against_the_first_row():
    rows = [
        ModelReport("dense", DENSE, 10**9, timing("dense", (4.0,)), (60, 100)),
        ModelReport("static", STATIC, 10**8, timing("static", (0.5,)), (59, 100)),
    ]
    assert report_table(rows).splitlines() == [
        "| Model | Accuracy (95% interval) | Encoder | Encoder + pooler | Whole model | FLOPs | Throughput |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 0.600 (0.502 to 0.691) | 800 | 900 | 1,000 | 1.00 G (100.0%) | 1.00x |",
        "| static | 0.590 (0.492 to 0.681) | 80 (-90.0%) | 180 (-80.0%) | 280 (-72.0%) | 0.10 G (10.0%) "
        "| 8.00x (80% of the FLOP ratio) |",
    ]


def test_report_table_leaves_out_what_was_not_measured():
    table = report_table([ModelReport("dense", DENSE, 10**9), ModelReport("static", STATIC, 10**8)])
    assert "Accuracy" not in table
    assert "Throughput" not in table
    mixed = report_table(
        [ModelReport("dense", DENSE, 10**9, timing("dense", (4.0,))), ModelReport("s", STATIC, 10**8, None, (1, 2))]
    )
    assert mixed.splitlines()[2].split(" | ")[1] == "-"
    assert mixed.splitlines()[3].endswith("| - |")


def test_report_table_refuses_rows_without_a_baseline():
    with pytest.raises(ValueError, match="at least one model"):
        report_table([])
    with pytest.raises(ValueError, match="'dense'.*must have a timing"):
        report_table([ModelReport("dense", DENSE, 1), ModelReport("static", STATIC, 1, timing("static", (1.0,)))])
