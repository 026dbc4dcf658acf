"""Tables of costs: counted ones equal a count of every model, the measured one says what the clock said, of this machine."""

import copy
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from shrp_hf.families import head_layout
from shrp_hf.measuring import CostTable, count_flops, flop_table, latency_table, parameter_table, random_inputs
from shrp_hf.measuring import latency as measured
from shrp_hf.measuring.ladder import build_ladder, time_eager
from shrp_hf.plans.budget import Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads
from tests.tiny import tiny_bert, tiny_routed
from tests.toy_family import ToyConfig, ToyForSequenceClassification, forgotten_afterwards, register


def exact(message):
    return f"^{re.escape(message)}$"


def distilbert():
    sizes = {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 64, "vocab_size": 50, "max_position_embeddings": 40}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


def vit():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


@pytest.fixture(scope="module", autouse=True)
def registered():
    """A family from outside the package, known to this module's tests only."""
    with forgotten_afterwards():
        yield register()


def toy():
    return ToyForSequenceClassification(ToyConfig())


def static_experts():
    model = tiny_routed(1)
    return prune_heads(model, KeepPlan((range(4), range(4), (1, 2)), 4))


def random_plan(model, seed):
    """Any heads and neurons of ordinary layers, none and all among them."""
    rng, layout = np.random.default_rng(seed), head_layout(model)
    kept, neurons = [], []
    for i, heads in enumerate(layout.kept):
        if i in layout.expert_layers:
            kept.append(heads)
            neurons.append(())
            continue
        kept.append(tuple(rng.permutation(heads)[: rng.integers(len(heads) + 1)].tolist()))
        width = layout.num_neurons[i]
        neurons.append(tuple(rng.permutation(width)[: rng.integers(width + 1)].tolist()))
    return KeepPlan(tuple(kept), layout.num_heads, tuple(neurons), layout.num_neurons)


def priced(table, model):
    layout = head_layout(model)
    ordinary = [i for i in range(layout.num_layers) if i not in layout.expert_layers]
    layers = [(len(layout.kept[i]), layout.num_neurons[i]) for i in ordinary]
    return table.total(layers, [len(layout.kept[i]) for i in layout.expert_layers])


@pytest.mark.parametrize("build", [tiny_bert, distilbert, vit, static_experts, toy])
@pytest.mark.parametrize("seed", range(3))
def test_counted_tables_equal_a_count_of_the_model_that_was_cut(build, seed):
    model = build()
    at = Serving(batch_size=2, length=9)
    tables = parameter_table(model), flop_table(model, at)
    for each in (model, prune_heads(model, random_plan(model, seed))):
        assert priced(tables[0], each) == sum(parameter.numel() for parameter in each.parameters())
        assert priced(tables[1], each) == count_flops(each, 2, 9)


def test_counting_leaves_the_model_alone_and_takes_one_that_was_cut_already():
    model = prune_heads(tiny_bert(), random_plan(tiny_bert(), 1))
    before = copy.deepcopy(model.state_dict())
    table = flop_table(model, Serving(batch_size=1, length=5))
    assert priced(table, model) == count_flops(model, 1, 5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


SPENT = CostTable("seconds", 1.0, 0.5, (0, 2, 4), (0.0, 3.0, 4.0), (0, 64), (0.0, 8.0), {1: 2.0}, {"machine": "here"})


def test_what_lies_between_two_counts_is_interpolated():
    assert SPENT.attention_of(3) == 3.5
    assert SPENT.ffn_of(16) == 2.0
    assert SPENT.total([(4, 64), (0, 0), (1, 32)], [1, 1]) == 1 + (0.5 + 4 + 8) + 0.5 + (0.5 + 1.5 + 4) + 4


def test_a_table_is_read_as_it_was_written(tmp_path):
    for table in (SPENT, replace(SPENT, experts=None)):
        table.to_json(tmp_path / "table.json")
        assert CostTable.from_json(tmp_path / "table.json") == table


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SPENT.attention_of(5), "The table prices 0 to 4 heads, got 5: it is of another model."),
        (lambda: SPENT.ffn_of(-1), "The table prices 0 to 64 neurons, got -1: it is of another model."),
        (
            lambda: SPENT.experts_of(2),
            "The table holds no expert layer of 2 experts, but of [1]: measure it anew for this model.",
        ),
        (
            lambda: replace(SPENT, heads=(1, 2, 4)),
            "`heads` must ascend from 0, a number in `attention` for each, got (1, 2, 4) and (0.0, 3.0, 4.0).",
        ),
        (
            lambda: replace(SPENT, ffn=(0.0, -1.0)),
            "`seconds` of a part must be finite and at least 0, got [1.0, 0.5, 0.0, 3.0, 4.0, 0.0, -1.0, 2.0].",
        ),
    ],
)
def test_tables_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=exact(message)):
        build()


@pytest.mark.parametrize("text", ["[]", "{", '{"version": 2}', '{"version": 1, "unit": "seconds"}'])
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"`{path}` holds no table of costs (")):
        CostTable.from_json(path)


# --- measuring ---


def fake_clock(asked):
    """What a layer of the ladder would take if heads and neurons took so much; notes what it was asked for."""

    def time_fake(ladder, inputs):
        asked.append(tuple(inputs["input_ids"].shape))
        layout = head_layout(ladder)
        seconds = [7.0]
        for i, kept in enumerate(layout.kept):
            is_expert = i in layout.expert_layers
            seconds.append(100.0 * len(kept) if is_expert else 3 + 2 * len(kept) ** 2 + layout.num_neurons[i] / 8)
        return lambda: [*seconds, 4.0]

    return time_fake


@pytest.fixture
def asked(monkeypatch):
    found = []
    monkeypatch.setattr(measured, "time_eager", fake_clock(found))
    return found


AT = Serving(batch_size=2, length=9)


def test_the_table_says_what_the_clock_said(asked, tmp_path):
    done = []
    model = static_experts()
    table = latency_table(model, AT, folder=tmp_path, progress=lambda *counts: done.append(counts))
    assert asked == [(2, 9)]
    assert (table.unit, table.fixed, table.layer, table.experts) == ("seconds", 11.0, 3.0, {2: 200.0})
    assert table.heads == (0, 1, 2, 3, 4)
    assert [table.attention_of(count) for count in range(5)] == [0, 2, 8, 18, 32]
    assert [table.ffn_of(count) for count in (0, 16, 64)] == [0, 2, 8]
    assert table.total([(4, 64), (1, 0)], [2]) == 11 + (3 + 32 + 8) + (3 + 2) + 200
    assert done[-1] == (len(done), len(done))


def test_a_table_of_a_busy_machine_is_not_kept(monkeypatch, tmp_path):
    calls = itertools.count()

    def busy_clock(ladder, inputs):
        steady = fake_clock([])(ladder, inputs)
        return lambda: [seconds * (1 + next(calls) % 2) for seconds in [sum(steady())] + [0.0] * (len(steady()) - 1)]

    said = []
    monkeypatch.setattr(measured, "time_eager", busy_clock)
    monkeypatch.setattr(measured.logger, "warning", said.append)
    latency_table(tiny_bert(), AT, folder=tmp_path)
    assert "used, but not kept" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_table_is_measured_once_for_what_its_times_depend_on(asked, tmp_path):
    first = latency_table(tiny_bert(), AT, folder=tmp_path)
    again = latency_table(tiny_bert(num_hidden_layers=2), AT, folder=tmp_path)  # another depth: the same layers
    assert again == first
    assert len(asked) == 1
    latency_table(prune_heads(tiny_bert(), random_plan(tiny_bert(), 0)), AT, folder=tmp_path)  # the same family and sizes
    assert len(asked) == 1
    others = [
        (tiny_bert(), replace(AT, length=8)),
        (tiny_bert(), replace(AT, num_threads=torch.get_num_threads() + 1)),
        (tiny_bert(intermediate_size=32), AT),
        (tiny_bert(dtype=torch.float64), AT),
        (tiny_bert(attn_implementation="eager"), AT),
        (tiny_bert(head=BertModel), AT),
    ]
    for count, (model, at) in enumerate(others, start=2):
        latency_table(model, at, folder=tmp_path)
        assert len(asked) == count
    latency_table(tiny_bert(), AT, folder=tmp_path, anew=True)
    assert len(asked) == len(others) + 2
    assert not [path.name for path in tmp_path.iterdir() if path.suffix != ".json"]


def test_the_table_of_another_machine_is_not_taken(asked, tmp_path, monkeypatch):
    latency_table(tiny_bert(), AT, folder=tmp_path)
    other = {"machine": "64 x another processor"}
    monkeypatch.setattr(measured, "environment", lambda: other)
    latency_table(tiny_bert(), AT, folder=tmp_path)
    assert len(asked) == 2
    # Not even where a file was moved into the place of this machine's.
    (here,) = [path for path in tmp_path.iterdir() if CostTable.from_json(path).about["machine"] == other["machine"]]
    (there,) = [path for path in tmp_path.iterdir() if path != here]
    here.write_bytes(there.read_bytes())
    assert latency_table(tiny_bert(), AT, folder=tmp_path).about["machine"] == other["machine"]
    assert len(asked) == 3


def test_a_table_without_the_experts_that_are_asked_for_is_measured_anew(asked, tmp_path):
    model = static_experts()
    latency_table(prune_heads(model, KeepPlan((range(4), range(4), (1,)), 4)), AT, folder=tmp_path)
    assert latency_table(model, AT, folder=tmp_path).experts == {2: 200.0}
    assert len(asked) == 2


def test_what_cannot_be_measured_is_refused_before_it_is(asked, tmp_path):
    with pytest.raises(ValueError, match="`length` must be at most 40"):
        latency_table(tiny_bert(), Serving(length=64), folder=tmp_path)
    with pytest.raises(ValueError, match=re.escape("`model` is on meta, but tables are measured on the CPU")):
        latency_table(tiny_bert().to("meta"), AT, folder=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        latency_table(tiny_bert(), AT, folder=tmp_path / "file")
    assert not asked


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
def test_times_that_fall_are_pooled_as_isotonic_regression_does(times):
    isotonic = pytest.importorskip("sklearn.isotonic")
    expected = isotonic.isotonic_regression(np.array(times, dtype=np.float64))
    np.testing.assert_allclose(measured._rising(times), expected, atol=1e-12)


# --- the ladder ---


@pytest.mark.parametrize("build", [tiny_bert, distilbert, vit, static_experts, toy, lambda: tiny_bert(head=BertModel)])
def test_the_ladder_has_the_layers_that_were_asked_for_and_every_one_is_timed(build):
    model = build()
    experts = [2] if head_layout(model).expert_layers else []
    layers = [(4, 24), (0, 16), (3, 0), (1, 1)]
    ladder = build_ladder(model, layers, experts)
    layout = head_layout(ladder)
    assert [len(kept) for kept in layout.kept] == [heads for heads, _ in layers] + experts
    assert list(layout.num_neurons) == [neurons for _, neurons in layers] + [0] * len(experts)
    assert all(parameter.isfinite().all() for parameter in ladder.parameters())
    assert (ladder.dtype, ladder.config._attn_implementation) == (model.dtype, model.config._attn_implementation)
    seconds = time_eager(ladder, random_inputs(ladder, 2, 9))()
    assert len(seconds) == len(layers) + len(experts) + 2
    assert min(seconds) > 0


@pytest.mark.parametrize("has_pooler", [True, False])
def test_the_ladder_has_a_pooler_where_the_model_has_one(has_pooler):
    config = tiny_bert().config
    ladder = build_ladder(BertModel(config, add_pooling_layer=has_pooler), [(1, 8)])
    assert (ladder.pooler is not None) == has_pooler


@pytest.mark.parametrize(("build", "int8"), [(vit, False), (static_experts, True)], ids=["float32", "int8"])
def test_the_parts_of_the_ladder_in_onnx_say_together_what_pytorch_says(build, int8, tmp_path):
    pytest.importorskip("onnxruntime")
    from shrp_hf.measuring.onnx_ladder import open_parts, run_part, time_onnx

    model = build()
    ladder = build_ladder(model, [(4, 64), (0, 16), (3, 0)], [2] if head_layout(model).expert_layers else [])
    inputs = random_inputs(ladder, 3, 7)
    parts, known = open_parts(ladder, inputs, tmp_path, num_threads=1, int8=int8)
    assert len(parts) == ladder.config.num_hidden_layers + 2
    for part in parts:
        assert run_part(part, known) >= 0
    with torch.inference_mode():
        expected = ladder(**inputs).logits.numpy()
    np.testing.assert_allclose(known[parts[-1].outputs[0]], expected, atol=0.05 if int8 else 1e-5)
    assert len(time_onnx(ladder, inputs, tmp_path, 1, int8)()) == len(parts)
