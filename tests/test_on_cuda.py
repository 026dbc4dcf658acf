"""The plugin of `make test-cuda`, as far as a machine without a GPU can tell."""

import pytest
import torch
from transformers import PreTrainedModel

from tests import on_cuda
from tests.tiny import batch, tiny_bert


@pytest.fixture
def moved(monkeypatch):
    """Every model's call through the plugin, the encoder's inside a classifier too; where to is not told apart here."""
    monkeypatch.setattr(on_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(on_cuda, "_calls", [])
    monkeypatch.setattr(PreTrainedModel, "__call__", on_cuda._on_device(PreTrainedModel.__call__))
    return on_cuda._calls


def test_a_call_says_what_it_said_and_is_counted_once(moved):
    model = tiny_bert()
    said = model(**batch()).logits
    assert moved == ["BertForSequenceClassification"]
    assert torch.equal(said, model.forward(**batch()).logits)
    said.sum().backward()
    assert model.classifier.weight.grad is not None


def test_an_error_ends_the_call(moved):
    model = tiny_bert()
    with pytest.raises(ValueError, match="input_ids"):
        model()
    model(**batch())
    assert moved == ["BertForSequenceClassification"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_taken_for_a_proof():
    with pytest.raises(RuntimeError, match="needs a GPU"):
        on_cuda.pytest_configure()
