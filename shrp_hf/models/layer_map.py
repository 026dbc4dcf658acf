"""Where a family keeps the heads and the FFN neurons of a layer: one value, read by all that scores, cuts or exports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .positions import Placed, disentangled, rotary, shared_bias


@dataclass(frozen=True)
class Part:
    """The rows of one matrix that belong to heads, or to neurons.

    Args:
        path: The module with the matrix, from the layer.
        block: Which one of the equal blocks of rows, from 0: a fused projection holds query, key and value in three.
        blocks: How many blocks there are.
        optional: The config of some models of the family leaves the module out.

    Raises:
        ValueError: There is no such block.
    """

    path: str
    block: int = 0
    blocks: int = 1
    optional: bool = False

    def __post_init__(self) -> None:
        if self.blocks < 1 or not 0 <= self.block < self.blocks:
            raise ValueError(
                f"`block` of {self.path!r} must be one of `blocks`, counted from 0, got block={self.block} of "
                f"blocks={self.blocks}."
            )

    def is_in(self, layer: nn.Module) -> bool:
        """Whether `layer` has this part.

        Raises:
            AttributeError: It must have it, and has not.
        """
        try:
            layer.get_submodule(self.path)
        except AttributeError:
            if not self.optional:
                raise
            return False
        return True

    def of(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Returns this block of a tensor, a view.

        Args:
            tensor: A weight or a bias, or what the module returns.
            dim: Where the blocks lie: 0 in a weight or a bias, -1 in what the module returns.
        """
        width = tensor.shape[dim] // self.blocks
        return tensor.narrow(dim, self.block * width, width)


@dataclass(frozen=True)
class LayerMap:
    """Where a family keeps its heads and neurons; every path but `layers` starts at the layer, `layers` at the base model.

    Args:
        layers: The `ModuleList` of layers.
        attention: The module whose forward attends.
        heads_in: Query, key and value, in this order, then whatever else has rows for each head; head h owns rows
            h * head_size onwards of each.
        heads_out: The output projection W_O; head h owns columns h * head_size onwards.
        neurons_in: The first FFN matrix, one row per neuron; two where both share an index (GLU), the one that goes through
            the activation first.
        neurons_out: The second FFN matrix, one column per neuron.
        ffn_width: The field of the config with the neurons of a whole FFN.
        activation: What makes a neuron's activation of its row's output (of the first, times the second, in a GLU). Known, it
            is computed again where scoring needs it; None: what it made is held from the forward to the backward pass.
        head_count: The attribute of the attention module that holds its number of heads; None where it has none.
        head_width: The attribute that holds heads times head size; None where it has none.
        head_bias: The argument of the attention's forward that holds a bias (batch, heads, ...) for all heads of the
            unpruned model, of which a layer takes those of its own; None where there is none.
        after_heads: Modules inside the attention module through which the output of W_O goes next.
        residual_norm: A norm inside the attention module that comes last, of what came so far plus the attention's input.
        is_plain: Attention is softmax(query key / sqrt(head size)) with a padding mask and nothing else: no rotation, no
            bias, no window. Then the export writes it as one operator.
        norm_before: The norm through which a layer's input reaches its attention (pre-norm); None: it comes as it is
            (post-norm). An expert layer keeps it.
        positions: How positions reach an expert's scores (`positions.py`); None: they are in the hidden states alone.
        position_modules: Modules inside the attention module that positions go through, beside what is in `heads_in`.
        returns_maps: A layer returns (hidden states, attention map) instead of hidden states.
        hidden_dropout: The field of the config with the dropout of what a layer adds.
        attention_dropout: The field of the config with the dropout of attention weights.
    """

    layers: str
    attention: str
    heads_in: tuple[Part, ...]
    heads_out: str
    neurons_in: tuple[Part, ...]
    neurons_out: str
    ffn_width: str = "intermediate_size"
    activation: str | None = None
    head_count: str | None = "num_attention_heads"
    head_width: str | None = None
    head_bias: str | None = None
    after_heads: tuple[str, ...] = ()
    residual_norm: str | None = None
    is_plain: bool = False
    norm_before: str | None = None
    positions: Callable[..., Placed] | None = None
    position_modules: tuple[str, ...] = ()
    returns_maps: bool = False
    hidden_dropout: str = "hidden_dropout_prob"
    attention_dropout: str = "attention_probs_dropout_prob"

    @property
    def output_is_inside(self) -> bool:
        """Whether the attention module holds W_O."""
        return self.heads_out.startswith(f"{self.attention}.")

    @property
    def head_paths(self) -> tuple[str, ...]:
        """Every matrix with heads, each once, W_O last."""
        return (*dict.fromkeys(part.path for part in self.heads_in), self.heads_out)

    @property
    def neuron_paths(self) -> tuple[str, ...]:
        """Every matrix with neurons, each once, the second FFN matrix last."""
        return (*dict.fromkeys(part.path for part in self.neurons_in), self.neurons_out)


def row_index(parts: Sequence[Part], path: str, num_rows: int, index: torch.Tensor) -> torch.Tensor:
    """Returns the rows of the matrix at `path` that are those at `index` of each block in `parts`, and all of the others.

    Args:
        parts: Parts of one or several matrices.
        path: Which matrix.
        num_rows: Rows that it has.
        index: Rows within a block, shape (kept,).
    """
    own = [part for part in parts if part.path == path]
    width, named = num_rows // own[0].blocks, {part.block for part in own}
    blocks = (index if block in named else torch.arange(width) for block in range(own[0].blocks))
    return torch.cat([rows + block * width for block, rows in enumerate(blocks)])


BERT_LAYER_MAP = LayerMap(
    layers="encoder.layer",
    attention="attention.self",
    heads_in=(Part("attention.self.query"), Part("attention.self.key"), Part("attention.self.value")),
    heads_out="attention.output.dense",
    neurons_in=(Part("intermediate.dense"),),
    neurons_out="output.dense",
    activation="intermediate.intermediate_act_fn",
    head_width="all_head_size",
    is_plain=True,
)
"""Also RoBERTa's and ELECTRA's."""

DISTILBERT_LAYER_MAP = LayerMap(
    layers="transformer.layer",
    attention="attention",
    heads_in=(Part("attention.q_lin"), Part("attention.k_lin"), Part("attention.v_lin")),
    heads_out="attention.out_lin",
    neurons_in=(Part("ffn.lin1"),),
    neurons_out="ffn.lin2",
    ffn_width="hidden_dim",
    activation="ffn.activation",
    head_count="n_heads",
    is_plain=True,
    hidden_dropout="dropout",
    attention_dropout="attention_dropout",
)

VIT_LAYER_MAP = LayerMap(
    layers="layers",
    attention="attention",
    heads_in=(Part("attention.q_proj"), Part("attention.k_proj"), Part("attention.v_proj")),
    heads_out="attention.o_proj",
    neurons_in=(Part("mlp.fc1"),),
    neurons_out="mlp.fc2",
    activation="mlp.activation_fn",
    is_plain=True,
    norm_before="layernorm_before",
)

MPNET_LAYER_MAP = LayerMap(
    layers="encoder.layer",
    attention="attention.attn",
    heads_in=(Part("attention.attn.q"), Part("attention.attn.k"), Part("attention.attn.v")),
    heads_out="attention.attn.o",
    neurons_in=(Part("intermediate.dense"),),
    neurons_out="output.dense",
    activation="intermediate.intermediate_act_fn",
    head_width="all_head_size",
    head_bias="position_bias",
    positions=shared_bias,
    returns_maps=True,
)

DEBERTA_V2_LAYER_MAP = LayerMap(
    layers="encoder.layer",
    attention="attention.self",
    heads_in=(
        Part("attention.self.query_proj"),
        Part("attention.self.key_proj"),
        Part("attention.self.value_proj"),
        Part("attention.self.pos_key_proj", optional=True),
        Part("attention.self.pos_query_proj", optional=True),
    ),
    heads_out="attention.output.dense",
    neurons_in=(Part("intermediate.dense"),),
    neurons_out="output.dense",
    activation="intermediate.intermediate_act_fn",
    head_width="all_head_size",
    positions=disentangled,
    position_modules=("attention.self.pos_dropout",),
    returns_maps=True,
)
"""Also v3's, which shares the projections of query and key with the positions."""

MODERNBERT_LAYER_MAP = LayerMap(
    layers="layers",
    attention="attn",
    heads_in=(Part("attn.Wqkv", 0, 3), Part("attn.Wqkv", 1, 3), Part("attn.Wqkv", 2, 3)),
    heads_out="attn.Wo",
    neurons_in=(Part("mlp.Wi", 0, 2), Part("mlp.Wi", 1, 2)),
    neurons_out="mlp.Wo",
    activation="mlp.act",
    head_count=None,
    after_heads=("attn.out_drop",),
    norm_before="attn_norm",
    positions=rotary,
    hidden_dropout="mlp_dropout",
    attention_dropout="attention_dropout",
)

NOMIC_BERT_LAYER_MAP = LayerMap(
    layers="layers",
    attention="self_attn",
    heads_in=(Part("self_attn.q_proj"), Part("self_attn.k_proj"), Part("self_attn.v_proj")),
    heads_out="self_attn.o_proj",
    neurons_in=(Part("mlp.gate_proj"), Part("mlp.up_proj")),
    neurons_out="mlp.down_proj",
    activation="mlp.act_fn",
    head_count=None,
    positions=rotary,
)
