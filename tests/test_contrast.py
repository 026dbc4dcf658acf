"""Embeddings that end on pairs: the loss, what it does to the vectors, and which pairs are taken."""

import json
import math

import pytest
import torch
from transformers import BertTokenizer

from shrp_hf.models.outputs import PAIRS
from shrp_hf.publishing.report import predict_on
from shrp_hf.tasks import Reading, load_fine_tuned, load_task
from shrp_hf.training.contrast import SCALE, PairCollator, contrastive_loss
from shrp_hf.training.recipes import Recipe, Setup, recover
from tests.task_kinds import PEOPLE, PLACES, VOCABULARY, WORDS, make
from tests.test_kinds import run

QUICK = Recipe("quick", recovery_epochs=0.5, task_weight=0.0, distillation_logits=1.0, recovery_learning_rate=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An embedding model with a collection, and pairs of which two are queries of the collection."""
    folder = tmp_path_factory.mktemp("embeddings")
    found = make("embeddings", folder)
    lines = (folder / "search" / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    queries = [json.loads(line)["text"] for line in lines]
    texts = [(f"{PEOPLE[i % 3]} {WORDS[i % 12]} {i % 10}", f"{PLACES[i % 3]} is {WORDS[i % 5]}") for i in range(24)]
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in texts]
    rows += [rows[0], {"anchor": queries[0], "positive": "a story"}, {"anchor": "war", "positive": queries[1]}]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return found, str(folder / "pairs.jsonl")


def test_a_text_tells_its_partner_from_those_of_others():
    vectors = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.0
    for i in range(3):
        scores = [SCALE * float(torch.cosine_similarity(vectors[i], vectors[3 + j], dim=0)) for j in range(3)]
        expected -= (scores[i] - math.log(sum(map(math.exp, scores)))) / 3
    assert float(contrastive_loss(vectors)) == pytest.approx(expected, abs=1e-10)
    assert float(contrastive_loss(vectors[:2])) == 0.0


def test_a_recovery_ends_on_the_pairs(made, tmp_path, monkeypatch):
    monkeypatch.setattr("shrp_hf.training.recipes.LEARNING_RATE", 1e-2)  # three steps, all of them of the warm-up
    found, pairs = made
    task = load_task(found.options[1], reading=Reading(pairs=pairs, task="embeddings"))
    assert "24 pairs of pairs.jsonl end a recovery, 2 that are reported on left out" in task.describe()
    assert task.identity != load_task(found.options[1]).identity
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}, model_max_length=40)
    dense = load_fine_tuned(str(found.model), task)
    data = task.tokenize(tokenizer, 24, dense)
    first = data[PAIRS][0]
    assert tokenizer.decode(first["input_ids"][1:-1]) == f"film {task.pairs[0]['text']}"  # the prompt of a query
    assert tokenizer.decode(first["positive_ids"][1:-1]) == task.pairs[0]["text_pair"]
    losses = []
    for split in (data, data):
        with_pairs = split if not losses else type(data)({name: rows for name, rows in data.items() if name != PAIRS})
        setup = Setup(with_pairs, tokenizer, tmp_path / str(len(losses)), batch_size=8, resumable=False)
        model = recover(load_fine_tuned(str(found.model), task), dense, setup, QUICK)
        batch = PairCollator(tokenizer)(list(data[PAIRS]))
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        losses.append(float(contrastive_loss((states * mask).sum(dim=1) / mask.sum(dim=1))))
        assert math.isfinite(task.compute_metrics(predict_on(model, data["validation"], tokenizer))["agreement"])
    assert losses[0] < losses[1]


def test_pairs_that_cannot_be_taken(made, tmp_path):
    found, _ = made
    path = tmp_path / "pairs.csv"
    for text, message in (
        ("anchor,other\na,b\n", "must have two columns of texts, such as anchor and positive"),
        ("anchor,positive\na,b\nc, \n", "line 3: column 'positive' must hold text in every row"),
        ("anchor,positive\na,b\na,b\n", "must hold at least 2 different pairs that are not reported on, got 1"),
    ):
        path.write_text(text, encoding="utf-8")
        result = run("prune", found.model, *found.options, "--pairs", path, "--keep", "0.5", "--output", tmp_path / "out")
        assert message in str(result.exception)
    with pytest.raises(ValueError, match="is no file"):
        load_task(found.options[1], reading=Reading(task="embeddings", pairs=str(tmp_path / "none.csv")))
