"""What a teacher said, read from files, is what it says; its computation is taken up, and is of these weights and rows."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForQuestionAnswering, BertTokenizer, DataCollatorWithPadding

from shrp_hf.pruning import to_shrp
from shrp_hf.training import teacher_outputs
from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.teacher_outputs import ROW_COLUMN, TeacherOutputs
from shrp_hf.training.trainer import ShrpTrainer
from tests.tiny import NO_DROPOUT, tiny_bert, tiny_routed

STATES = ("hidden_states", "logits")


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt"))


@pytest.fixture
def rows():
    ids = [[2, *range(5, 6 + i % 6), 3] for i in range(22)]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids], "label": [i % 3 for i in range(22)]}
    )


@pytest.fixture
def teacher():
    return tiny_bert(dtype=torch.float64, seed=5, **NO_DROPOUT)


def compute(teacher, rows, tokenizer, folder, **options):
    return TeacherOutputs.compute(teacher, rows, DataCollatorWithPadding(tokenizer), folder / "teacher", **options)


def trained(folder, tokenizer, teacher, rows, student=None, **options):
    student = tiny_bert(dtype=torch.float64, num_hidden_layers=2, **NO_DROPOUT) if student is None else student
    options = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "num_train_epochs": 1.0,
        "save_strategy": "no",
    } | options
    args = ShrpTrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, **options)
    trainer = ShrpTrainer(to_shrp(student), args, train_dataset=rows, processing_class=tokenizer, teacher=teacher)
    trainer.train()
    return trainer


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_stored_outputs_teach_what_the_teacher_teaches(sampling, tmp_path, tokenizer, rows, teacher):
    options = {"distillation_hidden_states": 3.0, "train_sampling_strategy": sampling, "task_weight": 0.5}
    stored = compute(teacher, rows, tokenizer, tmp_path, dtype=None)
    live, read = (trained(tmp_path, tokenizer, source, rows, **options).model.state_dict() for source in (teacher, stored))
    before = to_shrp(tiny_bert(dtype=torch.float64, num_hidden_layers=2, **NO_DROPOUT)).state_dict()
    for name, value in live.items():
        torch.testing.assert_close(read[name], value, rtol=0, atol=1e-10)
    assert not torch.equal(live["classifier.weight"], before["classifier.weight"])


def test_rows_may_be_padded_already(tmp_path, tokenizer, rows, teacher):
    longest = max(map(len, rows["input_ids"]))

    def pad(row):
        more = longest - len(row["input_ids"])
        return {"input_ids": row["input_ids"] + [0] * more, "attention_mask": row["attention_mask"] + [0] * more}

    short, padded = (compute(teacher, data, tokenizer, tmp_path, dtype=None) for data in (rows, rows.map(pad)))
    index = torch.tensor([3, 0])
    batch = DataCollatorWithPadding(tokenizer)([rows.map(pad)[i] for i in index.tolist()]) | {ROW_COLUMN: index}
    ours, theirs = (outputs(**batch, output_hidden_states=True) for outputs in (padded, short))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-10)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_routed_students_learn_from_stored_outputs_too(tmp_path, tokenizer, rows, teacher):
    stored = compute(teacher, rows, tokenizer, tmp_path, dtype=None)
    options = {"num_expert_layers": 1, "balance_epochs_per_layer": 1, "specialise_epochs": 1, "num_train_epochs": None}
    trainer = trained(tmp_path, tokenizer, stored, rows, tiny_routed(1, dtype=torch.float64, **NO_DROPOUT), **options)
    assert sum(trainer.count_usage(trainer._usage_dataset)[2]) == len(trainer._usage_dataset)


def test_half_precision_rounds_hidden_states_and_nothing_else(tmp_path, tokenizer, rows, teacher):
    exact, half = (compute(teacher, rows, tokenizer, tmp_path, dtype=dtype) for dtype in (None, torch.float16))
    batch = DataCollatorWithPadding(tokenizer)([rows[i] for i in (3, 0)]) | {ROW_COLUMN: torch.tensor([3, 0])}
    full, rounded = (outputs(**batch, output_hidden_states=True) for outputs in (exact, half))
    torch.testing.assert_close(rounded.logits, full.logits, rtol=0, atol=0)
    for a, b in zip(full.hidden_states, rounded.hidden_states, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=2**-10, atol=2**-24)


def test_interrupted_computation_is_taken_up(tmp_path, tokenizer, rows, teacher, monkeypatch):
    monkeypatch.setattr(teacher_outputs, "_BATCH_SIZE", 4)
    monkeypatch.setattr(teacher_outputs, "_BATCHES_PER_WRITE", 2)
    whole = compute(teacher, rows, tokenizer, tmp_path / "whole")
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) == 4:  # two batches are on the disk, the third is not
            raise KeyboardInterrupt

    handle = teacher.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        compute(teacher, rows, tokenizer, tmp_path)
    again = compute(teacher, rows, tokenizer, tmp_path)
    assert len(calls) == 4 + 4  # of six batches
    compute(teacher, rows, tokenizer, tmp_path)
    assert len(calls) == 4 + 4  # nothing is computed twice
    handle.remove()
    for name in ("logits.npy", "hidden.npy"):
        assert np.array_equal(np.load(again.folder / name), np.load(whole.folder / name))


def test_outputs_belong_to_weights_tokens_and_what_is_stored(tmp_path, tokenizer, rows, teacher):
    folders = {compute(teacher, rows, tokenizer, tmp_path, **options).folder for options in ({}, {"hidden_states": False})}
    folders.add(compute(teacher, rows.select(range(21)), tokenizer, tmp_path).folder)
    relabelled = rows.remove_columns("label").add_column("label", [0] * len(rows))
    assert compute(teacher, relabelled, tokenizer, tmp_path).folder in folders
    with torch.no_grad():
        teacher.classifier.bias[0] += 1
    folders.add(compute(teacher, rows, tokenizer, tmp_path).folder)
    assert len(folders) == 4


def test_what_stored_outputs_cannot_do_is_refused(tmp_path, tokenizer, rows, teacher):
    stored = compute(teacher, rows, tokenizer, tmp_path, hidden_states=False)
    with pytest.raises(ValueError, match="^`train_dataset` must hold the rows that the teacher's outputs were computed for"):
        trained(tmp_path, tokenizer, stored, rows.select(range(21)))
    with pytest.raises(ValueError, match=re.escape("`distillation_value_relations=1.0` needs the teacher itself")):
        trained(tmp_path, tokenizer, stored, rows, distillation_value_relations=1.0)
    with pytest.raises(ValueError, match="^The teacher's hidden states are not stored"):
        trained(tmp_path, tokenizer, stored, rows)
    stored = compute(teacher, rows, tokenizer, tmp_path)
    batch = DataCollatorWithPadding(tokenizer)([rows[0]]) | {ROW_COLUMN: torch.tensor([3])}
    with pytest.raises(ValueError, match="^The batch has other lengths"):
        stored(**batch, output_hidden_states=True)
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="^`collator` pads on the left"):
        compute(teacher, rows, tokenizer, tmp_path / "left")
    answering = tiny_bert(BertForQuestionAnswering)
    with pytest.raises(ValueError, match="^`teacher` BertForQuestionAnswering cannot be stored"):
        compute(answering, rows, tokenizer, tmp_path)
