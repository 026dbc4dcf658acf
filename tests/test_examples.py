"""Each example runs as its docstring says, on a tiny model and a small task, and what it writes opens and answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertModel, BertTokenizer, pipeline

from tests.task_kinds import make
from tests.tiny import tiny_bert

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
WORDS = ["good", "great", "bad", "dull", "the", "film", "is", "very", "a", "story"]
HIDDEN_SIZE = 32
TRAINING = ["--per_device_train_batch_size", "8", "--report_to", "none", "--save_strategy", "no", "--use_cpu", "true"]


@pytest.fixture
def folder(tmp_path):
    """A directory with a classifier, an encoder, a task and the sentences of two more."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"), model_max_length=40)
    for name, model in {"dense": tiny_bert(num_labels=2), "encoder": tiny_bert(BertModel)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "SST-2").mkdir()
    for split, count in (("train", 48), ("test", 16)):
        rows = [f"the film is very {WORDS[i % 4]} {split} {WORDS[i // 4 % 10]}\t{int(i % 4 < 2)}" for i in range(count)]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]), encoding="utf-8")
    (tmp_path / "STS-B").mkdir()
    header = "genre\tfilename\tyear\tid\tscore\tsentence1\tsentence2\n"
    for split in ("train", "dev", "test"):
        rows = [f"g\tf\ty\t{i}\t{i % 5}.0\tthe film is {WORDS[i % 10]} {split}{i}\ta story is {split} {i}" for i in range(24)]
        (tmp_path / "STS-B" / f"{split}.tsv").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def run(name, folder, *words, launcher=()):
    script = next(path for path in EXAMPLES if path.name == name)
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(folder):
    return pipeline("text-classification", model=str(folder))("the film is good")[0]["score"]


def test_every_example_has_a_test_and_a_line_in_the_readme():
    source = Path(__file__).read_text(encoding="utf-8")
    readme = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        assert f'run("{path.name}"' in source
        assert f"- `{path.name}`" in readme


@pytest.mark.slow
def test_convert_and_prune(folder):
    task = ["--model", "dense", "--dataset", "sst2", "--data_dir", ".", "--num_expert_layers", "1", "--output_dir", "out"]
    text = run("convert_and_prune.py", folder, *task, *TRAINING)
    assert "static_accuracy" in text
    assert len(AutoModelForSequenceClassification.from_pretrained(folder / "out").config.expert_layers) == 1
    assert 0 < answers(folder / "out") <= 1


@pytest.mark.slow
def test_convert_and_prune_in_two_processes(folder):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    task = ["--model", "dense", "--dataset", "sst2", "--data_dir", ".", "--num_expert_layers", "1", "--output_dir", "out"]
    text = run("convert_and_prune.py", folder, *task, *TRAINING, launcher=launcher)
    assert text.count("static_accuracy") == 1
    assert not list((folder / "out").glob(".saving-*"))
    assert 0 < answers(folder / "out") <= 1
    with pytest.raises(AssertionError, match="`WORLD_SIZE=2` in the environment, but `args.world_size` is 1"):
        run("convert_and_prune.py", folder, *task, *TRAINING[:-2], launcher=launcher)


@pytest.mark.slow
def test_lora_on_pruned(folder):
    task = ["--model", "dense", "--dataset", "sst2", "--data_dir", ".", "--keep", "0.5", "--output_dir", "out"]
    text = run("lora_on_pruned.py", folder, *task, *TRAINING)
    assert "recovered_accuracy" in text
    config = AutoModelForSequenceClassification.from_pretrained(folder / "out").config
    assert sum(map(len, config.kept_heads)) * 2 == config.num_hidden_layers * config.num_attention_heads
    assert 0 < answers(folder / "out") <= 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", [[], ["--int8"]], ids=["float32", "int8"])
def test_serve_onnx(precision, folder):
    text = run("serve_onnx.py", folder, "--model", "dense", "--output", "onnx", *precision, "the film is good", "a dull story")
    served = json.loads(text.splitlines()[-1])
    assert served["imported"] == []
    names = AutoModelForSequenceClassification.from_pretrained(folder / "dense").config.id2label.values()
    assert len(served["labels"]) == 2
    assert set(served["labels"]) <= set(names)


@pytest.mark.slow
def test_prune_posthoc(folder):
    words = ["--model", "dense", "--dataset", "sst2", "--data-dir", ".", "--output", "out"]
    text = run("prune_posthoc.py", folder, *words)
    assert float(text.rsplit(maxsplit=1)[1]) < 1e-4  # cut and masked say the same
    assert 0 < answers(folder / "out") <= 1


@pytest.mark.slow
def test_prune_embeddings(folder):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(folder / "encoder"))  # with mean pooling, as it does for any encoder
    encoder.save(str(folder / "sentences"))
    lines = [f"the {a} film is very {b} and {c}" for a in WORDS for b in WORDS[:3] for c in WORDS[:2]]
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ["--model", "sentences", "--output", "out", "--texts", "lines.txt", "--data-dir", "STS-B"]
    text = run("prune_embeddings.py", folder, *words, "--num-expert-layers", "1", "--recovery-epochs", "1")
    assert "Spearman" in text
    assert SentenceTransformer(str(folder / "out")).encode(["the film"]).shape == (1, HIDDEN_SIZE)


@pytest.mark.slow
def test_search_and_rerank(tmp_path):
    for kind in ("embeddings", "ranking"):
        (tmp_path / kind).mkdir()
        make(kind, tmp_path / kind)
    models = ["--bi-encoders", *["embeddings/model"] * 2, "--cross-encoders", *["ranking/model"] * 2]
    text = run("search_and_rerank.py", tmp_path, "--collection", "embeddings/search", *models, "--rerank", "5")
    original, again = text.strip().splitlines()[-2:]
    assert text.startswith("40 documents, 8 queries, 5 documents of each reranked")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (original, again)]
    assert [cells[0][i] for i in (0, 3, 5)] == [cells[1][i] for i in (0, 3, 5)]  # the same models find the same
    assert all(0 < float(cells[0][i]) <= 1 for i in (3, 5))
