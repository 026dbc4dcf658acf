"""What others do with pruned models: LoRA merged and saved, embeddings by sentence-transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertModel

from shrp_hf import KeepPlan, ShrpBertModel, masked_heads, prune_heads, to_shrp
from shrp_hf.structures import keep_layers
from tests.test_pipelines import NOT_INSTALLED, TEXTS, tokenizer_for
from tests.tiny import assert_near, batch, force_experts_, tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)
HEADS = KeepPlan(((0, 3), (), (1,)), 4)
MODELS = {
    "dense": lambda: to_shrp(tiny_bert()),
    "head-pruned": lambda: prune_heads(tiny_bert(), HEADS),
    "routed": lambda: tiny_routed(2),
    "static": lambda: prune_heads(tiny_routed(2), KeepPlan((ALL, (2,), (0, 3)), 4)),
}
ENCODES = """
import json
from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer("pruned", device="cpu", trust_remote_code=True)
assert "shrp_hf" not in sys.modules
json.dump(encoder.encode(json.load(open("texts.json"))).tolist(), open("found.json", "w"))
"""


@pytest.mark.parametrize("kind", MODELS)
def test_lora_with_default_targets_is_merged_saved_and_loaded_equal(kind, tmp_path):
    model = MODELS[kind]()
    with torch.no_grad():
        before = model(**batch()).logits
        adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2)).eval()
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
        expected = adapted(**batch()).logits
        assert (expected - before).abs().max() > 1e-3
        merged = adapted.merge_and_unload()
        assert_near(merged(**batch()).logits, expected)
        merged.save_pretrained(tmp_path)
        assert "AutoModel" in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert_near(loaded(**batch()).logits, expected)


def sentence_encoder(model, folder):
    """A SentenceTransformer of this encoder that takes the mean of its hidden states, from a saved directory."""
    from sentence_transformers import SentenceTransformer, models

    model.save_pretrained(folder / "encoder")
    tokenizer_for("bert").save_pretrained(folder / "encoder")
    words = models.Transformer(str(folder / "encoder"))
    return SentenceTransformer(modules=[words, models.Pooling(32)], device="cpu")


def embedder(kind):
    """A reference with `masked_heads` or a forced router, and the pruned model."""
    if kind == "head-pruned":
        stock = tiny_bert(BertModel)
        return stock, HEADS, prune_heads(stock, HEADS)
    routed = tiny_routed(2, head=ShrpBertModel)
    for layer in (1, 2):
        force_experts_(routed, layer, [3])
    return routed, None, prune_heads(routed, KeepPlan((ALL, (3,), (3,)), 4))


@pytest.mark.parametrize("kind", ["head-pruned", "static"])
def test_embeddings_of_a_pruned_encoder_are_those_of_the_whole_one(kind, tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    whole, plan, pruned = embedder(kind)
    reference = sentence_encoder(whole, tmp_path / "whole")
    if plan is None:
        expected = reference.encode(TEXTS)
    else:
        unpruned = reference.encode(TEXTS)
        with masked_heads(reference[0].auto_model, plan):
            expected = reference.encode(TEXTS)
        assert np.abs(expected - unpruned).max() > 1e-3
    encoder = sentence_encoder(pruned, tmp_path)
    assert_near(encoder.encode(TEXTS), expected)

    encoder.save(str(tmp_path / "pruned"))
    reloaded = SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
    assert type(reloaded[0].auto_model) is ShrpBertModel
    assert_near(reloaded.encode(TEXTS), expected)
    if kind == "head-pruned":
        return  # one process is enough: the code in the folder is the same
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", NOT_INSTALLED + ENCODES]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = np.array(json.loads((tmp_path / "found.json").read_text(encoding="utf-8")))
    assert_near(found, expected)


STRUCTURES = {
    "heads": lambda stock: prune_heads(stock, HEADS),
    "thin": lambda stock: prune_heads(stock, KeepPlan(((0,), (1, 2), (3,)), 4, (tuple(range(8)),) * 3, 64)),
    "experts": lambda stock: prune_heads(tiny_routed(2, head=ShrpBertModel), KeepPlan((ALL, (2,), (0, 3)), 4)),
    "layers": lambda stock: keep_layers(stock, [0, 2]),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sentence_transformer_trainer_trains_every_structure(structure, tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    encoder = sentence_encoder(STRUCTURES[structure](tiny_bert(BertModel)), tmp_path)
    before = encoder.encode(TEXTS)
    pairs = Dataset.from_dict(
        {"anchor": [f"w{i} w{i + 1}" for i in range(5, 21)], "positive": [f"w{i} w9" for i in range(5, 21)]}
    )
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "checkpoints"), max_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
    )
    loss = losses.MultipleNegativesRankingLoss(encoder)
    SentenceTransformerTrainer(model=encoder, args=args, train_dataset=pairs, loss=loss).train()
    after = encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-3
    encoder.save(str(tmp_path / "trained"))
    assert_near(SentenceTransformer(str(tmp_path / "trained"), device="cpu").encode(TEXTS), after)
