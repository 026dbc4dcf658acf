"""Students cut from a dense model: thin layers and fewer layers."""

import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from shrp_hf.measuring import flop_table
from shrp_hf.plans.budget import Budget, Serving
from shrp_hf.pruning import masked_heads, prune_heads, to_shrp
from shrp_hf.scoring import StatsRequest
from shrp_hf.structures import cut, keep_layers, score, spread_layers, thin, thin_plan, thin_reach, uniform_plan
from shrp_hf.training.recipes import Setup, find_recipe, recover
from tests.tiny import assert_near, batch, randomize_, same_state, tiny_bert


@pytest.fixture
def setup(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    rows = {"input_ids": [[2, 5 + i % 8, 5 + i // 8, 3] for i in range(40)], "label": [i % 3 for i in range(40)]}
    data = DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(rows).select(range(8)))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    return Setup(data, tokenizer, tmp_path / "runs", batch_size=8, examples_per_epoch=16, resumable=False)


AT = Serving(batch_size=2, length=16)


def flops(times, dense):
    return Budget.speedup(times, table=flop_table(dense, AT))


def test_thin_layers_are_the_masked_model_with_what_is_cut_at_its_mean(setup):
    dense = to_shrp(tiny_bert(num_labels=3, dtype=torch.float64))
    stats = score(dense, setup)
    plan = thin_plan(dense, Budget.flops(keep=0.5, at=AT), stats)
    model = thin(dense, Budget.flops(keep=0.5, at=AT), setup, stats=stats)
    assert sum(map(len, plan.kept)) < 12
    assert plan.num_kept_neurons < 3 * 64
    with masked_heads(dense, plan, stats.output_means()), torch.no_grad():
        expected = dense(**batch()).logits
    with torch.no_grad():
        assert_near(model(**batch()).logits, expected, torch.float64)
    assert same_state(model, prune_heads(dense, plan, stats.output_means()))
    assert not same_state(model, prune_heads(dense, plan))  # the means went into the biases


def test_one_pass_scores_all_that_a_thin_student_needs_and_is_kept(setup, tmp_path, monkeypatch):
    dense, cache = to_shrp(tiny_bert(num_labels=3)), tmp_path / "scores.safetensors"
    stats = score(dense, setup, cache=cache)
    assert stats.request.covers(StatsRequest(importance=True, neurons=True, means=True))
    monkeypatch.setattr("shrp_hf.scoring.collect._score", lambda *args: 1 / 0)
    assert torch.equal(score(dense, setup, cache=cache).importance(), stats.importance())


def test_uniform_layers_have_as_many_heads_and_neurons_each(setup):
    dense = to_shrp(tiny_bert(num_labels=3))
    config = thin(dense, flops(2, dense), setup, uniform=True).config
    assert len({len(heads) for heads in config.kept_heads}) == 1
    assert len(set(config.intermediate_sizes)) == 1
    half = thin(dense, Budget.fraction(0.5), setup, uniform=True).config
    assert [len(heads) for heads in half.kept_heads] == [2, 2, 2]
    assert half.intermediate_sizes == [32, 32, 32]


def test_thin_student_is_trained_back_by_a_teacher_that_stays_as_it_is(setup, tmp_path):
    dense = to_shrp(tiny_bert(num_labels=3))
    before = to_shrp(tiny_bert(num_labels=3))
    untrained = thin(dense.requires_grad_(False), flops(2, dense), setup)  # a model that taught before comes frozen
    assert all(parameter.requires_grad for parameter in untrained.parameters())
    model = recover(thin(dense, flops(2, dense), setup), dense, setup, replace(find_recipe("default"), recovery_epochs=1))
    assert not same_state(model, untrained)
    assert same_state(dense, before)
    model.save_pretrained(tmp_path / "thin")
    assert same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path / "thin"), model)


def test_budget_that_cannot_be_met_is_refused_before_anything_is_scored(setup, monkeypatch):
    dense = to_shrp(tiny_bert(num_labels=3))
    monkeypatch.setattr("shrp_hf.structures.score", lambda *args: 1 / 0)
    with pytest.raises(ValueError, match="the least that can be reached is"):
        thin(dense, Budget.flops(keep=1e-9, at=AT), setup)
    with pytest.raises(ValueError, match="`neurons=True` needs a budget that says how many neurons stay"):
        thin(dense, Budget.heads(4), setup)


def test_scoring_leaves_the_model_as_it_was(setup):
    dense, before = to_shrp(tiny_bert(num_labels=3)).train(), to_shrp(tiny_bert(num_labels=3))
    stats = score(dense, setup)
    assert dense.training
    assert same_state(dense, before)
    other = to_shrp(tiny_bert(num_labels=3, num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"."):
        cut(other, thin_plan(dense, Budget.fraction(0.5), stats), stats)


@pytest.mark.parametrize("layers", [[0, 1], [0, 2], [2]])
def test_kept_layers_run_as_in_the_dense_model(layers, tmp_path):
    dense = to_shrp(tiny_bert())
    short = keep_layers(dense, layers)
    assert short.config.num_hidden_layers == len(layers)
    with torch.no_grad():
        hidden = dense.bert.embeddings(**{"input_ids": batch()["input_ids"]})
        mask = torch.zeros(5, 1, 1, 9).masked_fill(batch()["attention_mask"][:, None, None] == 0, -torch.inf)
        for layer in layers:
            hidden = dense.layers[layer](hidden, mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        found = short(**batch(), output_hidden_states=True).hidden_states
    assert len(found) == len(layers) + 1
    assert_near(found[-1][batch()["attention_mask"] == 1], hidden[batch()["attention_mask"] == 1])
    short.save_pretrained(tmp_path)
    assert same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path), short)


def test_layers_that_are_no_layers_are_refused():
    dense = to_shrp(tiny_bert())
    for layers in ([], [3], [1, 0], [0, 0], [-1]):
        message = f"`layers` must be some of the 3 layers of a dense model, ascending, got {layers}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            keep_layers(dense, layers)
    with pytest.raises(ValueError, match="of a dense model"):
        keep_layers(prune_heads(dense, {0: [1]}), [0])


def test_layers_of_a_family_keep_their_kind(tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    config = ModernBertConfig(**sizes, layer_types=kinds, pad_token_id=0, local_attention=4)
    dense = ModernBertForSequenceClassification(config).eval()
    randomize_(dense)
    short = keep_layers(dense, [0, 2, 3])
    assert short.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert same_state(short.model.layers[2], to_shrp(dense).model.layers[3])
    with torch.no_grad():
        expected = short(**batch()).logits
        short.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(**batch()).logits, expected)
    with pytest.raises(ValueError, match=r"`layers` must begin with 0, got \[1, 2\]: the first layer of a ShrpModernBert"):
        keep_layers(dense, [1, 2])


def test_spread_layers_hold_both_ends():
    assert spread_layers(12, 4) == [0, 4, 7, 11]
    assert spread_layers(6, 6) == list(range(6))
    assert spread_layers(6, 1) == [0]
    for total in range(1, 30):
        for count in range(1, total + 1):
            chosen = spread_layers(total, count)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == count
    with pytest.raises(ValueError, match="`count` must be between 1 and the 6 layers of the model, got 7"):
        spread_layers(6, 7)


def test_reach_is_the_highest_speed_that_can_be_planned(setup):
    dense = to_shrp(tiny_bert(num_labels=3))
    stats, table = score(dense, setup), flop_table(dense, AT)
    reach = thin_reach(dense, table)
    plan = thin_plan(dense, Budget.speedup(reach, table=table), stats)
    assert [len(heads) for heads in plan.kept] == [1, 1, 1]
    with pytest.raises(ValueError, match="the least that can be reached"):
        thin_plan(dense, Budget.speedup(1.01 * reach, table=table), stats)


def test_uniform_plan_keeps_what_matters_most_in_each_layer(setup):
    dense = to_shrp(tiny_bert(num_labels=3))
    stats = score(dense, setup)
    plan = uniform_plan(dense, 2, 24, stats)
    assert [set(heads) for heads in plan.kept] == [set(row.topk(2).indices.tolist()) for row in stats.importance()]
    assert [set(n) for n in plan.neurons] == [set(row.topk(24).indices.tolist()) for row in stats.neuron_importance()]
    for heads, neurons in ((0, 24), (5, 24), (2, 65), (2, -1)):
        message = f"`heads` must be 1 to 4 and `neurons` 0 to 64, those of a layer, got {heads} and {neurons}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            uniform_plan(dense, heads, neurons, stats)
    thin_one = prune_heads(dense, plan)
    with pytest.raises(ValueError, match=r"^`stats` are those of a model with other neurons: score this model.$"):
        uniform_plan(thin_one, 2, 24, stats)
