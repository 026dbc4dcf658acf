"""A family from outside is scored, masked, cut, saved, loaded and made stock again; a map that is wrong is refused."""

import copy
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig

from shrp_hf import (
    Budget,
    HisSelector,
    KeepPlan,
    Part,
    masked_heads,
    prune_heads,
    register_family,
    to_shrp,
    to_stock,
)
from shrp_hf.families import FAMILIES, head_layout
from shrp_hf.scoring import StatsRequest, collect_head_stats
from tests.tiny import batch, randomize_, same_state
from tests.toy_family import (
    TOY,
    ShrpToyTooConfig,
    ShrpToyTooModel,
    ToyConfig,
    ToyForSequenceClassification,
    ToyModel,
    ToyTooModel,
    forgotten_afterwards,
    register,
)

ALL, EVERY = (0, 1, 2, 3), tuple(range(24))
PLANS = {
    "some": KeepPlan(((0, 2), (1,), ALL), 4, ((1, 5, 23), EVERY, (0,)), 24),
    "none": KeepPlan(((), ALL, (3,)), 4, (EVERY, (), (2, 3)), 24),
    "neither": KeepPlan(((), (), ()), 4, ((), (), ()), 24),
}
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The toy family, known to this module's tests only."""
    with forgotten_afterwards():
        yield register()


def toy():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ToyForSequenceClassification(ToyConfig())
    randomize_(model)
    return model.double().eval()


def given():
    made = batch()
    return made | {"input_ids": made["input_ids"] % 50, "labels": torch.tensor([0, 1, 2, 0, 1])}


@torch.no_grad()
def logits(model):
    return model(**given()).logits


def means_of(model):
    return collect_head_stats(model, [given()], StatsRequest(means=True)).output_means()


@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_cut_equals_masked_and_loaded_equals_saved(plan, with_means, tmp_path, registered):
    model, plan = toy(), PLANS[plan]
    means = means_of(model) if with_means else None
    with masked_heads(model, plan, means):
        masked = logits(model)
    assert not torch.allclose(masked, logits(model), atol=1e-3)
    cut = prune_heads(model, plan, means)
    torch.testing.assert_close(logits(cut), masked, **EXACT)
    assert type(cut) is registered["ShrpToyForSequenceClassification"]
    assert head_layout(cut).num_neurons == tuple(map(len, plan.neurons))
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert same_state(loaded, cut)
    assert cut.config.output_bias is with_means
    if with_means:
        with pytest.raises(ValueError, match="was cut with `output_means`, which left a bias in output matrices"):
            to_stock(cut)
    else:
        stock = to_stock(loaded)
        assert type(stock) is ToyForSequenceClassification
        torch.testing.assert_close(logits(stock), masked, **EXACT)


def test_cutting_twice_takes_each_layers_own_share_of_the_bias():
    model = toy()
    first = KeepPlan(((0, 2, 3), ALL, (1, 2)), 4, ((1, 5, 23), EVERY, (0, 7)), 24)
    second = KeepPlan(((3,), (1,), (1, 2)), 4, ((2,), (4, 6), (0, 1)), (3, 24, 2))
    once, twice = prune_heads(model, first.then(second)), prune_heads(prune_heads(model, first), second)
    assert same_state(once, twice)
    assert torch.equal(logits(once), logits(twice))
    assert torch.equal(logits(copy.deepcopy(twice)), logits(twice))


def test_heads_and_neurons_are_scored():
    model = toy()
    request = StatsRequest(importance=True, neurons=True)
    stats = collect_head_stats(model, [given()], request)
    layout = head_layout(model)
    masks = [torch.ones(24, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sums = [torch.zeros(24, dtype=torch.float64) for _ in range(3)]
    hooks = [
        layout.neurons_out(i).register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask,)) for i, mask in enumerate(masks)
    ]
    for row in range(5):
        for total, gradient in zip(
            sums, torch.autograd.grad(model(**{k: v[row : row + 1] for k, v in given().items()}).loss, masks), strict=True
        ):
            total += gradient.abs() / 5
    for hook in hooks:
        hook.remove()
    for ours, theirs in zip(stats.neuron_importance(), sums, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    plan = HisSelector(budget=Budget.heads(5)).select(model, stats=stats)
    with masked_heads(model, plan):
        masked = logits(model)
    torch.testing.assert_close(logits(prune_heads(model, plan)), masked, **EXACT)


def test_saved_model_opens_in_a_process_that_registers_the_family(tmp_path):
    cut = prune_heads(toy(), PLANS["some"])
    cut.save_pretrained(tmp_path)
    torch.save((given(), logits(cut)), tmp_path / "said.pt")
    code = f"""
import torch, tests.toy_family
tests.toy_family.register()
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r}, dtype=torch.float64)
batch, said = torch.load({str(tmp_path / "said.pt")!r})
with torch.no_grad():
    torch.testing.assert_close(model(**batch).logits, said, rtol=0, atol=1e-10)
print(type(model).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["ShrpToyForSequenceClassification"]


def test_auto_classes_and_base_model(registered):
    base = ToyModel(ToyConfig())
    shrp = to_shrp(base)
    assert type(shrp) is registered["ShrpToyModel"]
    assert AutoModel._model_mapping[type(shrp.config)] is type(shrp)
    assert shrp.config.model_type == "shrp_toy"


def test_family_that_transformers_knows_needs_its_map_only():
    taken = dict(FAMILIES)
    classes = register_family("ernie", FAMILIES["bert"])
    assert {"ShrpErnieModel", "ShrpErnieForMaskedLM", "ShrpErnieForSequenceClassification"} <= set(classes)
    assert set(FAMILIES) - set(taken) == {"ernie", "shrp_ernie"}
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 50}
    model = transformers.ErnieForSequenceClassification(transformers.ErnieConfig(**fields, num_labels=3)).double().eval()
    plan = KeepPlan(((1,), ()), 4, ((), (3, 9)), 24)
    with masked_heads(model, plan):
        masked = logits(model)
    cut = prune_heads(model, plan)
    torch.testing.assert_close(logits(cut), masked, **EXACT)
    torch.testing.assert_close(logits(to_stock(cut)), masked, **EXACT)


# --- refused ---


def wrong(**fields):
    return lambda: register_family("toy2", replace(TOY, **fields), Toy2Config, [Toy2Model])


class Toy2Config(ToyConfig):
    model_type = "toy2"


class Toy2Model(ToyModel):
    config_class = Toy2Config


class OpenConfig(ToyConfig):
    model_type = "toy2"
    vocab_size: int | None = None


class OpenModel(ToyModel):
    config_class = OpenConfig


class OldConfig(PreTrainedConfig):
    model_type = "toy2"

    def __init__(self, hidden_size=16, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class OldModel(ToyModel):
    config_class = OldConfig


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(
            lambda: register_family("toy", TOY, ToyConfig, [ToyModel]),
            "The family 'toy' is registered already: call `register_family` once per process.",
            id="twice",
        ),
        pytest.param(
            lambda: register_family("bert", TOY),
            "The family 'bert' is registered already: call `register_family` once per process.",
            id="ours",
        ),
        pytest.param(
            lambda: register_family("nobody", TOY),
            "`AutoConfig` knows no family 'nobody': give `config_class` and `model_classes`.",
            id="unknown",
        ),
        pytest.param(
            lambda: register_family("toy2", TOY, Toy2Config),
            "The Auto classes know no model of the family 'toy2': give `model_classes`.",
            id="no models",
        ),
        pytest.param(
            lambda: register_family("toy2", TOY, ToyConfig, [Toy2Model]),
            "`config_class` and `model_classes` must be of the family 'toy2', got ['toy', 'toy2'].",
            id="other config",
        ),
        pytest.param(
            lambda: register_family("toy2", TOY, OldConfig, [OldModel]),
            "`OldConfig` has an `__init__` of its own, but a Shrp config is made of a config's fields: declare them as "
            "Transformers 5 does (`hidden_size: int = 768`), or give `config_class` a Shrp config of your own.",
            id="config with an __init__",
        ),
        pytest.param(
            lambda: register_family("toy-three", replace(TOY, activation=None), ShrpToyTooConfig, [ToyTooModel]),
            "`config_class` and `model_classes` must be of the family 'toy-three', got ['shrp_toy-too', 'toy-too'].",
            id="own config of another family",
        ),
        pytest.param(
            lambda: register_family("toy-too", replace(TOY, activation=None), model_classes=[ShrpToyTooModel]),
            "`ShrpToyTooConfig.layer_map` must be the `layer_map` that is registered, got another.",
            id="own config with another map",
        ),
        pytest.param(
            wrong(layers="stack"),
            "`layers` of the layer map of 'toy2' names 'stack', but Toy2Model has no such module: it has embeddings, blocks, ",
            id="layers",
        ),
        pytest.param(
            wrong(layers="embeddings"),
            "`layers` of the layer map of 'toy2' must name a ModuleList, but 'embeddings' is a Embedding.",
            id="no list",
        ),
        pytest.param(
            wrong(heads_out="mixer.output"),
            "`heads_out` of the layer map of 'toy2' names 'mixer.output', but Block has no such module: it has norm, ",
            id="output",
        ),
        pytest.param(
            wrong(heads_in=(Part("mixer.qkv", 0, 2),) * 3),
            "`heads_in` of the layer map of 'toy2' says 2 block(s) of 16 rows for 'mixer.qkv', but it has 48 rows.",
            id="blocks",
        ),
        pytest.param(
            wrong(neurons_in=(Part("up"),)),
            "`neurons_in` of the layer map of 'toy2' says 1 block(s) of 24 rows for 'up', but it has 48 rows.",
            id="neurons",
        ),
        pytest.param(
            wrong(neurons_out="mixer.out"),
            "`neurons_out` of the layer map of 'toy2' needs 24 columns in 'mixer.out', but it has 16.",
            id="neurons out",
        ),
        pytest.param(
            wrong(ffn_width="intermediate_size"),
            "`ffn_width` of the layer map of 'toy2' names 'intermediate_size', but the config has no such field.",
            id="width",
        ),
        pytest.param(
            wrong(head_count="num_heads"),
            "`head_count` of the layer map of 'toy2' names 'num_heads', but Mixer has no such attribute: give the right "
            "one, or None.",
            id="count",
        ),
        pytest.param(
            wrong(head_bias="position_bias"),
            "`head_bias` of the layer map of 'toy2' names 'position_bias', but the forward of Mixer has no such argument.",
            id="bias",
        ),
        pytest.param(
            wrong(activation="act"),
            "`activation` of the layer map of 'toy2' names 'act', but Block has no such attribute: give the right "
            "one, or None.",
            id="activation",
        ),
        pytest.param(
            wrong(after_heads=("down",)),
            "`after_heads` of the layer map of 'toy2' names 'down', which is not inside its `attention` 'mixer'.",
            id="after heads",
        ),
        pytest.param(
            wrong(position_modules=("mixer.turn",)),
            "`position_modules` of the layer map of 'toy2' names 'mixer.turn', but Block has no such module: it has norm, ",
            id="positions",
        ),
        pytest.param(
            wrong(heads_in=TOY.heads_in[:2]),
            f"`heads_in` of the layer map of 'toy2' must name 3 part(s) at least, got {TOY.heads_in[:2]!r}.",
            id="no value",
        ),
        pytest.param(
            wrong(neurons_in=()),
            "`neurons_in` of the layer map of 'toy2' must name 1 part(s) at least, got ().",
            id="no neurons",
        ),
        pytest.param(
            wrong(neurons_out="gate"),
            "`neurons_out` of the layer map of 'toy2' names 'gate', which is a SiLU and no matrix.",
            id="no weight",
        ),
        pytest.param(
            wrong(neurons_in=(Part("norm"),)),
            "`neurons_in` of the layer map of 'toy2' names 'norm', which is a LayerNorm and no matrix.",
            id="no matrix",
        ),
        pytest.param(
            lambda: register_family("toy2", "bert", Toy2Config, [Toy2Model]),
            "`layer_map` must be a LayerMap, got 'bert'.",
            id="no map",
        ),
        pytest.param(
            lambda: register_family("toy2", TOY, OpenConfig, [OpenModel]),
            "`OpenModel` cannot be built from the default values of `OpenConfig`, which the map is checked on: ",
            id="defaults that leave a size open",
        ),
    ],
)
def test_refused_and_nothing_registered(act, message):
    before = dict(FAMILIES)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        act()
    assert dict(FAMILIES) == before
    assert "shrp_toy2" not in transformers.CONFIG_MAPPING


@pytest.mark.parametrize(("block", "blocks"), [(1, 1), (-1, 2), (0, 0)])
def test_a_block_that_is_not_there_is_refused(block, blocks):
    message = f"`block` of 'up' must be one of `blocks`, counted from 0, got block={block} of blocks={blocks}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Part("up", block, blocks)


def test_a_part_may_be_missing_where_the_map_says_so():
    with forgotten_afterwards():
        optional = replace(TOY, heads_in=(*TOY.heads_in, Part("mixer.places", optional=True)))
        register_family("toy2", optional, Toy2Config, [Toy2Model])
        model = Toy2Model(Toy2Config()).double().eval()
        fields = {name: value for name, value in given().items() if name != "labels"}
        with torch.no_grad(), masked_heads(model, PLANS["some"]):
            masked = model(**fields).last_hidden_state
        torch.testing.assert_close(prune_heads(model, PLANS["some"])(**fields).last_hidden_state, masked, **EXACT)


def test_code_that_is_in_no_file_is_not_shipped(tmp_path):
    message = (
        "`with_code=True` needs a modeling file, but `ShrpToyForSequenceClassification` was built by `register_family`: save "
        "without code, and call `register_family` where it is loaded; or write the class in a file, and give it in "
        "`model_classes`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prune_heads(toy(), PLANS["some"]).save_pretrained(tmp_path, with_code=True)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prune_heads(toy(), PLANS["some"]).push_to_hub("org/toy", with_code=True)
    assert not any(tmp_path.iterdir())


def test_classes_of_a_file_are_used_and_shipped(tmp_path):
    with forgotten_afterwards():
        use_and_ship(tmp_path)


def use_and_ship(tmp_path):
    assert register_family("toy-too", TOY, model_classes=[ShrpToyTooModel]) == {"ShrpToyTooModel": ShrpToyTooModel}
    model = ToyTooModel(ToyTooModel.config_class()).double().eval()
    fields = {name: value for name, value in given().items() if name != "labels"}
    cut = prune_heads(model, PLANS["some"])
    assert type(cut) is ShrpToyTooModel
    with torch.no_grad():
        said = cut(**fields).last_hidden_state
        with masked_heads(model, PLANS["some"]):
            torch.testing.assert_close(model(**fields).last_hidden_state, said, **EXACT)
    cut.save_pretrained(tmp_path, with_code=True)
    assert (tmp_path / "toy_family.py").is_file()
    assert type(to_stock(AutoModel.from_pretrained(tmp_path))) is ToyTooModel


def test_experts_are_refused_by_name():
    message = (
        "`ShrpToyForSequenceClassification` has no expert layers: a family that was registered from outside does not convert "
        "to SHRP. Cut its heads and neurons instead (`prune_heads`)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to_shrp(toy()).convert_layers_(1)
    message = (
        "`expert_layers=[1]`: `shrp_toy` has none; a family that was registered from outside does not convert to SHRP. Leave "
        "the field empty, its heads can still be pruned."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        type(to_shrp(toy()).config)(expert_layers=[1])


def test_class_that_was_not_given_is_refused_by_name():
    class ToyForSomethingElse(ToyForSequenceClassification):
        pass

    message = "`ToyForSomethingElse` has no Shrp class: give it in `register_family('toy', ..., model_classes=[...])`."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to_shrp(ToyForSomethingElse(ToyConfig()))
