"""No length is longer than a model can read, and whoever asked for more is told once."""

import logging

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoConfig, BertTokenizer, RobertaConfig, RobertaForSequenceClassification, ViTConfig, ViTModel

from shrp_hf.measuring import count_flops, random_inputs
from shrp_hf.models.lengths import fitting_length, num_positions
from shrp_hf.pruning import to_shrp
from shrp_hf.tasks import Task
from shrp_hf.workflows.benchmark import ServingOptions, measure_serving
from shrp_hf.workflows.compress.options import CompressOptions
from shrp_hf.workflows.compress.run import Compression
from shrp_hf.workflows.compress.search import Targets
from shrp_hf.workflows.train import Workflow, WorkflowOptions
from tests.tiny import SIZES, tiny_bert

POSITIONS = SIZES["max_position_embeddings"]


def tiny_roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=1)).eval()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        pytest.param(tiny_bert, POSITIONS, id="bert"),
        pytest.param(tiny_roberta, POSITIONS - 2, id="roberta"),
        pytest.param(lambda: to_shrp(tiny_roberta()), POSITIONS - 2, id="shrp roberta"),
    ],
)
def test_as_many_tokens_as_the_positions_say_run_and_no_more(build, expected):
    model = build()
    assert num_positions(model) == num_positions(model.config) == expected
    with torch.inference_mode():
        model(**random_inputs(model, 1, expected))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, expected + 1), 5))
    with pytest.raises(ValueError, match=f"^`length` must be at most {expected}, the positions that the model has, got 41"):
        count_flops(model, 1, POSITIONS + 1)


def test_images_have_no_length():
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    assert num_positions(model) is None
    assert fitting_length(9999, [model]) == 9999


class Tokenizer:
    model_max_length = 30


@pytest.mark.parametrize(
    ("length", "tokenizer", "fits", "said"),
    [
        (POSITIONS, None, POSITIONS, []),
        (99, None, 38, ["`max_length` 99 is more than the 38 positions of RobertaForSequenceClassification: 38 is taken."]),
        (99, Tokenizer(), 30, ["`max_length` 99 is more than the 30 tokens that the tokenizer allows: 30 is taken."]),
        (30, Tokenizer(), 30, []),
    ],
)
def test_longer_is_clamped_and_said_in_one_line(length, tokenizer, fits, said, caplog):
    models = [tiny_bert()] if length == POSITIONS else [tiny_bert(), tiny_roberta()]
    assert fitting_length(length, models, tokenizer) == fits
    assert caplog.messages == said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, of whose positions its tokenizer does not know."""
    folder = tmp_path_factory.mktemp("saved")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    tiny_bert(num_labels=2).save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture(scope="module")
def data():
    """Two classes, every text of 60 words."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    texts = [" ".join("abcdefgh"[(i + j) % 8] for j in range(60)) for i in range(8)]
    rows = Dataset.from_dict({"text": texts, "label": [0, 1] * 4}, features=features)
    return Task("long", rows, rows, rows, ("no", "yes"), ("accuracy",), "a list")


def test_every_command_reads_no_more_than_the_model_has_positions(saved, data, tmp_path, caplog):
    folder, tokenizer = saved
    whose = f"{POSITIONS} positions of ShrpBertForSequenceClassification"
    line = f"`max_length` 512 is more than the {whose}: {POSITIONS} is taken."
    workflow = Workflow(str(folder), data, tmp_path / "train", WorkflowOptions(max_length=512))
    assert max(map(len, workflow.data["train"]["input_ids"])) == POSITIONS
    assert [message for message in caplog.messages if "is more than" in message] == [line]
    caplog.clear()
    options = CompressOptions(targets=Targets(speedup=1.5), max_length=512, shape=(2, 512))
    compression = Compression(str(folder), data, tmp_path / "compress", options)
    assert max(map(len, compression.data["train"]["input_ids"])) == POSITIONS
    assert compression.options.shape == (2, POSITIONS)
    said = [message for message in caplog.messages if "is more than" in message]
    assert [message.split()[0] for message in said] == ["`shape`", "`max_length`"]
    caplog.clear()
    rows = data.tokenize(tokenizer, max_length=512, model=AutoConfig.from_pretrained(folder))
    assert max(map(len, rows["test"]["input_ids"])) == POSITIONS


def test_shapes_of_a_benchmark_are_those_that_every_model_reads(caplog):
    models = {"bert": (tiny_bert(), None), "roberta": (tiny_roberta(), None)}
    caplog.set_level(logging.WARNING)
    result = measure_serving(models, ServingOptions(shapes=((1, 4), (1, 512)), num_rounds=1))
    assert [row.workload for row in result.rows] == ["1 x 4"] * 2 + ["1 x 38"] * 2
    assert caplog.messages == ["`shapes` 512 is more than the 38 positions of RobertaForSequenceClassification: 38 is taken."]
