"""The expert layer against its formula: router, gate, experts, expander, warm start, balance loss."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.expert_attention import ExpertLinear
from shrp_hf.models.expert_layer import ExpertLayer, Router, load_balancing_loss
from tests.tiny import NO_DROPOUT, SIZES, assert_near, randomize_

HIDDEN, HEADS, SIZE = SIZES["hidden_size"], SIZES["num_attention_heads"], 8


def expert_layer(attention: str = "eager", **fields) -> ExpertLayer:
    fields = NO_DROPOUT | {"expert_layers": [1]} | fields
    config = ShrpBertConfig(**SIZES, **fields)
    config._attn_implementation = attention
    dense = BertLayer(BertConfig(**SIZES, **NO_DROPOUT))
    randomize_(dense)
    layer = ExpertLayer(config, 1, dense).double()
    layer.expander.warm_start_(dense.attention.output.dense.weight.detach())
    randomize_(layer)
    return layer.train()


def run(layer: ExpertLayer, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states and router logits of a layer that is given hidden states, attention mask and token mask."""
    names = ("hidden_states", "attention_mask", "token_mask")
    return layer.forward(**dict(zip(names, args, strict=False)))[:2]


def without_dropout(layer: ExpertLayer, x: torch.Tensor) -> torch.Tensor:
    out = run(layer.eval(), x)[0]
    layer.train()
    return out


def hidden_states(size: int = 4, length: int = 6) -> torch.Tensor:
    return torch.randn(size, length, HIDDEN, dtype=torch.float64)


def token_mask(size: int = 4, length: int = 6) -> torch.Tensor:
    mask = torch.ones(size, length, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, :3] = 0
    return mask


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, -math.inf)[:, None, None, :]


def reference(layer: ExpertLayer, x: torch.Tensor, mask: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """papers.md, section 1, sample by sample: out = x + LN(GELU(W mean(h) + b))."""
    attention, expander = layer.attention.self, layer.expander
    rows = []
    for sample, keep, chosen in zip(x, mask.bool(), experts, strict=True):
        heads = []
        for e in chosen.tolist():
            own = slice(e * SIZE, (e + 1) * SIZE)
            q, k, v = (sample @ p.weight[own].T + p.bias[own] for p in (attention.query, attention.key, attention.value))
            scores = (q @ k.T / math.sqrt(SIZE)).masked_fill(~keep, -math.inf)
            heads.append(scores.softmax(dim=-1) @ v)
        rows.append(sample + expander(torch.stack(heads).mean(dim=0)))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("top", [1, 3])
def test_layer_is_its_formula(attention, top):
    layer, x, mask = expert_layer(attention=attention, experts_per_sequence=top), hidden_states(), token_mask()
    out, logits = run(layer, x, additive(mask), mask)
    experts = logits.topk(top).indices
    assert len({tuple(row) for row in experts.tolist()}) > 1  # the samples do not all choose alike
    torch.testing.assert_close(out, reference(layer, x, mask, experts), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kept", [[2], [0, 3]], ids=str)
def test_static_layer_is_the_mean_of_its_experts(kept):
    layer, x, mask = expert_layer(), hidden_states(), token_mask()
    expected = reference(layer, x, mask, torch.tensor([kept]).expand(len(x), -1))
    layer.keep_experts_(kept)
    out, logits = run(layer, x, additive(mask), mask)
    assert logits is None
    assert layer.router is None
    assert layer.attention.self.query.weight.shape == (len(kept) * SIZE, HIDDEN)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("top", [1, 2])
def test_gate_is_one_and_carries_the_gradient_of_the_router(top):
    """The gate's gradient by hand: d loss / d logits = sum over chosen e of (onehot_e - p) * <d loss / d y, gated part>."""
    layer, x, mask = expert_layer(experts_per_sequence=top), hidden_states(), token_mask()
    out, logits = run(layer, x, additive(mask), mask)
    logits.retain_grad()
    weights = torch.randn_like(out)
    (out * weights).sum().backward()

    p, experts = logits.detach().softmax(dim=-1), logits.topk(top).indices
    gates = torch.ones(len(x), top, dtype=x.dtype, requires_grad=True)
    heads, _ = layer.attention.self(x, additive(mask), experts=experts)
    if top == 1:
        update = gates[:, :, None] * layer.expander(heads.squeeze(2))
    else:
        update = layer.expander((gates[:, None, :, None] * heads).mean(dim=2))
    assert torch.equal(out, x + update)  # with gates of exactly one
    (by_gate,) = torch.autograd.grad((update * weights).sum(), gates)
    one_hot = torch.nn.functional.one_hot(experts, HEADS).to(p.dtype)
    expected = (by_gate[..., None] * (one_hot - p[:, None])).sum(dim=1)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-10)
    assert layer.router.weight.grad.abs().min() > 0


def test_gate_stays_one_where_a_probability_underflows():
    layer, x = expert_layer(experts_per_sequence=2), hidden_states()
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([0.0, -5000.0, -6000.0, -7000.0]))
    out, _ = run(layer, x)
    expected = reference(layer, x, torch.ones(4, 6), torch.tensor([[0, 1]]).expand(4, -1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_only_the_chosen_experts_are_computed():
    layer, x = expert_layer(), hidden_states()
    with torch.no_grad():
        layer.router.bias[2] = 1e3
        expected, _ = run(layer, x)
        for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            projection.weight[: 2 * SIZE] = math.nan
            projection.weight[3 * SIZE :] = math.nan
    out, _ = run(layer, x)
    assert torch.equal(out, expected)
    out.sum().backward()
    gradient = layer.attention.self.value.weight.grad.view(HEADS, -1)
    assert gradient[[0, 1, 3]].abs().max() == 0
    assert gradient[2].abs().min() > 0


@pytest.mark.parametrize("is_routed", [True, False], ids=["routed", "static"])
def test_hidden_dropout_falls_on_the_update(is_routed):
    layer, x = expert_layer(hidden_dropout_prob=0.5), hidden_states()
    if not is_routed:
        layer.keep_experts_([1])
    whole, dropped = without_dropout(layer, x) - x, run(layer, x)[0] - x
    is_zero = dropped == 0
    assert 0.4 < is_zero.double().mean() < 0.6
    torch.testing.assert_close(dropped[~is_zero], 2 * whole[~is_zero], rtol=0, atol=1e-10)


def test_attention_dropout_falls_on_the_attention_weights():
    attention, x = expert_layer(attention_probs_dropout_prob=0.5).attention.self, hidden_states()
    _, dropped = attention(x)
    _, whole = attention.eval()(x)
    is_zero = dropped == 0
    assert 0.4 < is_zero.double().mean() < 0.6
    torch.testing.assert_close(dropped[~is_zero], 2 * whole[~is_zero], rtol=0, atol=1e-10)


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_work_is_not_done_sample_by_sample(attention):
    layer, counts = expert_layer(attention=attention), []
    for size in (4, 16):
        with CountOps() as ops:
            run(layer, hidden_states(size), additive(token_mask(size)), token_mask(size))[0].sum().backward()
        counts.append(ops.count)
        layer.zero_grad(set_to_none=True)
    assert counts[0] == counts[1] > 30


def test_expander_starts_from_the_output_projection():
    config = ShrpBertConfig(**SIZES, expert_layers=[1], pending_layers=[1])
    dense = BertLayer(BertConfig(**SIZES))
    randomize_(dense)
    output = dense.attention.output.dense.weight.detach().clone()
    layer = ExpertLayer(config, 1, dense)
    randomize_(layer.expander)
    layer.warm_start_()
    slices = [output[:, h * SIZE : (h + 1) * SIZE] for h in range(HEADS)]
    torch.testing.assert_close(layer.expander.dense.weight, math.sqrt(HEADS) * sum(slices) / HEADS)
    assert layer.expander.dense.bias.abs().max() == 0
    assert torch.equal(layer.expander.LayerNorm.weight, torch.full((HIDDEN,), 0.1))
    assert layer.expander.LayerNorm.bias.abs().max() == 0
    assert layer.attention.self.query.weight is dense.attention.self.query.weight


def test_pending_layer_runs_as_the_dense_layer_that_it_was():
    config = ShrpBertConfig(**SIZES, pending_layers=[1])
    stock = BertConfig(**SIZES)
    config._attn_implementation = stock._attn_implementation = "sdpa"
    dense = BertLayer(stock).eval()
    randomize_(dense)
    x = torch.randn(4, 6, HIDDEN)
    expected = dense(x)
    out, logits = run(ExpertLayer(config, 1, dense), x)
    assert torch.equal(out, expected)
    assert logits is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_router_reads_the_mean_of_the_real_tokens(dtype):
    router, x, mask = Router(ShrpBertConfig(**SIZES)).to(dtype), hidden_states().to(dtype), token_mask()
    means = torch.stack([row[keep.bool()].double().mean(dim=0) for row, keep in zip(x, mask, strict=True)])
    expected = means @ router.weight.double().T + router.bias.double()
    logits = router(x, mask)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(logits, expected, logits.dtype)
    x[mask == 0] = 1e4
    assert torch.equal(router(x, mask), logits)  # what is padded does not matter


def test_router_reads_all_where_there_is_no_mask():
    router, x = Router(ShrpBertConfig(**SIZES)).double(), hidden_states()
    torch.testing.assert_close(router(x, None), router(x, torch.ones(4, 6)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
def test_router_reads_the_first_real_token(masked):
    router, x = Router(ShrpBertConfig(**SIZES, router_pooling="cls")).double(), hidden_states()
    first = [0, 0, 3, 0] if masked else [0, 0, 0, 0]
    expected = x[range(4), first] @ router.weight.T + router.bias
    torch.testing.assert_close(router(x, token_mask() if masked else None), expected, rtol=0, atol=1e-12)


def test_router_keeps_its_precision_under_autocast():
    router, x = Router(ShrpBertConfig(**SIZES)), torch.randn(4, 6, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(x, token_mask())
    assert torch.equal(logits, router(x, token_mask()))


def test_chosen_projections_are_slices_of_all():
    dense = torch.nn.Linear(HIDDEN, HIDDEN).double()
    experts, x = torch.tensor([[2], [0], [3], [2]]), hidden_states()
    linear = ExpertLinear(dense, SIZE)
    everything = linear(x)
    assert torch.equal(everything, dense(x))
    expected = torch.stack([row[:, e * SIZE : (e + 1) * SIZE] for row, [e] in zip(everything, experts.tolist(), strict=True)])
    torch.testing.assert_close(linear(x, experts), expected, rtol=0, atol=1e-12)


def reference_balance_loss(mean_probabilities):
    """KL(p || u) + KL(u || p), mean over layers."""
    losses = []
    for p in mean_probabilities.tolist():
        u = 1 / len(p)
        forward = sum(q * math.log(q / u) for q in p)
        backward = sum(u * math.log(u / q) for q in p)
        losses.append(forward + backward)
    return sum(losses) / len(losses)


def test_balance_loss_is_the_bidirectional_divergence():
    p = torch.randn(5, 7, dtype=torch.float64).softmax(dim=-1)
    assert load_balancing_loss(p).item() == pytest.approx(reference_balance_loss(p), abs=1e-12)
    assert load_balancing_loss(torch.full((2, 4), 0.25)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_balance_loss_of_a_collapsed_router_is_finite_and_pulls_back(dtype):
    logits = torch.tensor([[80.0, 0.0, 0.0, -200.0]], dtype=dtype, requires_grad=True)
    loss = load_balancing_loss(logits.softmax(dim=-1))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] > 0  # a step of descent lowers the favourite
    assert loss > load_balancing_loss(torch.tensor([[0.9, 0.05, 0.04, 0.01]], dtype=dtype))
