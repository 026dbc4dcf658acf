"""What any trainer or library saves of a Shrp model opens where shrp_hf is not installed."""

import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from shrp_hf import KeepPlan, ShrpBertForSequenceClassification, ShrpBertModel, ShrpTrainer, prune_heads
from tests.test_pipelines import NOT_INSTALLED, TEXTS, tokenizer_for
from tests.tiny import batch, tiny_bert, tiny_routed
from tests.tiny_training import DATA, STOCK, trainer_for

CLASSIFIERS = ["plain", "ours", "accelerate", "glue", "glue/checkpoint-5"]
RUN_GLUE = """
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelAndDataArguments:
    model_name_or_path: str
    train_file: str
    validation_file: str
    max_seq_length: int = field(default=128)


def main():
    arguments, training_args = HfArgumentParser((ModelAndDataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    raw_datasets = load_dataset("csv", data_files=files)
    num_labels = len(raw_datasets["train"].unique("label"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model_name_or_path, num_labels=num_labels)

    def preprocess_function(examples):
        return tokenizer(examples["sentence"], max_length=arguments.max_seq_length, truncation=True)

    raw_datasets = raw_datasets.map(preprocess_function, batched=True)

    def compute_metrics(p):
        return {"accuracy": (np.argmax(p.predictions, axis=1) == p.label_ids).mean().item()}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=raw_datasets["train"],
        eval_dataset=raw_datasets["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        train_result = trainer.train()
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card(finetuned_from=arguments.model_name_or_path, tasks="text-classification")


if __name__ == "__main__":
    main()
"""
OPENS = """
import copy, json, torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments
trust = {"trust_remote_code": True}
inputs, texts = torch.load("inputs.pt"), json.load(open("texts.json"))
found = {}
with torch.no_grad():
    for folder in json.load(open("classifiers.json")):
        model = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(folder, **trust))
        AutoModel.from_pretrained(folder, **trust)
        found[folder] = model(**inputs).logits.tolist()
    Trainer(model, TrainingArguments("came-with-code", use_cpu=True, report_to="none")).save_model()
    model = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained("came-with-code", **trust))
    found["came-with-code"] = model(**inputs).logits.tolist()
for folder in ("sentences", "sentences-again"):
    encoder = SentenceTransformer(folder, device="cpu", **trust)
    found[folder] = encoder.encode(texts).tolist()
    encoder.save("sentences-again")
found["pairs"] = CrossEncoder("pairs", device="cpu", **trust).predict([texts]).tolist()
assert "shrp_hf" not in sys.modules
json.dump(found, open("found.json", "w"))
"""


def static(**fields):
    return prune_heads(tiny_routed(2, **fields), KeepPlan(((0, 1, 2, 3), (2,), (0, 3)), 4))


def run_glue(folder, *words):
    """The script with two names exchanged, and nothing else."""
    source = RUN_GLUE.replace("    Trainer,\n    TrainingArguments,\n", "")
    source = source.replace("\n\n\n@dataclass", "\nfrom shrp_hf import ShrpTrainer, ShrpTrainingArguments\n\n\n@dataclass", 1)
    source = source.replace("ModelAndDataArguments, TrainingArguments)", "ModelAndDataArguments, ShrpTrainingArguments)")
    source = source.replace("trainer = Trainer(", "trainer = ShrpTrainer(")
    (folder / "run_glue.py").write_text(source, encoding="utf-8")
    for name, count in (("train", 40), ("dev", 8)):
        rows = [f"w{i % 90 + 5} w{i * 7 % 90 + 5} w9,{i % 2}" for i in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["sentence,label", *rows, ""]), encoding="utf-8")
    tiny_bert(num_labels=2).save_pretrained(folder / "dense")
    tokenizer_for("bert").save_pretrained(folder / "dense")
    line = ["--model_name_or_path", "dense", "--train_file", "train.csv", "--validation_file", "dev.csv", "--do_train"]
    line += ["--do_eval", "--output_dir", "glue", "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["run_glue.py", *line, *words])
        runpy.run_path("run_glue.py", run_name="__main__")


def train_sentences(folder):
    """Trains a sentence encoder by its own trainer, and returns what it then says."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    static(head=ShrpBertModel).save_pretrained(folder / "encoder")
    tokenizer_for("bert").save_pretrained(folder / "encoder")
    encoder = SentenceTransformer(modules=[Transformer(str(folder / "encoder")), Pooling(32)], device="cpu")
    rows = Dataset.from_dict({"a": ["w7 w8", "w9"] * 8, "b": ["w8 w7", "w50"] * 8, "score": [1.0, 0.0] * 8})
    options = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = SentenceTransformerTrainingArguments(str(folder / "runs"), **options)
    trainer = SentenceTransformerTrainer(encoder, args, train_dataset=rows, loss=losses.CosineSimilarityLoss(encoder))
    trainer.train()
    trainer.save_model(str(folder / "sentences"))
    return encoder.encode(TEXTS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(what is said here, what is said by a process without shrp_hf), by folder."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import CrossEncoder

    folder = tmp_path_factory.mktemp("portable")
    model, inputs = static(num_labels=2), batch()
    run_glue(folder, "--num_expert_layers", "2", "--num_train_epochs", "3", "--save_strategy", "epoch")
    args = TrainingArguments(str(folder / "plain"), **STOCK)
    Trainer(model, args, train_dataset=DATA).save_model()
    ShrpTrainer(model, TrainingArguments(str(folder / "ours"), **STOCK), train_dataset=DATA).save_model()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(
        folder / "accelerate", save_function=accelerator.save, state_dict=accelerator.get_state_dict(prepared)
    )
    said = {name: ShrpBertForSequenceClassification.from_pretrained(folder / name) for name in CLASSIFIERS}
    with torch.no_grad():
        said = {name: saved(**inputs).logits.numpy() for name, saved in said.items()}
    said["came-with-code"] = said[CLASSIFIERS[-1]]
    said["sentences"] = said["sentences-again"] = train_sentences(folder)
    static(num_labels=1).save_pretrained(folder / "scorer")
    tokenizer_for("bert").save_pretrained(folder / "scorer")
    scorer = CrossEncoder(str(folder / "scorer"), device="cpu")
    scorer.save_pretrained(str(folder / "pairs"))
    said["pairs"] = scorer.predict([TEXTS])

    torch.save(inputs, folder / "inputs.pt")
    (folder / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    (folder / "classifiers.json").write_text(json.dumps(CLASSIFIERS), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", NOT_INSTALLED + OPENS]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder, said, json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*CLASSIFIERS, "came-with-code", "sentences", "sentences-again", "pairs"])
def test_it_opens_where_shrp_hf_is_not_installed(name, opened):
    _, said, found = opened
    np.testing.assert_allclose(np.array(found[name]), said[name], rtol=0, atol=1e-5)


def test_two_names_of_a_script_are_enough(opened):
    folder = opened[0] / "glue"
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    assert (state["epoch"], state["global_step"]) == (3.0, 15)  # 38 of 40 rows, in batches of 8
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["expert_layers"], config["pending_layers"]) == ([1, 2], [])
    pending = json.loads((folder / "checkpoint-5" / "config.json").read_text(encoding="utf-8"))
    assert (pending["expert_layers"], pending["pending_layers"]) == ([2], [1, 2])


# --- cards ---


def test_card_of_a_trainer_says_license_base_model_and_how_it_opens(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n", encoding="utf-8")
    trainer = trainer_for(tmp_path / "out", static(num_labels=2))
    trainer.model.config.name_or_path = str(base)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert 'pipeline("text-classification", model="PATH_OR_REPO", trust_remote_code=True)' in card.text
    assert card.text.index("## Load it") < card.text.index("## Model description")
    trainer.model.config.name_or_path = "org/bert"
    trainer.create_model_card(license="apache-2.0", tags=["mine"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/bert")
    assert card.text.count("## Load it") == 1
    assert "mine" in card.data.tags


def test_card_of_a_stock_model_is_that_of_trainer(tmp_path):
    model = tiny_bert(num_labels=2)
    for trainer, name in ((Trainer, "a"), (ShrpTrainer, "b")):
        args = TrainingArguments(tmp_path / name / "out", **STOCK)
        args.output_dir and Path(args.output_dir).mkdir(parents=True)
        trainer(model, args, train_dataset=DATA).create_model_card()
    assert (tmp_path / "a/out/README.md").read_text() == (tmp_path / "b/out/README.md").read_text()


# --- the Hub ---


@pytest.fixture
def uploads(monkeypatch):
    """Lists of the files that each upload of a folder would send."""
    sent = []

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, folder_path, **kwargs):
        sent.append({path.name for path in Path(folder_path).iterdir() if path.is_file()})
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return sent


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_what_a_trainer_pushes_has_its_code(strategy, uploads, tmp_path):
    options = {
        "push_to_hub": True,
        "hub_model_id": "org/x",
        "hub_strategy": strategy,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    trainer = trainer_for(tmp_path, num_expert_layers=1, max_steps=6, **options)
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub()
        assert 'model="org/x", trust_remote_code=True' in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert uploads
    for files in uploads:
        assert {"config.json", "model.safetensors", "modeling_shrp_bert.py", "saving.py"} <= files
