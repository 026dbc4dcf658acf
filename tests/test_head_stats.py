"""What one pass measures equals short loops, leaves the model alone, resumes, and is the same on two processes."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    CamembertConfig,
    CamembertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    NomicBertConfig,
    NomicBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from shrp_hf.families import head_layout
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.scoring import (
    GRANULARITIES,
    StatsRequest,
    attention_entropy,
    collect_head_stats,
    resize_weights,
    weight_magnitude,
)

LAYERS, HEADS, LENGTH = 2, 4, 7
TINY = {"hidden_size": 16, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": 8}
TEXT = TINY | {"vocab_size": 40, "initializer_range": 0.3, "hidden_dropout_prob": 0.0, "num_labels": 3}
EVERYTHING = StatsRequest(importance=True, salience=True, entropy=True, signature_size=5)
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
SPECIAL = dict.fromkeys(("pad_token_id", "cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"), 0)
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)),
    "xlm-roberta": lambda: XLMRobertaForSequenceClassification(XLMRobertaConfig(**TEXT)),
    "camembert": lambda: CamembertForSequenceClassification(CamembertConfig(**TEXT)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**TEXT)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=16, n_heads=HEADS, n_layers=LAYERS, hidden_dim=8, num_labels=3)
    ),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**TEXT)),
    "deberta-v2": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**TEXT, **RELATIVE)),
    "modernbert": lambda: ModernBertForSequenceClassification(ModernBertConfig(**TEXT, **SPECIAL)),
    "nomic_bert": lambda: NomicBertForSequenceClassification(NomicBertConfig(**TEXT)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=3)),
}


def bert() -> BertForSequenceClassification:
    return MODELS["bert"]()


def text_batches(num_batches=4, batch_size=6, padding="right"):
    batches = []
    for _ in range(num_batches):
        lengths = torch.randint(2, LENGTH + 1, (batch_size, 1))
        mask = (torch.arange(LENGTH) < lengths).long()
        mask = {"right": mask, "left": mask.flip(1), "none": torch.ones_like(mask)}[padding]
        tokens = torch.randint(2, 40, (batch_size, LENGTH))
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(batch_size) % 3})
    return batches


def image_batches():
    return [{"pixel_values": torch.randn(6, 3, 8, 8), "labels": torch.arange(6) % 3} for _ in range(4)]


def batches_for(model):
    return image_batches() if model.main_input_name == "pixel_values" else text_batches()


def masked_loss(model, batch, mask):
    """The loss with head outputs times `mask`, shape (layers, length or 1, heads, 1)."""
    layout = head_layout(model)

    def hook(layer):
        return lambda _, inputs: ((inputs[0].unflatten(-1, (HEADS, -1)) * mask[layer]).flatten(-2),)

    handles = [layout.output(i).register_forward_pre_hook(hook(i)) for i in range(LAYERS)]
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    return loss


def samples_of(batch) -> Iterator[dict]:
    for i in range(len(batch["labels"])):
        yield {name: value[i : i + 1] for name, value in batch.items()}


def looped_importance(model, batches, granularity):
    """Mean of |dL/dm|, a sample or a batch at a time."""
    total, count = torch.zeros(LAYERS, HEADS, dtype=torch.float64), 0
    for batch in batches:
        for part in [batch] if granularity == "batch" else samples_of(batch):
            length = LENGTH if granularity == "token" else 1
            mask = torch.ones(LAYERS, length, HEADS, 1, dtype=torch.float64, requires_grad=True)
            gradient = torch.autograd.grad(masked_loss(model, part, mask), mask)[0]
            total += gradient.abs().sum(dim=(1, 3))
            count += int(part["attention_mask"].sum()) if granularity == "token" else 1
    return total / count


@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_scored(family):
    model = MODELS[family]()
    layout = head_layout(model)
    stats = collect_head_stats(model, batches_for(model), EVERYTHING)
    assert layout.kept == (tuple(range(HEADS)),) * LAYERS
    assert (layout.num_layers, layout.num_heads, layout.head_size) == (LAYERS, HEADS, 4)
    has_bias = family not in ("modernbert", "nomic_bert")
    assert layout.head_parameters(0) == 3 * 4 * (16 + has_bias) + 4 * 16
    for scores in (stats.importance(), stats.importance(first_quarter=True), stats.entropy()):
        assert scores.shape == (LAYERS, HEADS)
        assert (scores > 0).all()
    mean, variance = stats.class_moments()
    assert mean.shape == variance.shape == (3, LAYERS * HEADS, 25)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_importance_equals_a_loop(granularity, padding):
    model, batches = bert().double().eval(), text_batches(2, 4, padding)
    stats = collect_head_stats(model, batches, StatsRequest(importance=True))
    torch.testing.assert_close(
        stats.importance(granularity), looped_importance(model, batches, granularity), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_importance_of_a_token_task_equals_a_loop(granularity):
    model = BertForTokenClassification(BertConfig(**TEXT)).double().eval()
    batches = text_batches(2, 4, "left")
    for batch in batches:
        labels = torch.randint(0, 3, batch["input_ids"].shape).masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"] = labels.masked_fill(torch.rand(labels.shape) < 0.2, -100)
        batch["labels"][:, -1] = 1
    stats = collect_head_stats(model, batches, StatsRequest(importance=True))
    torch.testing.assert_close(stats.importance(granularity), looped_importance(model, batches, granularity))


def test_importance_of_multiple_choice_equals_a_loop():
    model = BertForMultipleChoice(BertConfig(**TEXT)).double().eval()
    tokens = torch.randint(2, 40, (4, 3, LENGTH))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(4) % 3}
    stats = collect_head_stats(model, [batch], StatsRequest(importance=True, entropy=True))
    torch.testing.assert_close(stats.importance(), looped_importance(model, [batch], "sample"))
    assert stats.sums["entropy_counts"].tolist() == [12]


class LinearLoss(BertPreTrainedModel):
    """One layer of attention and nothing else: the loss is linear in the head masks."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        layer = self.bert.encoder.layer[0]
        layer.attention.output.LayerNorm = layer.output.LayerNorm = nn.Identity()
        nn.init.zeros_(layer.output.dense.weight)
        self.weight = nn.Parameter(torch.randn(config.hidden_size))
        self.post_init()

    def forward(self, labels=None, **inputs):
        values = self.bert(**inputs).last_hidden_state[:, 0] @ self.weight
        return SimpleNamespace(loss=(values * labels).mean())


def test_importance_equals_leave_one_out_where_the_loss_is_linear():
    model = LinearLoss(BertConfig(**TEXT | {"num_hidden_layers": 1})).double().eval()
    batch = text_batches(1, 5)[0] | {"labels": torch.randn(5, dtype=torch.float64)}
    left_out = torch.zeros(5, HEADS, dtype=torch.float64)
    for i, sample in enumerate(samples_of(batch)):
        for head in range(HEADS):
            mask = torch.ones(LAYERS, 1, HEADS, 1, dtype=torch.float64)
            full = model(**sample).loss
            mask[0, 0, head] = 0
            with_hook = (
                head_layout(model)
                .output(0)
                .register_forward_pre_hook(
                    lambda _, inputs, mask=mask: ((inputs[0].unflatten(-1, (HEADS, -1)) * mask[0]).flatten(-2),)
                )
            )
            left_out[i, head] = full - model(**sample).loss
            with_hook.remove()
    stats = collect_head_stats(model, [batch], StatsRequest(importance=True))
    torch.testing.assert_close(stats.importance()[0], left_out.abs().mean(dim=0).detach())


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_entropy_is_one_for_uniform_and_zero_for_one_hot_attention(padding):
    mask = text_batches(1, 6, padding)[0]["attention_mask"].bool()
    uniform = (mask.float() / mask.sum(dim=1, keepdim=True))[:, None, None].expand(-1, HEADS, LENGTH, -1)
    first = nn.functional.one_hot(mask.int().argmax(dim=1), LENGTH).float()[:, None, None].expand_as(uniform)
    torch.testing.assert_close(attention_entropy(uniform, mask), torch.ones(6, HEADS))
    assert attention_entropy(first, mask).abs().max() == 0


def test_entropy_of_a_single_token_is_zero():
    attention = torch.zeros(1, HEADS, 3, 3)
    attention[..., 1] = 1
    assert attention_entropy(attention, torch.tensor([[False, True, False]])).tolist() == [[0.0] * HEADS]


def cropped_maps(model, batch):
    """Yields label and cropped attention maps (layers, heads, n, n) of every sample."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(**batch, output_attentions=True).attentions, dim=1)
    for label, attention, real in zip(batch["labels"], maps, batch["attention_mask"].bool(), strict=True):
        yield int(label), attention[:, :, real][..., real]


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_entropy_equals_a_loop(padding):
    model, batches = bert().double().eval(), text_batches(2, padding=padding)
    entropies = []
    for batch in batches:
        for _, attention in cropped_maps(model, batch):
            n = attention.shape[-1]
            entropy = -(attention * attention.log()).sum(dim=-1)
            entropies.append(entropy.sum(dim=-1) / (n * torch.tensor(n).log()))
    stats = collect_head_stats(model, batches, StatsRequest(entropy=True))
    torch.testing.assert_close(stats.entropy(), torch.stack(entropies).mean(dim=0))


@pytest.mark.parametrize("size", [3, 5, 16], ids="B={}".format)
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_signature_moments_equal_a_loop(padding, size):
    model, batches = bert().double().eval(), text_batches(3, padding=padding)
    signatures = {label: [] for label in range(3)}
    for batch in batches:
        for label, attention in cropped_maps(model, batch):
            resized = interpolate(attention, size=(size, size), mode="bilinear", align_corners=False)
            signatures[label].append(resized.flatten(2).flatten(0, 1))
    stats = collect_head_stats(model, batches, StatsRequest(signature_size=size))
    mean, variance = stats.class_moments()
    for label, values in signatures.items():
        torch.testing.assert_close(mean[label], torch.stack(values).mean(dim=0), rtol=0, atol=1e-6)
        torch.testing.assert_close(variance[label], torch.stack(values).var(dim=0), rtol=0, atol=1e-6)


def test_resizing_skips_padding_in_the_middle():
    mask = torch.tensor([[True, False, True, True, False]])
    attention = torch.rand(5, 5)
    real = attention[mask[0]][:, mask[0]]
    expected = interpolate(real[None, None], size=(4, 4), mode="bilinear", align_corners=False)[0, 0]
    matrix = resize_weights(mask, 4)[0]
    torch.testing.assert_close(matrix @ attention @ matrix.T, expected)


def test_salience_is_the_importance_of_the_first_quarter():
    model, batches = bert(), text_batches(5)
    salience = collect_head_stats(model, batches, StatsRequest(salience=True)).importance(first_quarter=True)
    importance = collect_head_stats(model, batches[:2], StatsRequest(importance=True)).importance()
    assert torch.equal(salience, importance)


def test_one_pass_equals_separate_passes():
    model, batches = bert(), text_batches()
    together = collect_head_stats(model, batches, EVERYTHING)
    entropy = collect_head_stats(model, batches, StatsRequest(entropy=True))
    signatures = collect_head_stats(model, batches, StatsRequest(signature_size=5))
    assert torch.equal(together.entropy(), entropy.entropy())
    assert torch.equal(together.class_moments()[1], signatures.class_moments()[1])


def test_memory_does_not_grow_with_the_samples():
    few, many = (collect_head_stats(bert(), text_batches(n), EVERYTHING) for n in (2, 6))
    assert {k: (v.shape, v.dtype) for k, v in few.sums.items()} == {k: (v.shape, v.dtype) for k, v in many.sums.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float64(dtype):
    model, batches = bert(), text_batches()
    full = collect_head_stats(model, batches, EVERYTHING)
    half = collect_head_stats(model.to(dtype), batches, EVERYTHING)
    assert half.sums["importance"].dtype == torch.float64
    torch.testing.assert_close(half.entropy(), full.entropy(), rtol=0, atol=0.05)
    torch.testing.assert_close(half.importance(), full.importance(), rtol=0.3, atol=0.05)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_the_model_is_left_as_it_was(implementation, fails):
    model = bert().train()
    model.set_attn_implementation(implementation)
    model.bert.pooler.eval()
    model.bert.embeddings.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    batches = text_batches()
    if fails:
        del batches[2]["labels"]
        with pytest.raises(ValueError, match="Batch 2 has no `labels`"):
            collect_head_stats(model, batches, EVERYTHING)
    else:
        collect_head_stats(model, batches, EVERYTHING)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    assert model.config._attn_implementation == implementation
    assert model.config.problem_type is None
    layers = model.bert.encoder.layer
    assert not any(layer.attention.output.dense._forward_pre_hooks for layer in layers)
    assert not any(layer.attention.self._forward_hooks for layer in layers)


def test_gradients_are_measured_under_no_grad_too():
    model, batches = bert(), text_batches()
    expected = collect_head_stats(model, batches, EVERYTHING).importance()
    with torch.no_grad():
        assert torch.equal(collect_head_stats(model, batches, EVERYTHING).importance(), expected)


def test_pruned_heads_have_no_score():
    config = ShrpBertConfig(**TEXT | {"num_hidden_layers": 3}, expert_layers=[2], routed=False)
    config.kept_heads = [[1, 3], [0], [0, 2]]
    model = ShrpBertForSequenceClassification(config)
    stats = collect_head_stats(model, text_batches(), EVERYTHING)
    assert stats.rows == ((0, 1), (0, 3), (1, 0))
    for scores in (stats.importance(), stats.entropy(), weight_magnitude(model)):
        assert (~scores.isnan()).nonzero().tolist() == [[0, 1], [0, 3], [1, 0]]


def test_scores_of_a_pruned_model_equal_those_with_the_others_masked():
    model = ShrpBertForSequenceClassification(ShrpBertConfig(**TEXT)).double().eval()
    batches = text_batches(2, 4)
    keep = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.float64)
    mask = keep[:, None, :, None].clone().requires_grad_()
    expected = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for batch in batches:
        for sample in samples_of(batch):
            expected += torch.autograd.grad(masked_loss(model, sample, mask), mask)[0].abs()[:, 0, :, 0] / 8
    model.prune_heads({0: [0, 2], 1: [1, 2, 3]})
    scores = collect_head_stats(model, batches, StatsRequest(importance=True)).importance()
    torch.testing.assert_close(scores[keep == 1], expected[keep == 1])


def test_importance_and_entropy_of_a_regression_are_measured():
    model = BertForSequenceClassification(BertConfig(**TEXT | {"num_labels": 1})).double().eval()
    batches = [batch | {"labels": torch.randn(6, dtype=torch.float64)} for batch in text_batches(2)]
    stats = collect_head_stats(model, batches, StatsRequest(importance=True, entropy=True))
    torch.testing.assert_close(stats.importance(), looped_importance(model, batches, "sample"))
