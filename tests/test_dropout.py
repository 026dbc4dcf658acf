"""Dropout while a model trains: each kind alone, in every family, and as it was afterwards."""

import pytest
import torch
from torch import nn

from shrp_hf.pruning import to_shrp
from shrp_hf.training.dropout import dropout_rates
from tests.test_families import TABLE, stock
from tests.tiny import batch, tiny_bert, tiny_routed
from tests.tiny_training import trainer_for

RATES = ("hidden", "attention", "classifier")


def twice(model, inputs):
    model.train()
    outputs = [model(**inputs, output_hidden_states=True) for _ in range(2)]
    model.eval()
    return outputs


def models():
    for family in TABLE:
        head = "ImageClassification" if family == "vit" else "SequenceClassification"
        yield family, lambda family=family, head=head: stock(family, head)
    yield "routed", lambda: tiny_routed(2)
    yield "shrp", lambda: to_shrp(tiny_bert())


MODELS = dict(models())


@pytest.mark.parametrize("name", MODELS)
def test_without_dropout_two_passes_are_one(name):
    model = MODELS[name]()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=model.dtype)} if name == "vit" else batch()
    if name == "vit":  # whose config has none
        model.config.hidden_dropout_prob = 0.1
    with dropout_rates(model, hidden=0.0, attention=0.0, classifier=0.0):
        first, second = twice(model, inputs)
        assert torch.equal(first.logits, second.logits)
    for kind in RATES:
        off = dict.fromkeys(RATES, 0.0)
        if name == "vit" and kind == "classifier":  # it has none
            continue
        with dropout_rates(model, **(off | {kind: 0.5})):
            first, second = twice(model, inputs)
        assert not torch.equal(first.logits, second.logits), kind
        states_differ = not torch.equal(first.hidden_states[-1], second.hidden_states[-1])
        assert states_differ == (kind != "classifier"), kind


def test_rates_are_as_they_were_afterwards():
    model = tiny_routed(2)

    def rates():
        return [m.p for m in model.modules() if isinstance(m, nn.Dropout)] + [model.layers[2].experts.attention_dropout]

    before = rates()
    with dropout_rates(model, hidden=0.3, attention=0.4):
        assert set(rates()) == {0.3, 0.4, 0.1}
    assert rates() == before


def test_trainer_sets_the_rates_for_its_training(tmp_path):
    seen = []
    trainer = trainer_for(tmp_path, num_train_epochs=0.5, hidden_dropout=0.0, attention_dropout=0.25)
    before = trainer.model.bert.embeddings.dropout.p
    trainer.model.register_forward_pre_hook(
        lambda model, _: seen.append((model.bert.embeddings.dropout.p, model.bert.encoder.layer[0].attention.self.dropout.p))
    )
    trainer.train()
    assert set(seen) == {(0.0, 0.25)}
    assert trainer.model.bert.embeddings.dropout.p == before == 0.1


def test_models_that_are_not_known_may_be_trained_without_asking_for_a_rate():
    with dropout_rates(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="^`model` is of type None"), dropout_rates(nn.Linear(2, 2), hidden=0.0):
        pass
