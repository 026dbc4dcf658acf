"""Generated cases: every one is right, or refused by our own error that names the argument; nothing else ever.

Few of them in the fast suite; `FAULTS_PROFILE=full` (`make test-faults`) generates hundreds. They are the same in every run.
"""

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import tests.tiny
from shrp_hf.families import head_layout
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertModel
from shrp_hf.numerics import ROUNDINGS, rounding_bound
from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import masked_heads, prune_heads, to_shrp
from shrp_hf.scoring import StatsRequest
from tests.test_families import TABLE, transformers
from tests.tiny import force_experts_, randomize_, same_state

WILD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 14)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30])
    | st.floats()
    | st.sampled_from(["", "1", "cls", "mean", "last", "x" * 300, "\x00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(-1, 3) | st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
# Largest deviation from float64, relative to the largest output.
PRECISIONS = {torch.float64: 2**18, torch.float32: ROUNDINGS, torch.float16: 32, torch.bfloat16: 32}  # in roundings


def generate(count: Callable, strategy: st.SearchStrategy, check: Callable[[Any], str], share: float = 1.0) -> Counter:
    """Runs `check` on generated cases and counts what it says: "right" or "refused"."""
    outcomes: Counter = Counter()

    @settings(max_examples=max(1, round(share * settings.default.max_examples)))
    @given(strategy)
    def run(case: Any) -> None:
        outcomes[check(case)] += 1

    run()
    count("generated cases", tried=outcomes.total(), right=outcomes["right"], refused=outcomes["refused"], lost=0)
    return outcomes


def is_refused(call: Callable[[], Any]) -> bool:
    """Whether a call ends with an error of ours (or of the check of a field's type) that names the argument."""
    try:
        call()
    except (ValueError, StrictDataclassError) as error:
        message = str(error)
    else:
        return False
    if not re.search(r"`\w+[\[`= ]|field '\w+'", message):
        raise AssertionError(f"names no argument: {message}")
    return True


# --- models ---


@st.composite
def shapes(draw: Any, families: tuple[str, ...] = ("bert", "roberta", "electra", "distilbert")) -> dict:
    """A small model's sizes and what it reads: lengths, padding, precision."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return {
        "family": draw(st.sampled_from(families)),
        "layers": layers,
        "heads": heads,
        "head_size": draw(st.sampled_from((2, 4, 6))),
        "attention": draw(st.sampled_from(("eager", "sdpa"))),
        "lengths": lengths,
        "dtype": draw(st.sampled_from(tuple(PRECISIONS))),
        "kept": tuple(draw(st.sets(st.integers(0, heads - 1)).map(tuple)) for _ in range(layers)),
        "experts": sorted(draw(st.sets(st.integers(0, layers - 1)))),
        "top": draw(st.integers(1, heads)),
        "pooling": draw(st.sampled_from(("mean", "cls"))),
        "seed": draw(st.integers(0, 99)),
    }


def base_model(case: dict) -> PreTrainedModel:
    """A stock base model of these sizes in float64."""
    prefix, fields, _ = TABLE[case["family"]]
    hidden = case["heads"] * case["head_size"]
    named = {"n_layers": "layers", "n_heads": "heads"} if "n_layers" in fields else {}
    sizes = {name: case[value] for name, value in named.items()} or {
        "num_hidden_layers": case["layers"],
        "num_attention_heads": case["heads"],
    }
    sizes |= {"dim": hidden, "hidden_dim": 8} if named else {"hidden_size": hidden, "intermediate_size": 8}
    torch.manual_seed(case["seed"])
    config = getattr(transformers, f"{prefix}Config")(**(fields | sizes))
    model = getattr(transformers, f"{prefix}Model")._from_config(config, attn_implementation=case["attention"])
    randomize_(model, seed=case["seed"])
    return model.double().eval()


def padded(case: dict, side: str) -> dict[str, torch.Tensor]:
    """Token ids, mask and, where the family takes them, positions that count real tokens."""
    generator = torch.Generator().manual_seed(case["seed"])
    longest = max(case["lengths"])
    ids = torch.zeros(len(case["lengths"]), longest, dtype=torch.long) + (1 if case["family"] == "roberta" else 0)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(case["lengths"]):
        span = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, span] = torch.randint(2, 99, (length,), generator=generator)
        mask[row, span] = 1
    made = {"input_ids": ids, "attention_mask": mask}
    if case["family"] in ("bert", "electra"):
        made["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return made


@torch.no_grad()
def states(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states of the real tokens, row by row: (tokens, hidden), float64."""
    hidden = model(**inputs).last_hidden_state
    assert hidden.isfinite().all()
    return hidden[inputs["attention_mask"].bool()].double()


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    assert (ours - theirs).abs().max().item() <= rounding_bound(theirs.abs().max().item(), dtype, PRECISIONS[dtype])


def reloaded(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return copy.deepcopy(type(model).from_pretrained(folder, attn_implementation=model.config._attn_implementation))


def check_padding(model: PreTrainedModel, case: dict) -> torch.Tensor:
    """Left padding equals right padding equals none; returns the states."""
    right = states(model, padded(case, "right"))
    if case["family"] != "distilbert":  # it has no positions to be told
        assert_near(states(model, padded(case, "left")), right, torch.float64)
    alone = []
    for row, length in enumerate(case["lengths"]):
        one = {name: value[row : row + 1, :length] for name, value in padded(case, "right").items()}
        alone.append(states(model, one))
    assert_near(torch.cat(alone), right, torch.float64)
    return right


def drawn_neurons(model: PreTrainedModel, seed: int) -> tuple[list[list[int]], tuple[int, ...]]:
    """Some neurons of each layer, or none, or all; and how many there are."""
    generator, widths = torch.Generator().manual_seed(seed), head_layout(model).num_neurons
    kept = []
    for width in widths:
        share = int(torch.randint(4, (1,), generator=generator)) / 3
        kept.append(torch.randperm(width, generator=generator)[: round(share * width)].tolist())
    return kept, widths


def check_pruned(case: dict) -> str:
    model = base_model(case)
    plan = KeepPlan(case["kept"], case["heads"]).with_neurons(*drawn_neurons(model, case["seed"]))
    inputs = padded(case, "right")
    with masked_heads(model, plan):
        expected = states(model, inputs)
    pruned = prune_heads(model, plan)
    assert_near(check_padding(pruned, case), expected, torch.float64)
    pruned.to(case["dtype"])
    assert_near(states(pruned, inputs), expected, case["dtype"])
    loaded = reloaded(pruned)
    assert same_state(loaded, pruned)
    # Not bit by bit: where rows are of odd lengths, kernels depend on where in memory a weight begins.
    assert_near(states(loaded, inputs), states(pruned, inputs), case["dtype"])
    return "right"


def test_pruned_equals_masked_whatever_the_padding_and_precision(count):
    generate(count, shapes(), check_pruned)


def check_static(case: dict) -> str:
    model = to_shrp(base_model(case))
    model.config.experts_per_sequence, model.config.router_pooling = case["top"], case["pooling"]
    if not case["experts"]:
        assert is_refused(lambda: model.convert_layers_(case["experts"]))
        return "refused"
    model.convert_layers_(case["experts"])
    randomize_(model, seed=case["seed"])
    check_padding(model, case)  # routed by what the router makes of the sequence, not by its padding
    chosen = torch.randperm(case["heads"], generator=torch.Generator().manual_seed(case["seed"]))[: case["top"]].tolist()
    for layer in case["experts"]:
        force_experts_(model, layer, chosen)
    expected = check_padding(model, case)
    everything = tuple(range(case["heads"]))
    kept = tuple(tuple(chosen) if i in case["experts"] else everything for i in range(case["layers"]))
    static = prune_heads(model, KeepPlan(kept, case["heads"]))
    assert_near(check_padding(static, case), expected, torch.float64)
    static.to(case["dtype"])
    assert_near(states(static, padded(case, "right")), expected, case["dtype"])
    assert same_state(reloaded(static), static)
    assert same_state(reloaded(model), model)
    return "right"


def test_static_equals_routed_whatever_the_padding_and_precision(count):
    generate(count, shapes(("bert", "roberta")), check_static)


@st.composite
def masks(draw: Any) -> tuple[dict, torch.Tensor]:
    """Any mask of zeros and ones, with holes and with rows that have no token at all, in any type."""
    case = draw(shapes(("bert",)))
    batch, length = len(case["lengths"]), max(case["lengths"])
    bits = draw(st.lists(st.integers(0, 1), min_size=batch * length, max_size=batch * length))
    mask = torch.tensor(bits).view(batch, length).to(draw(st.sampled_from((torch.int64, torch.bool, torch.float32))))
    return case, mask


def check_mask(made: tuple[dict, torch.Tensor]) -> str:
    case, mask = made
    stock, ids = base_model(case), padded(case, "right")["input_ids"]
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = to_shrp(copy.deepcopy(stock))(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(ours, expected)
        routed = ShrpBertModel.from_stock(copy.deepcopy(stock))
        routed.convert_layers_(case["layers"])
        one, other = (routed(input_ids=ids, attention_mask=m).last_hidden_state for m in (mask, mask.long()))
    assert ours.isfinite().all()
    assert one.isfinite().all()
    assert torch.equal(one, other)
    return "right"


def test_any_mask_gives_what_stock_bert_gives_and_never_nan(count):
    generate(count, masks(), check_mask, share=0.5)


# --- values ---


def check_plan(made: tuple[Any, ...]) -> str:
    kept, heads, *neurons = made
    plans = []
    if is_refused(lambda: plans.append(KeepPlan(kept, heads, *neurons))):
        return "refused"
    plan = plans[0]
    assert all(0 <= head < plan.num_heads for layer in plan.kept for head in layer)
    assert KeepPlan.from_json(plan.to_json()) == plan
    return "right"


def test_any_plan_is_right_or_refused(count):
    indices = st.lists(st.lists(st.integers(-1, 4), max_size=4), min_size=1, max_size=3)
    generate(count, st.tuples(WILD | indices, WILD | st.integers(1, 5)), check_plan)
    widths = WILD | st.integers(0, 6) | st.lists(st.integers(0, 6), min_size=1, max_size=3)
    generate(count, st.tuples(indices, st.just(5), WILD | indices, widths), check_plan, share=0.5)


BERT = tests.tiny.tiny_bert(dtype=torch.float64)
V4 = st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 4), max_size=3), max_size=3)
PLANS = st.lists(st.sets(st.integers(0, 4)), min_size=2, max_size=4).map(lambda sets: tuple(tuple(s) for s in sets))


def check_cut(plan: Any) -> str:
    made: list[PreTrainedModel] = []
    before = {name: value.clone() for name, value in BERT.state_dict().items()}
    refused = is_refused(lambda: made.append(prune_heads(BERT, plan)))
    assert all(torch.equal(value, before[name]) for name, value in BERT.state_dict().items())
    if refused:
        return "refused"
    inputs = tests.tiny.batch()
    with masked_heads(BERT, plan), torch.no_grad():
        assert_near(made[0](**inputs).logits, BERT(**inputs).logits, torch.float64)
    return "right"


def test_any_cut_is_right_or_refused(count):
    plans = PLANS.map(lambda kept: KeepPlan(kept, 5)) | PLANS.map(lambda kept: KeepPlan(tuple(k[:2] for k in kept), 5))
    fitting = st.lists(st.sets(st.integers(0, 3)), min_size=3, max_size=3).map(lambda kept: KeepPlan([*map(tuple, kept)], 4))
    neurons = st.lists(st.sets(st.integers(0, 63)).map(tuple), min_size=3, max_size=3)
    thin = st.tuples(fitting, neurons, st.sampled_from((64, 65))).map(lambda made: made[0].with_neurons(*made[1:]))
    generate(count, V4 | plans | fitting | thin | WILD, check_cut)


def check_budget(made: tuple[str, Any]) -> str:
    kind, value = made
    budgets: list[Budget] = []
    if is_refused(lambda: budgets.append(getattr(Budget, kind)(value))):
        return "refused"
    if budgets[0].kind in ("heads", "fraction"):
        counts: list[int] = []
        if is_refused(lambda: counts.append(budgets[0].count(12))):
            return "refused"
        assert 1 <= counts[0] <= 12
    return "right"


def test_any_budget_is_right_or_refused(count):
    kinds = st.sampled_from(("heads", "fraction", "knee", "parameters", "flops", "latency", "quality"))
    generate(count, st.tuples(kinds, WILD | st.floats(0, 1) | st.integers(1, 12)), check_budget)


FIELDS = ("expert_layers", "pending_layers", "kept_heads", "routed", "experts_per_sequence", "router_pooling")
FIELDS += ("intermediate_sizes", "output_bias", "intermediate_size")
FIELDS += ("router_aux_loss_coef", "format_version", "num_attention_heads", "num_hidden_layers", "hidden_size")


def check_config(fields: dict[str, Any]) -> str:
    configs: list[ShrpBertConfig] = []
    sizes = {"hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 8, "vocab_size": 9}
    if is_refused(lambda: configs.append(ShrpBertConfig(**(sizes | fields)))):
        return "refused"
    config = configs[0]
    assert ShrpBertConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    if config.hidden_size % config.num_attention_heads == 0 and config.num_hidden_layers < 20:
        model = ShrpBertModel(config).eval()
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()
    return "right"


def test_any_config_is_right_or_refused(count):
    layers = st.lists(st.integers(0, 3), max_size=3)
    heads = st.lists(st.sets(st.integers(0, 3)).map(sorted), min_size=3, max_size=3)
    good = {"expert_layers": layers, "pending_layers": layers, "kept_heads": heads, "routed": st.booleans()}
    good |= {"intermediate_sizes": st.lists(st.integers(0, 9), min_size=2, max_size=3), "output_bias": st.booleans()}
    likely = st.fixed_dictionaries({}, optional=good | {"experts_per_sequence": st.integers(1, 5)})
    wild = st.dictionaries(st.sampled_from(FIELDS), WILD, min_size=1, max_size=2)
    generate(count, likely | wild, check_config)


def check_layers(layers: Any) -> str:
    model = to_shrp(copy.deepcopy(BERT))
    if is_refused(lambda: model.convert_layers_(layers)):
        assert same_state(model, BERT)
        return "refused"
    wanted = list(range(3 - layers, 3)) if isinstance(layers, int) else sorted(layers)
    assert model.config.expert_layers == wanted
    return "right"


def test_any_layers_are_converted_or_refused(count):
    generate(count, WILD | st.integers(1, 3) | st.sets(st.integers(0, 2), min_size=1).map(list), check_layers, share=0.5)


def check_request(size: Any) -> str:
    return "refused" if is_refused(lambda: StatsRequest(entropy=True, signature_size=size)) else "right"


def test_any_request_is_right_or_refused(count):
    outcomes = generate(count, WILD | st.integers(0, 9), check_request, share=0.3)
    assert outcomes["refused"]


@pytest.mark.faults
def test_enough_was_generated():
    """Shares of the profile that the tests above take add up to 8: at least 500 cases."""
    assert settings.default.max_examples >= 65
