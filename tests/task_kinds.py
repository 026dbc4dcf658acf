"""A tiny data set and a tiny dense model of every kind of task that is more than a label."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel, BertTokenizer, PreTrainedModel

from tests.tiny import tiny_bert

WORDS = ("the", "film", "is", "about", "a", "story", "of", "love", "war", "loud", "long", "short")
PEOPLE, PLACES = ("ann", "bob", "cleo"), ("rome", "oslo", "lima")
TAGS = ("O", "B-person", "I-person", "B-place", "I-place")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PEOPLE, *PLACES, "##s", "##x", *map(str, range(10))]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
OPTIONS = {"multilabel": ("--task", "multilabel"), "ranking": ("--task", "ranking")}
COUNT = 48


@dataclass(frozen=True)
class Made:
    """What the tests of a kind run on.

    Args:
        model: Directory of a dense model.
        options: Options that name the data.
    """

    model: Path
    options: tuple[str, ...]


def sentence(generator: torch.Generator, length: int = 4) -> str:
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())


def write_tokens(folder: Path) -> Path:
    """CoNLL files: a person's name (sometimes of two words) and a place in every sentence, in sub-words."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for split, count in (("train", COUNT), ("dev", 12), ("test", 16)):
        lines = []
        for row in range(count):
            lines += [f"{word}\tO" for word in sentence(generator).split()]
            lines += [f"{PEOPLE[row % 3]}s\tB-person"] + [f"{PEOPLE[row % 2]}\tI-person"] * (row % 2)
            lines += ["is\tO", f"{PLACES[row % 3]}x\tB-place", f"{split[0]}{row}\tO", ""]
        (folder / f"{split}.conll").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_ranking(folder: Path) -> Path:
    """TSV files in WikiQA's layout: four candidates a query, the second holds its person."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for split, count in (("train", 12), ("dev", 4), ("test", 6)):
        lines = ["query_id\tquestion\tsentence\tlabel"]
        for query in range(count):
            text = f"{split[:2]} {query} {PEOPLE[query % 3]} {sentence(generator)}"
            for place in range(4):
                name = PEOPLE[query % 3] if place == 1 else PLACES[place % 3]
                lines.append(f"{query}\t{text}\t{name} {sentence(generator)} {place}\t{int(place == 1)}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_collection(folder: Path) -> Path:
    """A collection in BEIR's layout: forty documents, eight queries with a graded and a relevant document each."""
    generator = torch.Generator().manual_seed(0)
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": PEOPLE[i % 3], "text": f"{sentence(generator)} {i}"} for i in range(40)]
    queries = [{"_id": f"q{i}", "text": f"{PEOPLE[i % 3]} {documents[3 * i]['text']}"} for i in range(8)]
    qrels = [f"q{i}\td{3 * i + step}\t{grade}" for i in range(8) for step, grade in ((0, 2), (1, 1), (2, 0))]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n", encoding="utf-8")
    return folder


def write_multilabel(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    topics = ("love", "war", "love|war", "")
    lines = [f"{sentence(generator)} {i},{topics[i % 4]}" for i in range(60)]
    path = folder / "topics.csv"
    path.write_text("\n".join(["text,labels", *lines]) + "\n", encoding="utf-8")
    return path


def write_modules(folder: Path, **pooling: object) -> None:
    """Makes a SentenceTransformer of a folder with an encoder, as old versions wrote it."""
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": ("", "1_Pooling", "2_Normalize")[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    prompts = {"prompts": {"query": "film ", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    written = {
        "modules.json": modules,
        "1_Pooling/config.json": POOLING | pooling,
        "config_sentence_transformers.json": prompts,
        "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False},
    }
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=40).save_pretrained(folder)
    return folder


def labelled(model: PreTrainedModel, names: tuple[str, ...]) -> PreTrainedModel:
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    return model


def make(kind: str, folder: Path) -> Made:
    """Writes data and dense model of a kind."""
    if kind == "tokens":
        model = labelled(tiny_bert(BertForTokenClassification, num_labels=len(TAGS)), TAGS)
        return Made(save(model, folder / "model"), ("--dataset", str(write_tokens(folder / "names"))))
    if kind == "ranking":
        model = tiny_bert(BertForSequenceClassification, num_labels=1)
        model.config.problem_type = None
        return Made(save(model, folder / "model"), ("--dataset", str(write_ranking(folder / "answers")), "--task", "ranking"))
    if kind == "multilabel":
        model = labelled(tiny_bert(BertForSequenceClassification, num_labels=2), ("love", "war"))
        model.config.problem_type = "multi_label_classification"
        data = write_multilabel(folder / "data")
        return Made(save(model, folder / "model"), ("--dataset", str(data), "--task", "multilabel"))
    model = save(tiny_bert(BertModel), folder / "model")
    write_modules(model)
    return Made(model, ("--dataset", str(write_collection(folder / "search"))))


KINDS: tuple[str, ...] = ("tokens", "ranking", "embeddings", "multilabel")
Maker = Callable[[str], Made]
