"""What the kinds of task are judged by and learn: against ten-line references, and what is left out of both."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import (
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    RobertaTokenizer,
)

from shrp_hf.models.outputs import EMBEDDING, answers_of, probe_loss, sentence_vectors
from shrp_hf.plans.budget import Budget
from shrp_hf.pruning import to_shrp
from shrp_hf.publishing.report import predict_on
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.selectors import HisSelector
from shrp_hf.tasks import KINDS, Reading, Task, load_fine_tuned, load_task
from shrp_hf.tasks.embeddings import prompt_of
from shrp_hf.tasks.kind import draws
from shrp_hf.tasks.sentence_folder import plain_embedding, read_sentence_folder, write_sentence_folder
from shrp_hf.training.distillation import outputs_loss
from shrp_hf.training.recipes import Setup, fine_tune
from shrp_hf.training.sampling import RowCollator
from shrp_hf.training.teacher_outputs import TeacherOutputs
from tests.task_kinds import TAGS, VOCABULARY, make, save, write_modules, write_tokens
from tests.tiny import batch, tiny_bert

NAMES = ("O", "B-x", "I-x", "B-y", "I-y")
MEAN = plain_embedding() | {"normalize": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY), encoding="utf-8")
    return BertTokenizer(vocab=str(path), model_max_length=40)


def embedder(dtype=torch.float64, **fields):
    model = to_shrp(tiny_bert(BertModel, dtype=dtype))
    setattr(model.config, EMBEDDING, MEAN | fields)
    return model


# --- tokens ---


def said(tags, places=None):
    """An answer with these tags, and what judges it."""
    logits = [np.eye(len(NAMES))[[NAMES.index(tag) for tag in row]] for row in tags]
    return logits, places


def predicted(tags, gold, places=None):
    places = places or [list(range(len(row))) for row in gold]
    judged = [{"tags": [NAMES.index(tag) for tag in row], "places": where} for row, where in zip(gold, places, strict=True)]
    return EvalPrediction(said(tags)[0], judged)


def test_entities_are_right_with_type_and_both_ends():
    gold = [["B-x", "I-x", "O", "B-y"], ["B-x", "B-x", "I-x"]]
    tags = [["B-x", "I-x", "O", "B-x"], ["B-x", "I-x", "I-x"]]
    # Right: x at 0-1. Said: x 0-1, x 3, x 0-2. There: x 0-1, y 3, x 0, x 1-2.
    found = KINDS["tokens"].judge(predicted(tags, gold), KINDS["tokens"].metric_names, NAMES)
    assert found == pytest.approx({"entity_f1": 2 / 7, "entity_precision": 1 / 3, "entity_recall": 1 / 4})
    # A word without a token is "O" for the model and stays in the judgement.
    cut = predicted([["B-x", "I-x"], ["B-x", "B-x", "I-x"]], gold, [[0, 1, -1, -1], [0, 1, 2]])
    assert KINDS["tokens"].judge(cut, ["entity_recall"], NAMES) == {"entity_recall": 3 / 4}
    assert KINDS["tokens"].decide(cut, NAMES).tolist() == [1, 2, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("name", KINDS["tokens"].metric_names)
def test_resampled_sentences_are_judged_as_seqeval_judges_them(name):
    generator = np.random.default_rng(3)
    gold, tags = ([[NAMES[i] for i in generator.integers(5, size=6)] for _ in range(12)] for _ in range(2))
    kind, prediction = KINDS["tokens"], predicted(tags, gold)
    found = kind.resample([prediction, predicted(gold, gold)], name, NAMES, 8, seed=5)
    for column, rows in enumerate(draws(12, 8, seed=5)):
        drawn = EvalPrediction([prediction.predictions[i] for i in rows], [prediction.label_ids[i] for i in rows])
        assert found[0, column] == pytest.approx(kind.judge(drawn, [name], NAMES)[name], abs=1e-12)
    assert found[1].tolist() == [1.0] * 8


def test_first_sub_words_carry_the_tags_and_truncated_words_are_said(tokenizer, tmp_path, caplog):
    task = load_task(str(write_tokens(tmp_path / "names")))
    assert (task.kind.name, task.label_names) == ("tokens", TAGS)
    row = task.tokenize(tokenizer, 24)["test"][1]
    words = task.test[1]["tokens"]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    for place, label in enumerate(row["label"]):
        is_first = not tokens[place].startswith(("##", "[CLS]", "[SEP]"))
        assert (label == -100) == (not is_first)
    kept = [label for label in row["label"] if label != -100]
    assert kept == task.test[1]["label"] == row["judged"]["tags"]
    assert [tokens[place] for place in row["judged"]["places"]] == [tokenizer.tokenize(word)[0] for word in words]
    caplog.clear()
    short = task.tokenize(tokenizer, 5)["test"][1]
    assert short["judged"]["places"][3:] == [-1] * (len(words) - 3)
    assert "words have no token within `max_length` 5" in caplog.text


@pytest.mark.parametrize("is_sequence", [False, True])
def test_words_have_the_tokens_of_running_text(is_sequence):
    words = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "Ġ", "b", "Ġa", "Ġb"))}
    byte_level = RobertaTokenizer(vocab=words, merges=[("Ġ", "a"), ("Ġ", "b")])
    if is_sequence:
        whole = byte_level.backend_tokenizer.pre_tokenizer
        byte_level.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([whole])
    rows = Dataset.from_dict({"tokens": [["a", "b", "a"]], "label": [[0, 1, 2]]})
    encoded = KINDS["tokens"].encode(rows, byte_level, 16, None, "train")[0]
    assert encoded["input_ids"] == byte_level(" a b a")["input_ids"] == [0, 8, 9, 8, 2]
    assert encoded["label"] == [-100, 0, 1, 2, -100]
    assert byte_level("a b")["input_ids"] == [0, 5, 9, 2]  # the tokenizer itself is as it was


def test_labels_of_tokens_are_padded_and_others_are_left_as_they_are(tokenizer):
    rows = [
        {"input_ids": [2, 5, 3], "label": [-100, 1, -100], "judged": {"a": 1}},
        {"input_ids": [2, 3], "label": [-100, -100]},
    ]
    made = RowCollator(tokenizer)(rows)
    assert made["labels"].tolist() == [[-100, 1, -100], [-100, -100, -100]]
    assert "judged" not in made
    several = [{"input_ids": [2, 5], "label": [1.0, 0.0]}, {"input_ids": [2, 5], "label": [0.0, 0.0]}]
    assert RowCollator(tokenizer)(several)["labels"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    plain = [{"input_ids": [2, 5], "label": 1}]
    assert RowCollator(tokenizer)(plain)["labels"].tolist() == DataCollatorWithPadding(tokenizer)(plain)["labels"].tolist()


def test_a_teacher_of_tokens_is_followed_on_labelled_tokens_alone():
    student, teacher = (tiny_bert(BertForTokenClassification, seed=seed, dtype=torch.float64) for seed in (1, 2))
    inputs = batch() | {"labels": torch.randint(3, (5, 9), generator=torch.Generator().manual_seed(0))}
    inputs["labels"][:, ::2] = -100
    with torch.no_grad():
        outputs = [model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}) for model in (student, teacher)]
        found = outputs_loss(student, inputs, outputs[0], outputs[1], temperature=2.0)
        expected, count = 0.0, 0
        for row in range(5):
            for place in range(9):
                if inputs["attention_mask"][row, place] and inputs["labels"][row, place] != -100:
                    p, q = ((output.logits[row, place] / 2).log_softmax(-1) for output in outputs)
                    expected, count = expected + 4 * float((q.exp() * (q - p)).sum()), count + 1
    assert float(found) == pytest.approx(expected / count, abs=1e-10)


# --- ranking ---


def test_queries_are_ranked_and_averaged():
    judged = [{"query": q, "grade": g} for q, g in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0))]
    scores = np.array([[0.5], [0.1], [0.9], [0.2], [0.3]])
    found = KINDS["ranking"].judge(EvalPrediction(scores, judged), KINDS["ranking"].metric_names, ())
    ideal = 2 + 1 / math.log2(3)
    assert found["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert found["mrr"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["ndcg@10"] == pytest.approx(((2 + 1 / 2) / ideal + 1 / math.log2(3)) / 2)
    assert KINDS["ranking"].decide(EvalPrediction(scores, judged), ()).tolist() == [2, 4]
    resampled = KINDS["ranking"].resample([EvalPrediction(scores, judged)], "mrr", (), 50, seed=0)
    assert {*resampled[0].tolist()} == {0.5, 0.75, 1.0}


def test_queries_without_an_answer_are_left_out_and_grades_become_probabilities(tmp_path):
    rows = [
        ("a", "x", 2),
        ("a", "y", 0),
        ("b", "x", 0),
        ("b", "z", 0),
        ("c", "u", 1),
        ("c", "v", 0),
        ("d", "u", 1),
        ("e", "w", 1),
    ]
    lines = ["query,document,score", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = load_task(str(tmp_path / "all.csv"), reading=Reading(task="ranking", label_column="score"))
    assert any("1 of 5 queries of train have no relevant candidate: left out" in note for note in task.notes)
    found = {
        (row["text"], row["text_pair"]): row["label"] for split in (task.train, task.validation, task.test) for row in split
    }
    assert found == {(q, d): [grade / 2] for q, d, grade in rows if q != "b"}
    queries = [{*split["query"]} for split in (task.train, task.validation, task.test)]
    assert len(set.union(*queries)) == sum(map(len, queries)) == 4


# --- embeddings ---


def test_every_pooling_is_that_of_sentence_transformers():
    models = pytest.importorskip("sentence_transformers.models")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 6, 8, generator=generator, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [4]])).long()
    for modes in (["cls"], ["max"], ["mean"], ["mean_sqrt_len_tokens"], ["cls", "mean"]):
        expected = models.Pooling(8, pooling_mode=tuple(modes))({"token_embeddings": states, "attention_mask": mask})
        found = sentence_vectors(MEAN | {"modes": modes, "normalize": False}, states, mask)
        torch.testing.assert_close(found, expected["sentence_embedding"], rtol=0, atol=1e-12)


def test_a_folder_is_written_as_it_was_read(tmp_path):
    save(tiny_bert(BertModel), tmp_path)
    write_modules(tmp_path, pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    embedding = read_sentence_folder(str(tmp_path))
    assert embedding == {
        "modes": ["cls"],
        "normalize": True,
        "similarity": "cosine",
        "prompts": {"query": "film ", "document": ""},
        "default_prompt_name": None,
        "max_length": 24,
    }
    (tmp_path / "again").mkdir()
    write_sentence_folder(tmp_path / "again", embedding, 32)
    assert read_sentence_folder(str(tmp_path / "again")) == embedding
    assert [prompt_of(embedding, role) for role in ("query", "document", "")] == ["film ", "", ""]


def test_importance_is_how_far_a_head_moves_the_vectors():
    model, batches = embedder(), [batch(seed=seed) for seed in range(3)]
    stats = collect_head_stats(model, batches, StatsRequest(importance=True))
    expected, count = torch.zeros(3, 4, dtype=torch.float64), 0
    for index, inputs in enumerate(batches):
        for row in range(5):  # one sentence at a time, its heads behind gates
            gates = [torch.ones(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
            handles = [
                layer.attention.output.dense.register_forward_pre_hook(
                    lambda _, args, gate=gate: ((args[0].unflatten(-1, (4, -1)) * gate[:, None]).flatten(-2),)
                )
                for layer, gate in zip(model.layers, gates, strict=True)
            ]
            own = {name: value[row : row + 1] for name, value in inputs.items()}
            vector = sentence_vectors(MEAN, model(**own).last_hidden_state, own["attention_mask"])[0]
            directions = torch.randn(5, 32, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            expected += torch.stack(torch.autograd.grad(vector @ directions[row], gates)).abs()
            count += 1
            for handle in handles:
                handle.remove()
    torch.testing.assert_close(stats.importance(), expected / count, rtol=0, atol=1e-10)


def test_random_directions_tell_the_distance():
    """Of sentences that all move by d, the mean of |u . d| is sqrt(2 / pi) |d|, within five of its standard errors."""
    gates, moves = torch.ones(20_000, requires_grad=True), torch.tensor([3.0, -4.0, 12.0])
    probe_loss(gates[:, None] * moves, seed=1).backward()
    found = (len(gates) * gates.grad).abs().mean() / moves.norm()
    assert float(found) == pytest.approx(math.sqrt(2 / math.pi), abs=5 * math.sqrt((1 - 2 / math.pi) / len(gates)))


def test_probes_are_drawn_by_the_batch_and_heads_are_chosen_without_labels():
    vectors = torch.ones(2, 3, dtype=torch.float64)
    assert probe_loss(vectors, 1) == probe_loss(vectors, 1)
    assert probe_loss(vectors, 1) != probe_loss(vectors, 2)
    model, batches = embedder(), [batch(seed=seed) for seed in range(4)]
    plan = HisSelector(budget=Budget.heads(5)).select(model, batches)
    assert plan.num_kept == 5
    with pytest.raises(ValueError, match="gives no loss: importance needs `labels`"):
        HisSelector(budget=Budget.heads(5)).select(tiny_bert(BertModel), batches)


def test_vectors_of_a_teacher_are_followed_by_their_relative_distance():
    student, teacher = embedder(normalize=False), embedder(normalize=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    inputs = batch()
    with torch.no_grad():
        ours, theirs = (model(**inputs) for model in (student, teacher))
        found = outputs_loss(student, inputs, ours, theirs, temperature=3.0)
        how, mask = student.config.sentence_embedding, inputs["attention_mask"]
        sides = [sentence_vectors(how, outputs.last_hidden_state, mask) for outputs in (ours, theirs)]
    reference = np.mean([float((a - b).norm() / b.norm()) ** 2 for a, b in zip(*sides, strict=True)])
    assert float(found) == pytest.approx(reference, abs=1e-10)


@pytest.mark.parametrize("kind", ["tokens", "embeddings"])
def test_a_stored_teacher_teaches_what_it_teaches_itself(kind, tmp_path, tokenizer):
    made = make(kind, tmp_path)
    task = load_task(made.options[1])
    dense = load_fine_tuned(str(made.model), task)
    data = task.tokenize(tokenizer, 24, dense)
    collator = RowCollator(tokenizer)
    stored = TeacherOutputs.compute(dense, data["train"], collator, tmp_path / "stored", dtype=None)
    rows = stored.numbered(data["train"]).select(range(6))
    inputs = collator([{name: value for name, value in row.items() if name != "label"} for row in rows])
    looked_up = stored(**inputs, output_hidden_states=True)
    row = inputs.pop("teacher_row")
    assert row.tolist() == list(range(6))
    with torch.no_grad():
        direct = dense(**inputs, output_hidden_states=True)
        mask = inputs["attention_mask"] == 1
        for ours, theirs in zip(looked_up["hidden_states"], direct.hidden_states, strict=True):
            torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-5)
        loss = outputs_loss(dense, inputs, direct, looked_up, temperature=1.0)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    losses = []
    for stores in (True, False):
        setup = Setup(data, tokenizer, tmp_path / str(stores), batch_size=8, resumable=False, stores_teacher=stores)
        student = load_fine_tuned(str(made.model), task)
        with torch.no_grad():
            student.layers[2].output.dense.weight.mul_(0.5)
        teaching = {"task_weight": 0.0, "distillation_logits": 1.0, "distillation_hidden_states": 1.0}
        teaching |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "teacher": load_fine_tuned(str(made.model), task)}
        model = fine_tune(student, setup, 2, 1e-3, name="x", **teaching)
        losses.append(task.compute_metrics(predict_on(model, data["validation"], tokenizer)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_agreement_is_with_the_dense_model_and_similarity_is_the_models_own(tokenizer):
    texts = Dataset.from_dict({"text": [f"the film {i}" for i in range(9)]})
    task = Task("texts", texts, texts, texts, (), KINDS["embeddings"].metric_names, "nowhere", "embeddings")
    dense = embedder(torch.float32)
    data = task.tokenize(tokenizer, 16, dense)
    prediction = predict_on(dense, data["validation"], tokenizer)
    assert task.compute_metrics(prediction) == pytest.approx({"agreement": 1.0, "cosine": 1.0}, abs=1e-6)
    other = EvalPrediction(prediction.predictions[::-1], prediction.label_ids)
    assert task.compute_metrics(other)["agreement"] < 1
    assert task.bootstrap([prediction, other], 20).shape == (2, 20)
    plain = embedder(torch.float32, normalize=False)
    with torch.no_grad():
        outputs = plain(**batch())
        lengths = {}
        for similarity in ("cosine", "dot"):
            plain.config.sentence_embedding["similarity"] = similarity
            said = answers_of(plain, outputs, batch()["attention_mask"])
            lengths[similarity] = torch.stack(said).norm(dim=1)
    torch.testing.assert_close(lengths["cosine"], torch.ones(5), rtol=0, atol=1e-5)
    assert ((lengths["dot"] - 1).abs() > 0.1).all()
    with pytest.raises(ValueError, match="`model` must be the embedding model"):
        task.tokenize(tokenizer, 16)
