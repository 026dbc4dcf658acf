"""The config: what it checks, what it refuses and by which words, and that it survives being written."""

import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig, DistilBertConfig

import shrp_hf
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from tests.tiny import SIZES


def test_defaults_describe_stock_bert():
    stock, ours = BertConfig().to_dict(), ShrpBertConfig().to_dict()
    assert {name: ours[name] for name in stock if name not in ("model_type", "transformers_version")} == {
        name: stock[name] for name in stock if name not in ("model_type", "transformers_version")
    }
    assert (ours["expert_layers"], ours["pending_layers"], ours["kept_heads"]) == ([], [], None)
    assert not ShrpBertConfig().is_routed


def test_layers_are_sorted_and_heads_derived():
    config = ShrpBertConfig(**SIZES, expert_layers=[2, 0], routed=False, kept_heads=[[1], [0, 3], [2, 3]])
    assert config.expert_layers == [0, 2]
    assert config.heads_of(1) == [0, 3]
    assert ShrpBertConfig(**SIZES).heads_of(1) == [0, 1, 2, 3]
    assert config.head_size == 8
    assert config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"expert_layers": [1]}, True),
        ({"pending_layers": [1]}, True),
        ({"expert_layers": [1], "routed": False}, False),
    ],
)
def test_is_routed(fields, expected):
    assert ShrpBertConfig(**SIZES, **fields).is_routed is expected


@st.composite
def layer_fields(draw):
    experts = draw(st.sets(st.integers(0, 2)))
    routed = draw(st.booleans())
    heads = [
        [0, 1, 2, 3] if routed and layer in experts
        else sorted(draw(st.sets(st.integers(0, 3), min_size=int(layer in experts))))
        for layer in range(3)
    ]  # fmt: skip
    return {"expert_layers": list(experts), "routed": routed, "kept_heads": draw(st.sampled_from([None, heads]))}


@settings(max_examples=25, deadline=None)
@given(layer_fields(), st.sampled_from([0, 1, 0.25]), st.integers(1, 4))
def test_valid_fields_survive_json(fields, coef, top):
    config = ShrpBertConfig(**SIZES, **fields, router_aux_loss_coef=coef, experts_per_sequence=top, router_pooling="cls")
    written = json.loads(config.to_json_string(use_diff=False))
    read = ShrpBertConfig.from_dict(written)
    assert read.to_dict() == config.to_dict()
    assert (read.kept_heads, read.routed, read.expert_layers) == (config.kept_heads, config.routed, config.expert_layers)


def test_saved_config_opens_with_auto_config(tmp_path):
    ShrpBertConfig(**SIZES, expert_layers=[1], routed=False, kept_heads=[[0, 1], [2], [0, 1, 2, 3]]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is shrp_hf.ShrpBertConfig
    assert config.kept_heads == [[0, 1], [2], [0, 1, 2, 3]]
    assert not config.routed


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, shrp_hf.ShrpBertForSequenceClassification.from_pretrained])
def test_a_file_of_a_later_format_is_refused_whatever_its_fields_have_become(load, tmp_path):
    ShrpBertConfig(**SIZES).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"format_version": 3, "kept_heads": {"0": "all"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    message = "`format_version` is 3, but this code reads versions up to 2: install a newer shrp_hf."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(tmp_path)


def test_reads_the_config_of_a_stock_checkpoint(tmp_path):
    BertConfig(**SIZES, id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path)
    config = ShrpBertConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.hidden_size, config.id2label[2]) == ("shrp_bert", 32, "c")


def test_heads_removed_by_transformers_4_become_kept_heads(tmp_path):
    fields = BertConfig(**SIZES).to_dict() | {"pruned_heads": {"0": [1, 2], "2": [3]}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = ShrpBertConfig.from_pretrained(tmp_path)
    assert config.kept_heads == [[0, 3], [0, 1, 2, 3], [0, 1, 2]]
    again = ShrpBertConfig.from_dict(json.loads(config.to_json_string()))
    assert again.kept_heads == config.kept_heads


@pytest.mark.parametrize("removed", [{}, None])
def test_no_heads_removed_by_transformers_4(removed):
    assert ShrpBertConfig(**SIZES, pruned_heads=removed).kept_heads is None


def test_format_is_the_lowest_that_can_say_it():
    assert ShrpBertConfig(**SIZES).format_version == 1
    assert ShrpBertConfig(**SIZES, format_version=2, kept_heads=[[0], [1], []]).format_version == 1
    assert ShrpBertConfig(**SIZES, intermediate_sizes=[64, 0, 3]).format_version == 2
    assert ShrpBertConfig(**SIZES, output_bias=True).format_version == 2


def test_distilbert_may_carry_the_name_that_others_give_its_width():
    config = shrp_hf.ShrpDistilBertConfig(hidden_dim=48, intermediate_size=7, intermediate_sizes=[48] * 5 + [1])
    assert [config.num_neurons_of(i) for i in (0, 5)] == [48, 1]


def test_unknown_field_of_somebody_else_is_kept():
    config = ShrpBertConfig(**SIZES, position_embedding_type="absolute", gradient_checkpointing=False, finetuned_by="me")
    assert (config.finetuned_by, config.to_dict()["position_embedding_type"]) == ("me", "absolute")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("expert_layer", "expert_layers"),
        ("pending_layer", "pending_layers"),
        ("kept_head", "kept_heads"),
        ("routd", "routed"),
        ("expert_per_sequence", "experts_per_sequence"),
        ("router_poling", "router_pooling"),
        ("router_aux_loss_coeff", "router_aux_loss_coef"),
        ("format_versions", "format_version"),
        ("intermediate_siz", "intermediate_sizes"),
        ("output_biases", "output_bias"),
    ],
)
def test_field_that_is_nearly_ours_is_refused(typed, meant):
    message = f"Unknown config field `{typed}`: did you mean `{meant}`?"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpBertConfig(**SIZES, **{typed: 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            {"expert_layers": [3]}, "`expert_layers` names layer 3, but the model's layers are 0 to 2.", id="layer too high"
        ),
        pytest.param(
            {"expert_layers": [-1]}, "`expert_layers` names layer -1, but the model's layers are 0 to 2.", id="layer negative"
        ),
        pytest.param({"expert_layers": [1, 1]}, "`expert_layers` names a layer twice: [1, 1].", id="layer twice"),
        pytest.param(
            {"pending_layers": [9]},
            "`pending_layers` names layer 9, but the model's layers are 0 to 2.",
            id="pending too high",
        ),
        pytest.param(
            {"pending_layers": [1], "routed": False},
            "`pending_layers=[1]` contradicts `routed=False`: a layer that is being converted has a router. Finish the "
            "conversion, or set `pending_layers=[]`.",
            id="pending and static",
        ),
        pytest.param(
            {"kept_heads": [[0], [1]]}, "`kept_heads` describes 2 layers, but the model has 3.", id="too few layers kept"
        ),
        pytest.param(
            {"kept_heads": [[0], [4], [1]]},
            "`kept_heads[1]` must be ascending indices from 0 to 3 without repetition, got [4].",
            id="head out of range",
        ),
        pytest.param(
            {"kept_heads": [[2, 0], [1], [1]]},
            "`kept_heads[0]` must be ascending indices from 0 to 3 without repetition, got [2, 0].",
            id="heads unsorted",
        ),
        pytest.param(
            {"kept_heads": [[0], [1], [1, 1]]},
            "`kept_heads[2]` must be ascending indices from 0 to 3 without repetition, got [1, 1].",
            id="head twice",
        ),
        pytest.param(
            {"expert_layers": [1], "kept_heads": [[0], [1], [2]]},
            "`kept_heads[1]` keeps 1 of 4 experts, but layer 1 is routed: a router chooses among all. Set `routed=False`, or "
            "keep them all.",
            id="routed over a part",
        ),
        pytest.param(
            {"expert_layers": [1], "routed": False, "kept_heads": [[0], [], [2]]},
            "`kept_heads[1]` is empty, but expert layer 1 needs at least one expert.",
            id="no expert",
        ),
        pytest.param(
            {"is_decoder": True},
            "`is_decoder=True` is not supported: shrp_hf makes encoders smaller. Set it to False.",
            id="decoder",
        ),
        pytest.param(
            {"add_cross_attention": True},
            "`add_cross_attention=True` is not supported: shrp_hf makes encoders smaller. Set it to False.",
            id="cross-attention",
        ),
        pytest.param({"experts_per_sequence": 0}, "`experts_per_sequence` must be between 1 and 4, got 0.", id="top 0"),
        pytest.param({"experts_per_sequence": 5}, "`experts_per_sequence` must be between 1 and 4, got 5.", id="top 5 of 4"),
        pytest.param(
            {"experts_per_sequence": 6, "num_attention_heads": 8},
            "`experts_per_sequence` must be between 1 and 5, got 6.",
            id="top 6",
        ),
        pytest.param({"router_pooling": "max"}, '`router_pooling` must be "mean" or "cls", got \'max\'.', id="pooling"),
        pytest.param({"router_aux_loss_coef": -1}, "`router_aux_loss_coef` must be 0 or more, got -1.", id="coefficient"),
        pytest.param(
            {"router_aux_loss_coef": float("nan")}, "`router_aux_loss_coef` must be 0 or more, got nan.", id="coefficient nan"
        ),
        pytest.param(
            {"format_version": 3},
            "`format_version` is 3, but this code reads versions up to 2: install a newer shrp_hf.",
            id="newer format",
        ),
        pytest.param(
            {"intermediate_sizes": [64, 64]},
            "`intermediate_sizes` describes 2 layers, but the model has 3.",
            id="widths of other layers",
        ),
        pytest.param(
            {"intermediate_sizes": [64, 65, 0]},
            "`intermediate_sizes[1]` must be from 0 to 64 (`intermediate_size`), got 65.",
            id="too wide",
        ),
        pytest.param(
            {"intermediate_sizes": [64, 1, -1]},
            "`intermediate_sizes[2]` must be from 0 to 64 (`intermediate_size`), got -1.",
            id="width below nothing",
        ),
        pytest.param(
            {"intermediate_sizes": [64, 64, 64], "expert_layers": [1]},
            "`intermediate_sizes[1]` is 64, but layer 1 is an expert layer, which has no FFN: set it to 0.",
            id="width of an expert layer",
        ),
        pytest.param({"format_version": 0}, "`format_version` must be at least 1, got 0.", id="no format"),
        pytest.param(
            {"pruned_heads": {"0": [4]}},
            "`pruned_heads` names heads [4] of layer 0, but the model has 3 layers of 4 heads.",
            id="v4 head out of range",
        ),
        pytest.param(
            {"pruned_heads": {"5": [1]}},
            "`pruned_heads` names heads [1] of layer 5, but the model has 3 layers of 4 heads.",
            id="v4 layer out of range",
        ),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpBertConfig(**(SIZES | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"routed": "yes"},
        {"expert_layers": "12"},
        {"expert_layers": [1.5]},
        {"kept_heads": [1, 2, 3]},
        {"experts_per_sequence": 1.5},
        {"router_aux_loss_coef": "0.1"},
    ],
    ids=str,
)
def test_wrong_type_is_refused_by_field(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        ShrpBertConfig(**SIZES, **fields)


def test_config_of_another_family_is_refused(tmp_path):
    DistilBertConfig().save_pretrained(tmp_path)
    message = (
        f"`{tmp_path}` is a checkpoint of the family `distilbert`, but ShrpBertConfig reads `bert`, `shrp_bert`. Load it "
        "with the class of its own family."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpBertConfig.from_pretrained(tmp_path)
