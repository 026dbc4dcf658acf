"""The door for models: what would not compute as its files say is refused by name, by every command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, prune
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from typer.testing import CliRunner

from shrp_hf import ShrpBertForSequenceClassification, cli, prune_heads, to_shrp
from shrp_hf.checkpoints import open_model, open_tokenizer
from shrp_hf.export import load_for_export
from shrp_hf.tasks import Task, load_fine_tuned, load_to_fine_tune
from shrp_hf.workflows.prune import PruneOptions, prune_posthoc
from shrp_hf.workflows.run_directory import check_output
from shrp_hf.workflows.train import Workflow, WorkflowOptions
from tests.test_loading import logits_of, pruned_by_transformers_4, realigned
from tests.tiny import same_state, tiny_bert
from tests.tiny_training import trainer_for

WEIGHTS = "model.safetensors"
WORDS = ("good", "bad", "the", "film", "is", "very")
LABELS = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}


def rows(count):
    return Dataset.from_dict(
        {"text": [f"the film is {WORDS[1 - i % 2]} {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    )


TASK = Task("moods", rows(48), rows(20), rows(40), ("negative", "positive"), ("accuracy",), "the last rows")


def save_tokenizer(folder, **options):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt"), **options).save_pretrained(folder)


def saved(folder, model=None, **fields):
    """A directory with a classifier of moods and its tokenizer."""
    (tiny_bert(num_labels=2, **LABELS, **fields) if model is None else model).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def rewrite(folder, name=lambda key: key, **fields):
    """Renames the weights of a saved model (None drops one), and changes fields of its config."""
    state = load_file(folder / WEIGHTS)
    state = {new: tensor for key, tensor in state.items() if (new := name(key)) is not None}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return folder


def without_a_layer(key):
    return None if "layer.1." in key else key


def headless(key):
    return None if key.startswith("classifier.") else key


# --- encoder weights ---


@pytest.mark.parametrize(
    "build", [lambda: None, lambda: prune_heads(tiny_bert(num_labels=2), {1: [0, 2]})], ids=["stock", "shrp"]
)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefix_of_a_wrapper_is_read_past_and_said(prefix, build, tmp_path, caplog):
    folder = str(rewrite(saved(tmp_path, build()), lambda key: prefix + key))
    expected = tiny_bert(num_labels=2) if build() is None else build()
    for auto, whole in ((AutoModelForSequenceClassification, expected), (AutoModel, expected.bert)):
        model, untrained = open_model(folder, auto)
        assert same_state(model, whole)
        assert untrained == []
    assert f"All weights of `{folder}` begin with `{prefix}`, as a wrapper saved them: read without it." in caplog.text


def test_whole_model_is_opened_without_words(tmp_path, caplog):
    model, untrained = open_model(str(saved(tmp_path)), AutoModelForSequenceClassification)
    assert (untrained, caplog.text, model.training) == ([], "", False)
    assert same_state(model, tiny_bert(num_labels=2))


def adapted(model):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), model)


def masked(model):
    prune.l1_unstructured(model.bert.encoder.layer[0].attention.self.query, "weight", amount=0.5)


def parametrized(model):
    parametrizations.weight_norm(model.bert.encoder.layer[0].attention.self.query)


@pytest.mark.parametrize(
    ("alter", "hint"),
    [
        (adapted, "An adapter was saved in place: merge it"),
        (masked, "`torch.nn.utils.prune.remove(module, 'weight')` first"),
        (parametrized, "`remove_parametrizations`"),
    ],
)
def test_weights_of_a_wrapped_model_are_refused_with_what_to_do(alter, hint, tmp_path):
    model = tiny_bert(num_labels=2)
    alter(model)
    folder = saved(tmp_path, model)
    with pytest.raises(
        ValueError, match=r"weights are missing, the first is `bert.encoder.layer.0.attention.self.query"
    ) as error:
        load_fine_tuned(str(folder), TASK)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields", "found"),
    [
        pytest.param(
            without_a_layer, {}, "16 weights are missing, the first is `bert.encoder.layer.1.attention.out", id="part"
        ),
        pytest.param(
            lambda key: key.replace("bert.", "roberta."),
            {},
            "53 weights are missing, the first is `bert.embeddings.LayerNorm.bias`; the files hold 55 that have no place in "
            "it, the first is `roberta.embeddings.LayerNorm.bias`. They are those of another family (`roberta`): correct",
            id="another family",
        ),
        pytest.param(
            lambda key: "module." + key if "layer.0" in key else key,
            {},
            "the files hold 16 that have no place in it, the first is `module.bert.encoder.layer.0",
            id="half a prefix",
        ),
        pytest.param(
            lambda key: key, {"num_hidden_layers": 2}, "files: the files hold 16 that have no place in it", id="fewer layers"
        ),
        pytest.param(lambda key: key, {"num_hidden_layers": 4}, "16 weights are missing", id="more layers"),
        pytest.param(
            lambda key: key,
            {"vocab_size": 120},
            "`bert.embeddings.word_embeddings.weight` has shape (99, 32) instead of (120, 32)",
            id="another vocabulary",
        ),
    ],
)
def test_encoder_that_is_not_that_of_its_files_is_refused(name, fields, found, tmp_path):
    folder = str(rewrite(saved(tmp_path), name, **fields))
    for door in (
        lambda: load_fine_tuned(folder, TASK),
        lambda: load_to_fine_tune(folder, TASK),
        lambda: load_for_export(folder),
    ):
        with pytest.raises(ValueError, match=f"^The encoder of `{folder}`.*{re.escape(found)}"):
            door()


def commands(folder, data, output):
    """Every command that opens a model, with the words that make it open `folder` as one that is fine-tuned."""
    task = ("--dataset", str(data), "--output", str(output))
    return {
        "inspect": ("inspect", folder),
        "export": ("export", folder, "--output", str(output)),
        "benchmark": ("benchmark", folder),
        "prune": ("prune", folder, *task, "--keep", "0.5"),
        "compare": ("compare", folder, *task, "--selectors", "his", "--keep", "0.5"),
        "compress": ("compress", folder, *task, "--speedup", "2"),
        "train": ("train", folder, *task, "--dense-epochs", "0"),
    }


COMMANDS = tuple(commands("", "", ""))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "moods"
    folder.mkdir()
    for name, part in (("train.tsv", TASK.train), ("test.tsv", TASK.test)):
        lines = [f"{name[:2]}seen {row['text']}\t{row['label']}" for row in part]
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return folder


def refusal(words):
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_model_that_is_not_whole(command, data, tmp_path):
    folder = str(rewrite(saved(tmp_path / "model"), without_a_layer))
    output = tmp_path / "out"
    assert f"The encoder of `{folder}`" in refusal(commands(folder, data, output)[command])
    assert not output.exists() or not list(output.rglob("*"))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "inspect"])
def test_every_command_that_judges_or_prunes_refuses_an_untrained_head(command, data, tmp_path):
    folder = str(rewrite(saved(tmp_path / "model"), headless))
    message = refusal(commands(folder, data, tmp_path / "out")[command])
    assert re.match(rf"`{folder}` has no trained (task )?head \(classifier.bias is missing\)", message)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("inspect", "benchmark")])
def test_every_command_refuses_to_write_over_its_own_model(command, data, tmp_path):
    folder = saved(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = commands(str(folder), data, f"{folder}/../model/")[command]
    assert re.search(r"`output` .* would overwrite the model .* give another directory", refusal(words))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_benchmark_refuses_to_write_into_a_model(tmp_path):
    folder = saved(tmp_path)
    assert "would overwrite the model" in refusal(("benchmark", folder, "--output", folder))


@pytest.mark.parametrize(
    ("model", "writes", "is_refused"),
    [
        ("out", (), True),
        ("link", (), True),
        ("out/dense", ("dense", "static"), True),
        ("out/trials/2x1", ("trials",), True),
        ("out/dense", (), False),
        ("out/other", ("dense",), False),
        (".", ("dense",), False),
        ("org/model-of-the-hub", ("dense",), False),
        (None, ("dense",), False),
    ],
)
def test_output_that_holds_what_is_read(model, writes, is_refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out/dense", "out/other", "out/trials/2x1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    if not is_refused:
        check_output(tmp_path / "out", [model], writes)
        return
    with pytest.raises(ValueError, match="would overwrite the model"):
        check_output(tmp_path / "out", [model], writes)


def test_prune_does_not_write_over_its_teacher(tmp_path):
    model, teacher = saved(tmp_path / "model"), saved(tmp_path / "teacher")
    with pytest.raises(ValueError, match="would overwrite the model .*teacher"):
        prune_posthoc(str(model), TASK, teacher, PruneOptions(keep=0.5, teacher=str(teacher), recovery_epochs=1))


# --- heads and labels ---


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda folder: rewrite(saved(folder), headless), id="none"),
        pytest.param(lambda folder: saved(folder, tiny_bert(num_labels=5)), id="of another task"),
        pytest.param(lambda folder: saved(folder, tiny_bert(BertModel)), id="base model"),
    ],
)
def test_training_begins_with_a_new_head_and_says_so(build, tmp_path, caplog):
    folder = str(build(tmp_path / "model"))
    model = Workflow(folder, TASK, tmp_path / "out", WorkflowOptions(dense_epochs=1)).source
    assert f"`{folder}` has no head for 'moods' yet (classifier.bias, classifier.weight): it begins untrained." in caplog.text
    assert (model.config.num_labels, model.config.id2label) == (2, {0: "negative", 1: "positive"})
    assert model.classifier.weight.shape == (2, 32)


def test_pooler_that_no_file_holds_is_an_untrained_head_of_a_classifier_and_left_out_of_a_base_model(tmp_path):
    folder = saved(tmp_path / "model")
    rewrite(folder, lambda key: None if "pooler" in key else key)
    with pytest.raises(ValueError, match=r"has no trained task head \(bert.pooler.dense.bias is missing\)"):
        load_fine_tuned(str(folder), TASK)
    base = saved(tmp_path / "base", tiny_bert(BertModel))
    rewrite(base, lambda key: None if "pooler" in key else key)
    model, _ = load_for_export(str(base))
    assert model.pooler is None


def with_labels(folder, names, **fields):
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return saved(folder, tiny_bert(num_labels=len(names), **labels, **fields))


@pytest.mark.parametrize("names", [("POSITIVE", "NEGATIVE"), ("pos", "neg"), ("other", "negative"), ("Positive ", "none")])
def test_labels_in_another_order_are_refused_with_the_names(names, tmp_path):
    folder = str(with_labels(tmp_path, names))
    found = [name.casefold().strip() for name in names]
    message = f"`{folder}` numbers its labels {found}, but the task 'moods' numbers them ['negative', 'positive']"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_fine_tuned(folder, TASK)


@pytest.mark.parametrize("names", [("NEG", "POS"), ("LABEL_0", "LABEL_1"), ("Negative", "positive"), ("sad", "happy")])
def test_labels_in_the_same_order_under_other_names_are_taken(names, tmp_path):
    assert load_fine_tuned(str(with_labels(tmp_path, names)), TASK).config.id2label == dict(enumerate(names))


def test_labels_are_the_same_however_their_words_are_joined(tmp_path):
    task = replace(TASK, label_names=("not_entailment", "entailment"))
    with pytest.raises(ValueError, match="numbers its labels"):
        load_fine_tuned(str(with_labels(tmp_path, ("Entailment", "Not-Entailment"))), task)


def test_model_for_another_kind_of_task_is_refused(tmp_path):
    folder = str(saved(tmp_path, problem_type="multi_label_classification"))
    message = "was fine-tuned for 'multi_label_classification' (`problem_type`), but the task 'moods' is 'single_label"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_fine_tuned(folder, TASK)


# --- configs ---


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query", "alibi"])
def test_positions_that_transformers_ignores_are_refused_by_name(kind, tmp_path):
    folder = str(rewrite(saved(tmp_path), position_embedding_type=kind))
    message = f"^`position_embedding_type='{kind}'` is not supported: Transformers 5 computes with absolute positions"
    for door in (
        lambda: load_fine_tuned(folder, TASK),
        lambda: load_for_export(folder),
        lambda: open_model(folder),
        lambda: ShrpBertForSequenceClassification.from_pretrained(folder),
        lambda: to_shrp(BertForSequenceClassification.from_pretrained(folder)),
    ):
        with pytest.raises(ValueError, match=message):
            door()


def test_absolute_positions_may_be_named(tmp_path):
    load_fine_tuned(str(rewrite(saved(tmp_path), position_embedding_type="absolute")), TASK)


def test_model_with_code_of_its_own_is_refused(tmp_path):
    folder = str(rewrite(saved(tmp_path), auto_map={"AutoModel": "org/repo--modeling_mine.MyModel"}))
    with pytest.raises(
        ValueError, match=r"comes with code of its own \(org/repo--modeling_mine.MyModel\), which would not be"
    ):
        load_fine_tuned(folder, TASK)


def test_adapter_is_refused_with_the_way_to_merge_it(tmp_path):
    get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is an adapter \(PEFT\), no whole model: merge it, by `PeftModel.from_pretrained\(base"
    ):
        load_for_export(str(tmp_path))
    with pytest.raises(ValueError, match="is an adapter"):
        load_fine_tuned(str(tmp_path), TASK)


def test_quantised_model_is_refused(tmp_path):
    folder = str(rewrite(saved(tmp_path), quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))
    for door in (lambda: load_for_export(folder), lambda: load_fine_tuned(folder, TASK)):
        with pytest.raises(ValueError, match=r"is quantised \(`quantization_config`\): take the model that it was made from"):
            door()


def test_model_that_carries_our_code_is_opened(tmp_path):
    model = prune_heads(tiny_bert(num_labels=2, **LABELS), {0: [1]})
    model.save_pretrained(tmp_path, with_code=True)
    assert same_state(load_fine_tuned(str(tmp_path), TASK), model)


def test_model_that_transformers_4_pruned_is_opened(tmp_path, caplog):
    stock = pruned_by_transformers_4(tmp_path, {0: [1, 3], 2: [0]})
    model, untrained = open_model(str(tmp_path), AutoModelForSequenceClassification)
    assert model.config.kept_heads == [[0, 2], [0, 1, 2, 3], [1, 2, 3]]
    assert untrained == []
    torch.testing.assert_close(logits_of(realigned(model)), logits_of(stock), rtol=0, atol=1e-10)
    assert "was pruned by Transformers 4" in caplog.text


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_opened_in_float32_and_said(dtype, tmp_path, caplog):
    half = tiny_bert(num_labels=2, dtype=dtype, **LABELS)
    folder = str(saved(tmp_path, half))
    for load in (load_fine_tuned, load_to_fine_tune):
        caplog.clear()
        model = load(folder, TASK)
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        assert same_state(model, half.float())
        assert (
            f"`{folder}` is saved in {str(dtype)[6:]}: it is opened in float32, and so is what is made of it." in caplog.text
        )


def test_double_precision_stays(tmp_path):
    assert load_fine_tuned(str(saved(tmp_path, dtype=torch.float64)), TASK).dtype == torch.float64


def test_what_is_pruned_from_half_precision_is_written_in_float32(tmp_path):
    folder = saved(tmp_path / "model", dtype=torch.bfloat16)
    prune_posthoc(str(folder), TASK, tmp_path / "out", PruneOptions(selector="magnitude", keep=0.5))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_training_in_half_precision_is_said(dtype, tmp_path, caplog):
    trainer_for(tmp_path, tiny_bert(num_labels=2, dtype=dtype))
    assert ("The weights are float16, as their file was" in caplog.text) is (dtype == torch.float16)


# --- tokenizers ---


def test_teacher_of_another_vocabulary_is_refused(tmp_path):
    model, teacher = saved(tmp_path / "model"), saved(tmp_path / "teacher")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *reversed(WORDS)]
    (teacher / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(vocab=str(teacher / "vocab.txt")).save_pretrained(teacher)
    with pytest.raises(ValueError, match=r"^`teacher` .* has another vocabulary than .*: it would teach by the tokens"):
        prune_posthoc(str(model), TASK, tmp_path / "out", PruneOptions(keep=0.5, teacher=str(teacher), recovery_epochs=1))


def test_missing_tokenizer_is_refused(tmp_path):
    model = tiny_bert(num_labels=2, **LABELS)
    model.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 5  # which Transformers makes up
    with pytest.raises(ValueError, match=f"^`{tmp_path}` holds no tokenizer: Transformers makes one up, which knows no words"):
        open_tokenizer(str(tmp_path), model)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_for_export(str(tmp_path))


def test_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path):
    model = tiny_bert(vocab_size=10)
    with pytest.raises(
        ValueError, match=r"has 11 tokens, but the model embeds 10: it is that of another model, or tokens were"
    ):
        open_tokenizer(str(saved(tmp_path, model)), model)


def test_tokenizer_without_padding_is_refused(tmp_path):
    model = tiny_bert()
    saved(tmp_path, model)
    save_tokenizer(tmp_path, pad_token=None)
    with pytest.raises(ValueError, match="has no `pad_token`"):
        open_tokenizer(str(tmp_path), model)


def test_tokenizer_pads_on_the_right_whatever_it_was_saved_with(tmp_path, caplog):
    model = tiny_bert()
    saved(tmp_path, model)
    save_tokenizer(tmp_path, padding_side="left")
    assert open_tokenizer(str(tmp_path), model).padding_side == "right"
    assert "pads on the left" in caplog.text


def test_tokenizer_knows_the_positions_of_its_model(tmp_path):
    model = tiny_bert()
    assert open_tokenizer(str(saved(tmp_path, model)), model).model_max_length == 40
    save_tokenizer(tmp_path, model_max_length=30)
    assert open_tokenizer(str(tmp_path), model).model_max_length == 30


@pytest.mark.parametrize("padding", [1, 0])
def test_positions_that_are_counted_from_the_padding_need_the_same_padding(padding, tmp_path):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 30}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=padding))
    saved(tmp_path, model)
    if padding:
        with pytest.raises(ValueError, match="pads with token 0, but the model counts positions by its own `pad_token_id=1`"):
            open_tokenizer(str(tmp_path), model)
    else:
        assert open_tokenizer(str(tmp_path), model).model_max_length == 19
