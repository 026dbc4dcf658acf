"""The encoder that recipes are screened on is the package's, and so is its loss."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from experiments.recipe_screen import CHANGES, STRUCTURES, combined
from experiments.screen_model import Dropout, Encoder, score, student_of
from experiments.screen_training import Lesson, Recipe, Rows, task_losses, teach, train
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.training.distillation import hidden_states_loss, logits_loss
from tests.tiny import randomize_

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def stock():
    config = BertConfig(
        vocab_size=99, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, num_labels=3
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    randomize_(model)
    return model.double().eval()


@pytest.fixture
def dense(stock):
    weights = {name.removeprefix("bert."): value for name, value in stock.state_dict().items()}
    encoder = Encoder(weights, 3).double()
    encoder.classifier.load_state_dict(stock.classifier.state_dict())
    return encoder.eval()


@pytest.fixture
def rows():
    lengths = torch.tensor([9, 4, 7, 2, 9, 5, 3, 8])
    ids = torch.randint(1, 99, (8, 9), generator=torch.Generator().manual_seed(1))
    ids *= torch.arange(9) < lengths[:, None]
    return Rows(ids.int(), torch.zeros_like(ids), lengths, torch.arange(8) % 3.0)


def scores(dense, rows):
    return score(dense, [batch for _, batch in rows.batches(4)], task_losses)


@pytest.mark.parametrize("structure", ["dense", "shrp"])
def test_structures_and_losses_are_the_packages(structure, stock, dense, rows):
    found = scores(dense, rows)
    student = student_of(dense, structure, found).eval()
    theirs = to_shrp(copy.deepcopy(stock))
    if structure == "shrp":
        theirs.convert_layers_([1, 2])
        best = [(int(found.heads[layer].argmax()),) for layer in (1, 2)]
        theirs = prune_heads(theirs, KeepPlan(((0, 1, 2, 3), *best), 4)).eval()
    batch = rows.batch(torch.arange(8), 9)
    logits, hidden, _ = student(batch["ids"], batch["types"], batch["mask"], Dropout())
    output = theirs(batch["ids"], attention_mask=batch["mask"].long(), output_hidden_states=True)
    torch.testing.assert_close(logits, output.logits, **EXACT)
    for ours, other in zip(hidden, output.hidden_states, strict=True):
        torch.testing.assert_close(ours[batch["mask"]], other[batch["mask"]], **EXACT)

    recipe = Recipe(hidden_states=3.0)
    with torch.no_grad():
        taught = stock(batch["ids"], attention_mask=batch["mask"].long(), output_hidden_states=True)
    expected = (
        task_losses(output.logits, batch["labels"]).mean()
        + logits_loss(output.logits, taught.logits, 2.0)
        + 3 * hidden_states_loss(output.hidden_states, taught.hidden_states, batch["mask"])
    )
    lesson = Lesson(rows, teach(dense.float(), rows), dense, recipe)  # outputs are stored in single precision
    torch.testing.assert_close(lesson.loss(student, torch.arange(8), 9), expected, rtol=1e-4, atol=1e-5)


def test_thin_layers_keep_what_scores_best(dense, rows):
    thin = student_of(dense, "thin", scores(dense, rows))
    assert [(layer.query.out_features, layer.up.out_features) for layer in thin.layers] == [(96, 240)] * 3


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_trains(name, dense, rows):
    recipe = replace(combined(name), epochs=1.0, batch_size=4)
    dense = dense.float()
    for structure in STRUCTURES:
        student = student_of(dense, structure, scores(dense, rows), warm=recipe.warm, stepwise=recipe.stepwise)
        before = student.classifier.weight.clone()
        found = train(student, Lesson(rows, teach(dense, rows), dense, recipe), recipe, 0, lambda: {"held_out": 0.5})
        assert found == {"held_out": 0.5, "steps": 2}
        assert not torch.equal(student.classifier.weight, before)


def test_changes_join():
    assert combined("teacher alone + 10 epochs") == Recipe(task=0.0, epochs=10.0)
