"""Recipes: what they refuse, how long an epoch is, and that a model may teach twice."""

import copy
import re

import pytest
from datasets import Dataset, DatasetDict
from transformers import BertTokenizer

from shrp_hf.recipes import RECIPES, Recipe, Setup, convert, find_recipe, recover
from shrp_hf.surgery import to_shrp
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
