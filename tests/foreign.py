"""Models of families that cannot be pruned, each with the whole message that says so."""

import transformers
from transformers import PreTrainedModel

TINY = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 40}
FOREIGN = {
    "deberta-v2": ("DebertaV2", TINY, " (its attention modules also hold relative-position projections per head)"),
    "mpnet": ("MPNet", TINY, " (all its layers share one position bias sized for all heads)"),
    "albert": ("Albert", TINY, " (all its layers share one set of heads, so one cut would cut every layer)"),
    "modernbert": ("ModernBert", TINY | {"pad_token_id": 0}, " (its query, key and value are fused in one projection)"),
    "gpt2": ("GPT2", {"n_embd": 16, "n_head": 4, "n_layer": 1, "vocab_size": 40}, ""),
}


def foreign_model(family: str) -> PreTrainedModel:
    name, fields, _ = FOREIGN[family]
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields))


def refusal(family: str) -> str:
    return (
        f"`model` is of type '{family}', and no layer map says where its heads and neurons are{FOREIGN[family][2]}. "
        "Supported: bert, camembert, distilbert, electra, roberta, vit, xlm-roberta. Teach shrp_hf another family by "
        f"`shrp_hf.register_family('{family}', LayerMap(...))`; see docs/how-to/add-a-family.md."
    )
