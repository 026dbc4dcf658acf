"""What cannot be scored is refused with a message that names it and the way out."""

import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from shrp_hf.families import FAMILIES, head_layout
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.scoring import StatsRequest, collect_head_stats, weight_magnitude
from tests.foreign import FOREIGN, foreign_model, refusal

LENGTH = 7
TEXT = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "vocab_size": 40,
    "initializer_range": 0.3,
    "num_labels": 3,
}
TINY = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "num_labels")}
EVERYTHING = StatsRequest(importance=True, salience=True, entropy=True, signature_size=5)


def bert():
    return BertForSequenceClassification(BertConfig(**TEXT))


def text_batches(num_batches=4):
    batches = []
    for _ in range(num_batches):
        mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (6, 1))).long()
        tokens = torch.randint(2, 40, (6, LENGTH))
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(6) % 3})
    return batches


@pytest.mark.parametrize("family", FOREIGN)
def test_other_families_are_refused_by_name(family):
    with pytest.raises(ValueError, match=exact(refusal(family))):
        head_layout(foreign_model(family))


def test_every_stock_family_has_a_shrp_row_with_the_same_paths():
    for name, layer_map in FAMILIES.items():
        if name not in ("xlm-roberta", "camembert") and not name.startswith("shrp_"):
            assert FAMILIES[f"shrp_{name.replace('-', '_')}"] is layer_map


def exact(message):
    return f"^{re.escape(message)}$"


def test_wrapped_decoder_and_hand_cut_models_are_refused():
    model = bert()
    wrapper = nn.Module()
    wrapper.config = model.config
    message = (
        "`model` must be a Transformers model, got Module around one. Unwrap it first (PEFT: "
        "`model.merge_and_unload()`; DistributedDataParallel: `model.module`)."
    )
    with pytest.raises(ValueError, match=exact(message)):
        head_layout(wrapper)
    message = "`is_decoder=True` is not supported: only encoders are. Load the model with False."
    with pytest.raises(ValueError, match=exact(message)):
        head_layout(BertModel(BertConfig(**TINY, is_decoder=True)))
    attention = model.bert.encoder.layer[1].attention
    attention.self.query = nn.Linear(16, 12)
    message = (
        "Layer 1 has projections of width [12, 16, 16, 16] (query, key, value, output), but its 4 heads of size 4 need "
        "16: heads were cut without a record of which. Cut them with `shrp_hf.prune_heads`, which keeps that record in "
        "the config."
    )
    with pytest.raises(ValueError, match=exact(message)):
        head_layout(model)


def test_routed_models_are_refused():
    model = ShrpBertForSequenceClassification(ShrpBertConfig(**TEXT, expert_layers=[1]))
    message = (
        "Layers [1] are routed: which expert runs depends on the input, so their heads have no post-hoc score. Choose "
        "experts by usage (`UsageSelector`, `trainer.usage_plan()`), prune first."
    )
    with pytest.raises(ValueError, match=exact(message)):
        collect_head_stats(model, text_batches(), StatsRequest(entropy=True))
    with pytest.raises(ValueError, match=exact(message)):
        weight_magnitude(model)


def test_static_expert_layers_only_are_refused():
    config = ShrpBertConfig(**TEXT, expert_layers=[0, 1], routed=False, kept_heads=[[0], [1]])
    message = "`model` has expert layers only, which have no post-hoc score: nothing is left to choose."
    with pytest.raises(ValueError, match=exact(message)):
        weight_magnitude(ShrpBertForSequenceClassification(config))


def changed(index=1, **values):
    """Four batches of which one differs; None removes a key."""
    batches = text_batches()
    batches[index] = {k: v for k, v in (batches[index] | values).items() if v is not None}
    return batches


def without_real_token():
    batches = text_batches()
    batches[1]["attention_mask"][2] = 0
    return batches


SIGNATURES, IMPORTANCE = StatsRequest(signature_size=5), StatsRequest(importance=True)
BAD_BATCHES = {
    "none": (lambda: [], EVERYTHING, "`batches` is empty (or all its labels are -100): give at least one batch."),
    "empty": (
        lambda: changed(input_ids=torch.zeros(0, LENGTH, dtype=torch.long)),
        IMPORTANCE,
        "Batch 1 is empty: it must hold `input_ids` of at least one sample.",
    ),
    "tuple": (
        lambda: [(torch.ones(2, 3),)],
        IMPORTANCE,
        "Batch 0 is a tuple, but must be a mapping of model inputs.",
    ),
    "no labels": (
        lambda: changed(labels=None),
        IMPORTANCE,
        "Batch 1 gives no loss: importance needs `labels`, and a model with a task head.",
    ),
    "no classes": (
        lambda: changed(labels=None),
        SIGNATURES,
        "Batch 1 has no `labels`: signatures are summed per class.",
    ),
    "class out of range": (
        lambda: changed(labels=torch.tensor([0, 1, 2, 0, 1, 3])),
        SIGNATURES,
        "`labels` of batch 1 must be classes 0 to 2, got [0, 1, 2, 3].",
    ),
    "token labels": (
        lambda: changed(labels=torch.zeros(6, LENGTH, dtype=torch.long)),
        SIGNATURES,
        "`labels` of batch 1 have shape (6, 7) and type torch.int64, but signatures need one class per sample: take "
        "another selector (HIES, HIS) for token, multiple-choice and regression tasks.",
    ),
    "float labels": (
        lambda: changed(labels=torch.zeros(6)),
        SIGNATURES,
        "`labels` of batch 1 have shape (6,) and type torch.float32, but signatures need one class per sample: take "
        "another selector (HIES, HIS) for token, multiple-choice and regression tasks.",
    ),
    "mask shape": (
        lambda: changed(attention_mask=torch.ones(6, LENGTH, LENGTH)),
        IMPORTANCE,
        "`attention_mask` of batch 1 has shape (6, 7, 7), but the tokens have (6, 7): give one value per token.",
    ),
    "all padding": (
        without_real_token,
        IMPORTANCE,
        "Batch 1 holds a sample without any real token: leave it out.",
    ),
    "no length": (
        lambda: iter(text_batches()),
        StatsRequest(salience=True),
        "`batches` (list_iterator) has no length, but the salience of CAHP is measured on its first quarter: give a list "
        "or a DataLoader.",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_refused(case):
    build, request, message = BAD_BATCHES[case]
    with pytest.raises(ValueError, match=exact(message)):
        collect_head_stats(bert(), build(), request)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [1] * 6,
            "The calibration data holds samples of class [1] only, but classes are compared with each other: give batches "
            "with at least two classes.",
        ),
        (
            [1, 1, 1, 1, 1, 2],
            "The calibration data holds one sample of class [2], but a variance needs two: give more batches.",
        ),
    ],
    ids=["one class", "one sample"],
)
def test_too_few_classes_are_refused(labels, message):
    batches = changed(0, labels=torch.tensor(labels))[:1]
    with pytest.raises(ValueError, match=exact(message)):
        collect_head_stats(bert(), batches, SIGNATURES).class_moments()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"num_labels": 1}, "problem_type=None and num_labels=1"),
        ({"problem_type": "regression"}, "problem_type='regression' and num_labels=3"),
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification' and num_labels=3"),
    ],
    ids=["one label", "regression", "multi-label"],
)
def test_signatures_of_a_task_without_classes_are_refused(options, shown):
    model = BertForSequenceClassification(BertConfig(**TEXT | options))
    message = f"Signatures compare classes, but `model` has {shown}: take another selector (HIES, HIS) for this task."
    with pytest.raises(ValueError, match=exact(message)):
        collect_head_stats(model, text_batches(), SIGNATURES)


def test_nan_names_batch_and_layer():
    advice = "Check that batch, or score in float32 if the model is in half precision."
    model = bert()
    model.classifier.bias.data.fill_(torch.nan)
    weight = "the weight `classifier.bias` is not finite itself, so load a checkpoint from before that"
    with pytest.raises(ValueError, match=exact(f"The loss of batch 0 is nan: {weight}. {advice}")):
        collect_head_stats(model, text_batches(), IMPORTANCE)
    model = bert()
    calls = []
    model.bert.encoder.layer[1].output.dense.register_forward_hook(
        lambda module, args, output: output / (calls.append(0) or len(calls) < 3)
    )
    layer = "the first output that is not finite is that of `bert.encoder.layer.1.output.dense`"
    with pytest.raises(ValueError, match=exact(f"The loss of batch 2 is nan: {layer}. {advice}")):
        collect_head_stats(model, text_batches(), IMPORTANCE)
    model = bert()
    model.bert.encoder.layer[1].attention.self.query.weight.data.fill_(torch.nan)
    message = (
        "The attention of layer 1 in batch 0 holds NaN or infinity: check the weights and that batch, or score in float32 "
        "if the model is in half precision."
    )
    for request in (StatsRequest(entropy=True), SIGNATURES):
        with pytest.raises(ValueError, match=exact(message)):
            collect_head_stats(model, text_batches(), request)


def test_a_gradient_that_is_not_finite_names_batch_and_layer():
    model = bert()
    # Finite forward, infinite backward: the derivative of a square root at 0.
    model.bert.encoder.layer[1].attention.output.register_forward_hook(lambda *args: args[-1] + (args[-1] * 0).abs().sqrt())
    message = (
        "The gradient of layer 0 in batch 0 holds NaN or infinity: check the weights and that batch, or score in float32 "
        "if the model is in half precision."
    )
    with pytest.raises(ValueError, match=exact(message)):
        collect_head_stats(model, text_batches(), IMPORTANCE)


def test_empty_attention_maps_are_refused():
    model = bert()
    attention = model.bert.encoder.layer[1].attention.self
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0], None)
    message = (
        "Layers [1] gave no attention maps for batch 0, though attention is eager: their class does not follow it. Load "
        "the model with attn_implementation='eager'."
    )
    with pytest.raises(ValueError, match=exact(message)):
        collect_head_stats(model, text_batches(), StatsRequest(entropy=True))


def test_requests_are_joined_and_checked():
    joined = IMPORTANCE | SIGNATURES
    assert joined == StatsRequest(importance=True, signature_size=5)
    assert joined.covers(IMPORTANCE)
    assert not joined.covers(StatsRequest(entropy=True))
    assert not joined.covers(StatsRequest(signature_size=6))
    message = "One pass makes signatures of one `signature_size`, got [5, 6]: score twice."
    with pytest.raises(ValueError, match=exact(message)):
        _ = joined | StatsRequest(signature_size=6)
    with pytest.raises(ValueError, match=exact("`signature_size` must be a whole number from 2, got 1.")):
        StatsRequest(signature_size=1)
    stats = collect_head_stats(bert(), text_batches(), IMPORTANCE)
    message = "`entropy` was not measured in this pass: ask for it in the `StatsRequest`."
    with pytest.raises(ValueError, match=exact(message)):
        stats.entropy()
    message = "`granularity` must be one of sample, token, batch, got 'word'."
    with pytest.raises(ValueError, match=exact(message)):
        stats.importance("word")
