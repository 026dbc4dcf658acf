"""A family that neither Transformers nor shrp_hf knows: pre-norm, fused projections, a gated FFN, no biases."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from shrp_hf import LayerMap, Part, families, register_family
from shrp_hf.models.configuration_shrp import ShrpConfigFields
from shrp_hf.models.modeling_shrp import ShrpBaseMixin

TOY = LayerMap(
    layers="blocks",
    attention="mixer",
    heads_in=tuple(Part("mixer.qkv", block, 3) for block in range(3)),
    heads_out="mixer.out",
    neurons_in=(Part("up", 0, 2), Part("up", 1, 2)),
    neurons_out="down",
    ffn_width="width",
    activation="gate",
    head_count=None,
    head_bias="bias",
    after_heads=("mixer.scale",),
)


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    vocab_size: int = 50
    hidden_size: int = 16
    num_attention_heads: int = 4
    num_hidden_layers: int = 3
    width: int = 24
    num_labels: int = 3


class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.scale = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, mask, bias):
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) + bias  # (batch, heads, length, length)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        return self.scale(self.out((weights @ value).transpose(1, 2).flatten(2))), weights


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.mixer = Mixer(config)
        self.up = nn.Linear(config.hidden_size, 2 * config.width, bias=False)
        self.down = nn.Linear(config.width, config.hidden_size, bias=False)
        self.gate = nn.SiLU()

    def forward(self, hidden_states, mask, bias):
        hidden_states = hidden_states + self.mixer(self.norm(hidden_states), mask, bias)[0]
        gated, linear = self.up(self.second_norm(hidden_states)).chunk(2, dim=-1)
        return hidden_states + self.down(self.gate(gated) * linear)


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    _no_split_modules: ClassVar[list[str]] = ["Block"]


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.distances = nn.Parameter(torch.randn(config.num_attention_heads))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden_states = self.embeddings(input_ids)
        place = torch.arange(input_ids.shape[1])
        bias = self.distances[None, :, None, None] * (place[:, None] - place).abs()  # (1, all heads, length, length)
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask, bias)
        return BaseModelOutput(last_hidden_state=hidden_states)


class ToyForSequenceClassification(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.classifier(self.toy(input_ids, attention_mask).last_hidden_state.mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class ToyToo(ToyConfig):
    model_type = "toy-too"


class ToyTooModel(ToyModel):
    config_class = ToyToo


@strict
class ShrpToyTooConfig(ShrpConfigFields, ToyToo):
    model_type = "shrp_toy-too"
    stock_model_types: ClassVar[tuple[str, ...]] = ("toy-too",)
    has_expert_layers: ClassVar[bool] = False
    layer_map: ClassVar[LayerMap] = TOY


class ShrpToyTooModel(ShrpBaseMixin, ToyTooModel):
    """A Shrp class in a file, written by hand."""

    config_class = ShrpToyTooConfig
    auto_classes: ClassVar[dict[str, str]] = {"AutoModel": "toy_family.ShrpToyTooModel"}


def register():
    return register_family("toy", TOY, config_class=ToyConfig, model_classes=[ToyModel, ToyForSequenceClassification])


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """What is registered in the block is known in it only."""
    tables = (families._FAMILIES, families.REGISTERED, CONFIG_MAPPING._extra_content)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
