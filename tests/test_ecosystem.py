"""What others do with pruned models: LoRA merged and saved, embeddings by sentence-transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertModel

from shrp_hf import KeepPlan, ShrpBertModel, masked_heads, prune_heads, to_shrp
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
