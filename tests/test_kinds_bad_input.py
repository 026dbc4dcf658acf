"""Rows, models and options that no kind of task takes: refused by file and line before anything is trained."""

import json

import pytest
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel

from shrp_hf.tasks import Reading, load_fine_tuned, load_task
from shrp_hf.tasks.fine_tuned import load_to_fine_tune
from shrp_hf.tasks.sentence_folder import read_sentence_folder
from tests.task_kinds import TAGS, labelled, make, save, write_collection, write_modules, write_ranking, write_tokens
from tests.test_kinds import run
from tests.tiny import tiny_bert


def refused(name, **reading):
    with pytest.raises(ValueError, match=r"\w") as error:
        load_task(str(name), reading=Reading(**reading))
    return str(error.value)


# --- tokens ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("anns\tS-person", "tag 'S-person' is outside BIO, which has O, B-TYPE"),
        ("anns\tperson", "tag 'person' is outside BIO"),
        ("anns\tI-person", "tag 'I-person' goes on with an entity that has not begun (after 'O'): write 'B-person'"),
        ("anns", "expected a word and its tag, divided by a tab or spaces, got 'anns'"),
        ("anns\t", "expected a word and its tag"),
    ],
)
def test_lines_that_are_no_word_with_a_tag(line, message, tmp_path):
    folder = write_tokens(tmp_path / "names")
    path = folder / "dev.conll"
    lines = path.read_text(encoding="utf-8").split("\n")
    place = next(i for i, text in enumerate(lines) if text.endswith("B-person"))
    lines[place] = line
    path.write_text("\n".join(lines), encoding="utf-8")
    assert refused(folder).startswith(f"File {str(path)!r}, line {place + 1}: {message}")


def test_tags_in_other_files_and_entities_that_training_rows_lack(tmp_path):
    folder = write_tokens(tmp_path / "names")
    test = folder / "test.conll"
    test.write_text(test.read_text(encoding="utf-8").replace("B-place", "B-river", 1), encoding="utf-8")
    line = next(i for i, text in enumerate(test.read_text(encoding="utf-8").split("\n"), start=1) if "river" in text)
    assert refused(folder).startswith(f"File {str(test)!r}, line {line}: tag 'B-river' is none of the 5 tags of the training")
    rows = [{"tokens": ["ann", "is"], "tags": ["B-x", "O"]}] * 9
    for row, message in (
        ({"tokens": ["ann"], "tags": ["B-x", "O"]}, "1 words, but 2 tags"),
        ({"tokens": ["ann", " "], "tags": ["O", "O"]}, "word 1 (counted from 0): a word must be text"),
        ({"tokens": ["ann", "is"], "tags": ["O", "E-x"]}, "tag 'E-x' is outside BIO"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(r)}\n" for r in [*rows, row]), encoding="utf-8")
        said = refused(path)
        assert f"{path}', line 10" in said
        assert message in said
    path.write_text("".join(f"{json.dumps({'tokens': ['a'], 'tags': ['O']})}\n" for _ in range(9)), encoding="utf-8")
    assert "there must be at least one entity" in refused(path)
    (tmp_path / "flat.csv").write_text("text,label\na,b\n", encoding="utf-8")
    assert "must hold a list of words and a list of tags in each row" in refused(tmp_path / "flat.csv", task="tokens")


def test_a_tokenizer_without_word_ids_and_a_head_of_other_tags(tmp_path):
    task = load_task(str(write_tokens(tmp_path / "names")))

    class Slow:
        is_fast = False
        model_max_length = 40

        def num_special_tokens_to_add(self, pair):
            return 2

    with pytest.raises(ValueError, match="The tokenizer Slow has no word ids"):
        task.tokenize(Slow())
    few = save(labelled(tiny_bert(BertForTokenClassification, num_labels=3), TAGS[:3]), tmp_path / "few")
    with pytest.raises(ValueError, match="predicts 3 labels, but the task 'names' has 5"):
        load_fine_tuned(str(few), task)
    turned = save(labelled(tiny_bert(BertForTokenClassification, num_labels=5), TAGS[::-1]), tmp_path / "turned")
    with pytest.raises(ValueError, match="numbers its labels"):
        load_fine_tuned(str(turned), task)
    assert load_task(str(tmp_path / "names"), reading=Reading(label_names=TAGS[::-1])).label_names == TAGS[::-1]
    sentences = save(tiny_bert(BertForSequenceClassification, num_labels=5), tmp_path / "sentences")
    with pytest.raises(ValueError, match="was saved with the head SequenceClassification, but the task 'names'"):
        load_fine_tuned(str(sentences), task)


# --- ranking ---


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (3, "-1", "a relevance must be a whole number, 0 for none, got '-1'"),
        (3, "0.5", "a relevance must be a whole number"),
        (3, "yes", "a relevance must be a whole number"),
        (2, " ", "column 'sentence' must hold text in every row"),
        (1, "another question", "the query '0' (query_id) is 'another question' here and"),
    ],
)
def test_candidates_that_cannot_be_ranked(column, value, message, tmp_path):
    folder = write_ranking(tmp_path / "answers")
    path = folder / "train.tsv"
    lines = path.read_text(encoding="utf-8").split("\n")
    fields = lines[2].split("\t")
    fields[column] = value
    lines[2] = "\t".join(fields)
    path.write_text("\n".join(lines), encoding="utf-8")
    said = refused(folder, task="ranking")
    assert said.startswith(f"File {str(path)!r}, line 3: ")
    assert message in said


def test_queries_without_answers_or_columns(tmp_path):
    folder = write_ranking(tmp_path / "answers")
    path = folder / "test.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("\t1\n", "\t0\n"), encoding="utf-8")
    assert "no query has a relevant candidate, so there is nothing to rank" in refused(folder, task="ranking")
    (tmp_path / "one.csv").write_text("text,label\na,1\nb,0\n", encoding="utf-8")
    assert "must have a column of queries, one of candidates and one of labels" in refused(
        tmp_path / "one.csv", task="ranking"
    )


def test_a_cross_encoder_with_one_label_is_made_from_another_head(tmp_path):
    task = load_task(str(write_ranking(tmp_path / "answers")), reading=Reading(task="ranking"))
    save(tiny_bert(BertForSequenceClassification, num_labels=3), tmp_path / "three")
    with pytest.raises(ValueError, match="predicts 3 labels, but the task 'answers' has 1"):
        load_fine_tuned(str(tmp_path / "three"), task)
    model = load_to_fine_tune(str(tmp_path / "three"), task)
    assert (model.config.num_labels, model.config.problem_type) == (1, "multi_label_classification")
    model.save_pretrained(tmp_path / "one")
    assert load_fine_tuned(str(tmp_path / "one"), task).config.num_labels == 1


# --- embeddings ---


def test_judgements_that_name_what_is_not_there(tmp_path):
    folder = write_collection(tmp_path / "search")
    path, whole = folder / "qrels" / "test.tsv", (folder / "qrels" / "test.tsv").read_text(encoding="utf-8")
    for line, message in (
        ("q0\td99\t1", "document 'd99' is not in corpus.jsonl"),
        ("q99\td0\t1", "query 'q99' is not in queries.jsonl"),
        ("q0\td0", "expected query-id, corpus-id, score divided by tabs"),
        ("q0\td0\tgood", "expected query-id, corpus-id, score"),
    ):
        path.write_text(f"{whole}{line}\n", encoding="utf-8")
        assert refused(folder).startswith(f"File {str(path)!r}, line 26: {message}")
    path.write_text("\n".join(line for line in whole.split("\n") if not line.startswith("q3")), encoding="utf-8")
    said = refused(folder)
    assert said.startswith(
        f"File {str(folder / 'queries.jsonl')!r}, line 4: query 'q3' has no judgement in qrels (1 have none)"
    )
    (folder / "qrels" / "dev.tsv").write_text("q3\td1\t1\n", encoding="utf-8")  # of another split, without a header
    assert load_task(str(folder)).num_reported == 7
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8") + '{"_id": "d1", "text": "again"}\n', encoding="utf-8")
    assert f"{str(corpus)!r}, line 41: the id 'd1' is that of another line too" in refused(folder)


def test_corpora_without_texts(tmp_path):
    assert "Embeddings learn from texts: give `--corpus FILE`" in refused("", task="embeddings")
    assert "is no file or directory" in refused("", task="embeddings", corpus=str(tmp_path / "none.jsonl"))
    assert "holds no file that ends in" in refused("", task="embeddings", corpus=str(tmp_path))
    path = tmp_path / "corpus.jsonl"
    for row, message in (
        ({"text": ""}, "no row holds text in column 'text'"),
        ({"text": 3}, "line 1: column 'text' must hold text in every row, got 3"),
        ({"words": "a"}, "has no column of texts among ['words']: name it with `--text-column`"),
        ({"text": "one text"}, "must hold at least 5 different texts, got 1"),
    ):
        path.write_text(f"{json.dumps(row)}\n", encoding="utf-8")
        assert message in refused("", task="embeddings", corpus=str(path))
    path.write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(40)), encoding="utf-8")
    task = load_task("", reading=Reading(task="embeddings", corpus=str(path)))
    assert (len(task.train), len(task.validation), len(task.test), task.headline) == (29, 3, 8, "agreement")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("sentence1,sentence2,score\na,b,1.5\ntext 3,c,often\n", encoding="utf-8")
    reading = {"task": "embeddings", "corpus": str(path)}
    assert f"{str(pairs)!r}, line 3: a pair must have a number for a score, got 'often'" in refused(pairs, **reading)
    pairs.write_text("sentence1,sentence2,score\na,b,1.5\ntext 3,c,2\n", encoding="utf-8")
    task = load_task(str(pairs), reading=Reading(**reading))
    assert (task.headline, task.num_reported, len(task.test)) == ("spearmanr", 2, 4)
    assert "text 3" not in {*task.train["text"], *task.validation["text"]}
    assert "1 texts of the corpus are also judged ones and were left out" in task.describe()
    assert "`corpus` 'x' is for `--task embeddings` alone" in refused(pairs, corpus="x")


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        (
            "modules.json",
            [{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "1"}],
            "known are Transformer and",
        ),
        ("modules.json", [{"type": "a.Transformer", "path": "0_T"}, {"type": "a.Pooling", "path": "1"}], "lies in '0_T'"),
        ("modules.json", [{"type": "a.WordEmbeddings", "path": ""}, {"type": "a.Pooling", "path": "1"}], "WordEmbeddings"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling 'lasttoken' is not one of cls, max"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "leaves prompts out of its pooling"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "`do_lower_case` lies outside of the tokenizer"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "known are cosine and dot"),
    ],
)
def test_embedding_models_whose_modules_are_not_known(file, value, message, tmp_path):
    write_modules(tmp_path)
    (tmp_path / file).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_sentence_folder(str(tmp_path))
    assert str(error.value).startswith(f"`{tmp_path}`")


def test_commands_without_data_or_labels(tmp_path):
    model = save(tiny_bert(BertModel), tmp_path / "model")
    result = run("prune", model, "--keep", "0.5", "--output", tmp_path / "out")
    assert "Give `--dataset`, or for `--task embeddings` texts" in str(result.exception)
    made = make("embeddings", tmp_path)
    result = run("train", made.model, *made.options, "--output", tmp_path / "out")
    assert "has no labels to fine-tune on: set `dense_epochs` to 0" in str(result.exception)
    for command in (
        ["train", "--dense-epochs", "0", "--recipe", "paper"],
        ["compress", "--speedup", "2", "--recipe", "paper"],
        ["prune", "--keep", "0.5", "--recovery-epochs", "1", "--recipe", "paper"],
        ["compare", "--expert-layers", "1", "--recipes", "paper"],
    ):
        result = run(command[0], made.model, *made.options, *command[1:], "--output", tmp_path / "out")
        assert "has no teacher, and an embedding model has no labels" in str(result.exception), command
    assert not (tmp_path / "out").exists()
