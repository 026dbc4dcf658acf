"""Recipes: what they refuse, how long an epoch is, and that a model may teach twice."""

import copy
import re
from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import BertTokenizer, DataCollatorWithPadding

from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.training.recipes import (
    EXPERT_SELECTORS,
    RECIPES,
    Recipe,
    Setup,
    best_experts,
    convert,
    find_recipe,
    recover,
    without_routers,
)
from tests.tiny import same_state, tiny_bert

QUICK = Recipe("quick", 1, 1, recovery_epochs=1, expander_learning_rate=1e-3, distillation_logits=1)


@pytest.fixture
def setup(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    rows = {"input_ids": [[2, 5 + i % 8, 5 + i // 8, 3] for i in range(40)], "label": [i % 3 for i in range(40)]}
    data = DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(rows).select(range(8)))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    return Setup(data, tokenizer, tmp_path / "runs", batch_size=8, examples_per_epoch=16, resumable=False)


def test_recipe_is_found_and_changed_where_a_change_is_given():
    assert find_recipe("paper") == RECIPES["paper"]
    changed = find_recipe("default", recovery_epochs=0, learning_rate=None)
    assert (changed.recovery_epochs, changed.learning_rate) == (0, RECIPES["default"].learning_rate)
    with pytest.raises(ValueError, match=f"^{re.escape('`recipe` must be one of default, paper, got None.')}$"):
        find_recipe(None)


def test_only_a_recipe_with_a_weight_distils():
    assert RECIPES["default"].distils
    assert not RECIPES["paper"].distils


def test_an_epoch_is_as_many_examples_as_were_asked_for(setup):
    assert setup.epoch == 16 / 40
    assert setup.arguments("x", num_train_epochs=2 * setup.epoch).num_train_epochs == 0.8


def test_a_model_that_taught_once_converts_again_alike(setup):
    dense = to_shrp(tiny_bert(num_labels=3))
    first = convert(dense, [2], setup, QUICK)
    again = convert(dense, [2], setup, QUICK)
    assert same_state(first, again)
    assert not same_state(again.bert.embeddings, dense.bert.embeddings)  # not only routers and expanders were trained
    assert sum(first.usage()[2]) == 8


@pytest.mark.parametrize("term", ["distillation_logits", "distillation_hidden_states", "distillation_value_relations"])
def test_a_shorter_model_is_taught_by_every_term(term, setup):
    short, dense = to_shrp(tiny_bert(num_labels=3, num_hidden_layers=2)), to_shrp(tiny_bert(num_labels=3, seed=5))
    alone = recover(copy.deepcopy(short), dense, setup, Recipe("alone", recovery_epochs=1))
    taught = recover(copy.deepcopy(short), dense, setup, Recipe("taught", recovery_epochs=1, **{term: 1.0}))
    assert not same_state(short, alone)
    assert not same_state(alone, taught)


def test_best_experts_are_the_heads_of_highest_importance_in_their_layer(setup):
    dense = to_shrp(tiny_bert(num_labels=3))
    batches = DataLoader(setup.data["train"], 8, collate_fn=DataCollatorWithPadding(setup.tokenizer))
    importance = collect_head_stats(dense, batches, StatsRequest(importance=True)).importance()
    plan = best_experts(dense, [1, 2], setup, "his", keep=2)
    assert plan.kept[0] == (0, 1, 2, 3)
    assert [set(heads) for heads in plan.kept[1:]] == [set(row.topk(2).indices.tolist()) for row in importance[1:]]


@pytest.mark.parametrize("selector", sorted(set(EXPERT_SELECTORS) - {"usage"}))
def test_conversion_without_routers_cuts_to_the_chosen_experts(selector, setup):
    dense = to_shrp(tiny_bert(num_labels=3))
    recipe = replace(QUICK, expert_selector=selector)
    assert recipe.conversion_epochs(2) == 0
    model = convert(dense, [1, 2], setup, recipe, keep=2)
    kept = best_experts(dense, [1, 2], setup, selector, keep=2).kept
    assert not model.config.routed
    assert model.config.expert_layers == [1, 2]
    assert [tuple(heads) for heads in model.config.kept_heads] == list(kept)
    static = without_routers(model, 1)
    assert static is not model  # what trains the one leaves the other alone
    assert same_state(static, model)  # its experts are chosen already

    untrained = to_shrp(copy.deepcopy(dense)).requires_grad_(True)
    untrained.convert_layers_([1, 2])
    assert same_state(model, prune_heads(untrained, best_experts(dense, [1, 2], setup, selector, keep=2)))


def test_random_experts_differ_by_seed(setup):
    dense = to_shrp(tiny_bert(num_labels=3))
    drawn = {best_experts(dense, [1, 2], replace(setup, seed=seed), "random").kept for seed in range(8)}
    assert len(drawn) > 1


def test_bad_choices_of_experts_are_refused(setup):
    with pytest.raises(ValueError, match=r"^`expert_selector` must be one of usage, his, hies, .*, got 'cahp'\.$"):
        find_recipe("default", expert_selector="cahp")
    dense = to_shrp(tiny_bert(num_labels=3))
    for keep in (0, 5):
        with pytest.raises(ValueError, match=f"^`keep` must be between 1 and 4 experts, got {keep}\\.$"):
            convert(dense, [2], setup, replace(QUICK, expert_selector="his"), keep=keep)


def test_control_learns_from_labels_whoever_teaches():
    assert find_recipe("default").control == replace(find_recipe("default"), task_weight=1.0)
    assert find_recipe("paper").control == find_recipe("paper")


def test_teacher_is_stored_where_a_training_sees_its_rows_again(setup, monkeypatch):
    dense, whole = to_shrp(tiny_bert(num_labels=3)), replace(setup, examples_per_epoch=None)
    recipe = replace(find_recipe("default"), recovery_epochs=2.0)
    short = to_shrp(tiny_bert(num_labels=3, num_hidden_layers=2))
    folder = setup.folder / "teacher"
    recover(copy.deepcopy(short), dense, replace(whole, stores_teacher=False), recipe)
    recover(copy.deepcopy(short), dense, whole, replace(recipe, recovery_epochs=1.0))  # each row is seen once
    recover(copy.deepcopy(short), dense, whole, replace(recipe, distillation_value_relations=1.0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    recover(copy.deepcopy(short), dense, whole, recipe)
    monkeypatch.undo()
    assert not folder.exists()
    recover(copy.deepcopy(short), dense, whole, recipe)
    assert len(list(folder.iterdir())) == 1
    recover(copy.deepcopy(short), dense, replace(whole, seed=1), recipe)
    assert len(list(folder.iterdir())) == 1


def test_teacher_alone_makes_labels_irrelevant(setup):
    dense, short = to_shrp(tiny_bert(num_labels=3)), to_shrp(tiny_bert(num_labels=3, num_hidden_layers=2))
    other = setup.data["train"].remove_columns("label").add_column("label", [0] * 40)
    relabelled = replace(setup, data=DatasetDict(setup.data | {"train": other}))
    recipe = replace(find_recipe("default"), recovery_epochs=2.0)
    first, second = (recover(copy.deepcopy(short), dense, s, recipe) for s in (setup, relabelled))
    assert same_state(first, second)
    assert not same_state(first, short)


def test_what_routers_alone_read_is_refused_without_them():
    assert find_recipe("default", expert_selector="usage", specialise_epochs=2).specialise_epochs == 2
    for name, value in {"specialise_epochs": 2, "balance_epochs_per_layer": 1, "balance_coef": 0.5}.items():
        with pytest.raises(ValueError, match=f"^`{name}={value}` is about routers, which the recipe 'default' has not"):
            find_recipe("default", **{name: value})
