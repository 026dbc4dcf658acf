"""The encoder that recipes are screened on is the package's, and so is its loss."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, MPNetConfig, MPNetModel

from experiments.frontier import GRIDS, jobs_of, table
from experiments.recipe_screen import CHANGES, combined
from experiments.screen_data import bert_names, prepare, read
from experiments.screen_model import Dropout, Encoder, layers_of, score, student_of
from experiments.screen_training import Lesson, Recipe, Rows, task_losses, teach, train
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.training.distillation import hidden_states_loss, logits_loss
from tests.task_kinds import save
from tests.tiny import randomize_, tiny_bert

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


@pytest.mark.parametrize("structure", ["dense", "1:whole,2:expert"])
def test_structures_and_losses_are_the_packages(structure, stock, dense, rows):
    found = scores(dense, rows)
    student = student_of(dense, structure, found).eval()
    theirs = to_shrp(copy.deepcopy(stock))
    if structure != "dense":
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
    thin = student_of(dense, "3:3x240", scores(dense, rows))
    assert [(layer.query.out_features, layer.up.out_features) for layer in thin.layers] == [(96, 240)] * 3


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_trains(name, dense, rows):
    recipe = replace(combined(name), epochs=1.0, batch_size=4)
    dense = dense.float()
    for structure in ("1:whole,2:expert", "3:3x240"):
        student = student_of(dense, structure, scores(dense, rows), warm=recipe.warm, stepwise=recipe.stepwise)
        before = student.classifier.weight.clone()
        found = train(student, Lesson(rows, teach(dense, rows), dense, recipe), recipe, 0, lambda: {"held_out": 0.5})
        assert found == {"held_out": 0.5, "steps": 2}
        assert not torch.equal(student.classifier.weight, before)


def test_changes_join():
    assert combined("teacher alone + 10 epochs") == Recipe(task=0.0, epochs=10.0)


def test_mpnet_is_the_packages(rows):
    config = MPNetConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    stock = MPNetModel(config)
    randomize_(stock)
    stock = stock.double().eval()
    encoder = Encoder(bert_names(stock.state_dict()), 2, head_size=16, eps=config.layer_norm_eps).double().eval()
    rows.ids[rows.ids == 1] = 2  # the padding of MPNet
    batch = rows.batch(torch.arange(8), 9)
    ours = encoder(batch["ids"], batch["types"], batch["mask"], Dropout())[1]
    theirs = stock(batch["ids"], attention_mask=batch["mask"].long(), output_hidden_states=True).hidden_states
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one[batch["mask"]], other[batch["mask"]], **EXACT)
    cut = student_of(encoder, "1:2x32,1:expert", score(encoder, [batch], lambda x, y: x.square().sum(dim=1)))
    assert [layer.heads.shape for layer in cut.layers] == [(2,), (1,)]
    assert cut(batch["ids"], batch["types"], batch["mask"], Dropout())[0].shape == (8, 2)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_structure_of_a_grid_has_the_models_layers(grid):
    jobs = list(jobs_of(grid, [0, 1]))
    assert {len(layers_of(job.structure)) for job in jobs if job.structure != "dense"} == {6 if grid.rows == 9000 else 12}
    assert len(jobs) == 2 * len(grid.tasks) * (1 + len(grid.structures) + len(grid.variants))


def test_fewer_layers_follow_evenly_spaced_ones(dense, rows):
    short = student_of(dense, "1:whole,1:none,1:whole", scores(dense, rows))
    assert len(short.layers) == 2
    lesson = Lesson(rows, teach(dense.float(), rows), dense, Recipe(task=0.0, logits=0.0))
    batch = rows.batch(torch.arange(8), 9)
    ours, theirs = (model(batch["ids"], batch["types"], batch["mask"], Dropout())[1] for model in (short.float(), dense))
    mask = batch["mask"]
    expected = (ours[1] - theirs[2])[mask].square().mean() / 2 + (ours[2] - theirs[3])[mask].square().mean() / 2
    torch.testing.assert_close(lesson.loss(short, torch.arange(8), 9), expected, rtol=1e-4, atol=1e-6)


def test_what_is_prepared_is_read_back(tmp_path):
    model, data = save(tiny_bert(), tmp_path / "model"), tmp_path / "data"
    for split, count in (("train", 60), ("dev", 8), ("test", 10)):
        lines = [f"{split} number {index}\t{index % 2}" for index in range(count)]
        path = data / "SST-2" / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["sentence\tlabel", *lines, ""]), encoding="utf-8")
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    prepare(str(model), data, paths, ["sst2"], 8, extra=False, packed=True)
    prepared = read(paths)
    whole = tmp_path / "whole.pt"
    prepare(str(model), data, [whole], ["sst2"], 8, extra=False, packed=False)
    exact = read([whole])
    assert prepared["shape"] == exact["shape"]
    used = prepared["vocabulary"][0].long()
    for name, value in exact["weights"].items():
        one, other = prepared["weights"][name], value
        if "word_embeddings" in name:
            one, other = one[used], other[used]
        step = other.abs().amax(dim=-1, keepdim=True) / 127 if other.dim() == 2 else torch.tensor(0.0)
        assert ((one - other).abs() <= 0.51 * step + 1e-7).all(), name
    for split, part in exact["tasks"]["sst2"]["splits"].items():
        assert torch.equal(part["ids"], prepared["tasks"]["sst2"]["splits"][split]["ids"])
    (tmp_path / "results.jsonl").write_text(
        '{"task": "sst2", "seed": 0, "structure": "dense", "name": "control", "reported": 0.8}\n'
        '{"task": "sst2", "seed": 0, "structure": "6:3x240", "name": "default", "reported": 0.6}\n',
        encoding="utf-8",
    )
    assert "| thin 3x240 | - | - | 60.0, 75.0% (1) | - | - | - |" in table(GRIDS["minilm"], tmp_path, "reported")
