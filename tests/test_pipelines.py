"""`pipeline` takes a pruned model for what the masked one is: in this process, and where shrp_hf is not installed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import BertTokenizer, pipeline
from transformers.pipelines import SUPPORTED_TASKS

import shrp_hf
from shrp_hf import KeepPlan, masked_heads, prune_heads
from shrp_hf.numerics import rounding_bound
from tests.test_families import MIXED, stock
from tests.tiny import force_experts_, tiny_routed

TEXTS = ["w7 w8 w9", "w50 w60 w70 w9 w10"]
# Pipeline: the task head, what it is given, options.
TASKS = {
    "feature-extraction": ("", TEXTS, {}),
    "fill-mask": ("MaskedLM", ["w7 [MASK] w9"], {"top_k": 90}),
    "question-answering": ("QuestionAnswering", {"question": "w7 w8", "context": "w9 w10 w11 w12"}, {"top_k": 5}),
    "text-classification": ("SequenceClassification", TEXTS, {"top_k": None}),
    "token-classification": ("TokenClassification", TEXTS, {}),
    "zero-shot-classification": ("SequenceClassification", TEXTS, {"candidate_labels": ["w20", "w30"]}),
}
IMAGE_TASKS = {"image-classification": "ImageClassification", "image-feature-extraction": ""}
TEXT_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "deberta-v3", "modernbert")
CASES = [pytest.param(task, family, id=f"{task}-{family}") for task in TASKS for family in TEXT_FAMILIES] + [
    pytest.param(task, "vit", id=f"{task}-vit") for task in IMAGE_TASKS
]

NOT_INSTALLED = """
import sys

class NotInstalled:
    def find_spec(self, name, *args):
        if name.partition(".")[0] == "shrp_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())  # wherever the project lies
"""
WITHOUT_SHRP_HF = """
import json
from transformers import pipeline
found = {}
for folder, task, inputs, options in json.load(open("cases.json")):
    found[folder] = pipeline(task, model=folder, trust_remote_code=True, device="cpu")(inputs, **options)
assert "shrp_hf" not in sys.modules
json.dump(found, open("found.json", "w"), default=float)
"""


def tokenizer_for(family):
    """Words w5 to w98; the padding token is where the family expects it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if family in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        special[:2] = "[UNK]", "[PAD]"
    vocabulary = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(5, 99))])}
    return BertTokenizer(vocab=vocabulary, model_max_length=38)


def processor():
    # The one named after its backend needs no torchvision.
    cls = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    return cls(size={"height": 16, "width": 16})


def images():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def results(model, task, family, **options):
    """What the pipeline of this task says with this model."""
    if family == "vit":
        return pipeline(task, model=model, image_processor=processor(), device="cpu")(images())
    inputs, defaults = TASKS[task][1:]
    return pipeline(task, model=model, tokenizer=tokenizer_for(family), device="cpu")(inputs, **defaults, **options)


def flat(found):
    """Numbers and words of nested results, in order."""
    if isinstance(found, dict):
        return [leaf for key in sorted(found) for leaf in flat(found[key])]
    if isinstance(found, list | tuple):
        return [leaf for entry in found for leaf in flat(entry)]
    return [found]


def assert_same(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a == (b if isinstance(b, str) else pytest.approx(b, abs=rounding_bound(abs(b), torch.float32)))


def head_of(task):
    return IMAGE_TASKS[task] if task in IMAGE_TASKS else TASKS[task][0]


@pytest.mark.parametrize(("task", "family"), CASES)
def test_pruned_is_masked(task, family):
    if task not in SUPPORTED_TASKS:
        pytest.skip(f"this release of Transformers has no pipeline {task}")
    model = stock(family, head_of(task), dtype=torch.float32)
    whole = results(model, task, family)
    with masked_heads(model, MIXED):
        expected = results(model, task, family)
    found = results(prune_heads(model, MIXED), task, family)
    assert_same(found, expected)
    assert flat(found) != pytest.approx(flat(whole), abs=1e-3) if task == "feature-extraction" else flat(found) != flat(whole)


@pytest.mark.parametrize("task", [task for task in TASKS if task in SUPPORTED_TASKS])
def test_static_is_routed_to_the_experts_that_stayed(task):
    head = TASKS[task][0]
    model = tiny_routed(2, head=getattr(shrp_hf, f"ShrpBertFor{head}" if head else "ShrpBertModel"))
    for layer in (1, 2):
        force_experts_(model, layer, [3])
    static = prune_heads(model, KeepPlan(((0, 1, 2, 3), (3,), (3,)), 4))
    assert_same(results(static, task, "bert"), results(model, task, "bert"))


def test_a_process_without_shrp_hf_runs_them(tmp_path):
    """A task for each family, and SHRP; only Transformers and the code in the folder."""
    shipped = [("fill-mask", "roberta"), ("token-classification", "electra"), ("feature-extraction", "distilbert")]
    expected, cases = {}, []
    for task, family in [("text-classification", "shrp"), *shipped, ("image-classification", "vit")]:
        if family == "shrp":
            model = prune_heads(tiny_routed(2), KeepPlan(((1, 2), (2,), (0, 3)), 4))
        else:
            model = prune_heads(stock(family, head_of(task), dtype=torch.float32), MIXED)
        model.save_pretrained(tmp_path / family)
        (processor() if family == "vit" else tokenizer_for(family)).save_pretrained(tmp_path / family)
        expected[family] = results(model, task, family)
        inputs, options = ([], {}) if family == "vit" else TASKS[task][1:]
        cases.append((family, task, inputs, options))
    cases[-1][2].extend(f"{i}.png" for i, _ in enumerate(images()))
    for name, image in zip(cases[-1][2], images(), strict=True):
        image.save(tmp_path / name)
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", NOT_INSTALLED + WITHOUT_SHRP_HF]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found.keys() == expected.keys()
    for family in found:
        assert_same(found[family], expected[family])
