"""What a model's outputs mean follows from its head and its config."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from shrp_hf.models.outputs import predicts_per_token, problem_type, task_head
from shrp_hf.pruning import to_shrp
from tests.tiny import tiny_bert

FLOATS, CLASSES = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


class Mine(transformers.BertForTokenClassification):
    """A user's subclass, whose name says nothing."""


@pytest.mark.parametrize(
    ("name", "head", "per_token"),
    [
        ("BertModel", "", False),
        ("BertForSequenceClassification", "SequenceClassification", False),
        ("BertForTokenClassification", "TokenClassification", True),
        ("BertForQuestionAnswering", "QuestionAnswering", False),
        ("BertForMultipleChoice", "MultipleChoice", False),
        ("BertForMaskedLM", "MaskedLM", True),
    ],
)
def test_head_is_read_from_the_class(name, head, per_token):
    stock = tiny_bert(getattr(transformers, name))
    for model in (stock, to_shrp(stock)):
        assert task_head(model) == head
        assert predicts_per_token(model) is per_token


def test_head_of_what_the_class_inherits_from_and_of_wrapped_models():
    assert task_head(tiny_bert(Mine)) == "TokenClassification"
    wrapped = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    assert task_head(wrapped) == "SequenceClassification"
    assert task_head(type("RoFormerModel", (nn.Module,), {})()) == ""


@pytest.mark.parametrize(
    ("fields", "labels", "expected"),
    [
        ({}, CLASSES, "single_label_classification"),
        ({}, None, "single_label_classification"),
        ({}, FLOATS, "multi_label_classification"),
        ({"num_labels": 1}, FLOATS, "regression"),
        ({"num_labels": 1}, None, "regression"),
        ({"problem_type": "regression"}, FLOATS, "regression"),
        ({"problem_type": "multi_label_classification"}, None, "multi_label_classification"),
    ],
)
def test_problem_type_is_stated_or_that_of_the_labels(fields, labels, expected):
    assert problem_type(tiny_bert(**fields), labels) == expected


@pytest.mark.parametrize("name", ["TokenClassification", "MultipleChoice", "MaskedLM"])
def test_heads_that_know_one_loss_ignore_what_their_config_says(name):
    model = tiny_bert(getattr(transformers, f"BertFor{name}"), num_labels=1, problem_type="regression")
    assert problem_type(model, FLOATS) == "single_label_classification"
