"""A BERT or MPNet in a few lines of plain torch, with thin and expert layers, whose training steps fit into CUDA graphs."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

EXPANDER_GAIN = 0.1  # as in `shrp_hf.models.expert_layer`


@dataclass(frozen=True)
class Dropout:
    """Dropout of the hidden states, of the attention weights, and before the classifier."""

    hidden: float = 0.0
    attention: float = 0.0
    pooler: float = 0.0


class OrdinaryLayer(nn.Module):
    """BERT's layer with any number of heads and neurons."""

    def __init__(self, width: int, heads: torch.Tensor, head_size: int, neurons: int, eps: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.register_buffer("heads", heads, persistent=False)
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(width, len(heads) * head_size))
        self.attended = nn.Linear(len(heads) * head_size, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, neurons), nn.Linear(neurons, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.watched: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, mask: torch.Tensor, dropout: Dropout) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (batch, length, width) to the same shape, and the values of the attention."""
        context, values = attend(self, x, mask, dropout)
        x = self.attention_norm(x + functional.dropout(self.attended(context), dropout.hidden, self.training))
        inner = functional.gelu(self.up(x))
        if self.watched is not None:
            self.watched += [context, inner]
        return self.norm(x + functional.dropout(self.down(inner), dropout.hidden, self.training)), values


class ExpertLayer(nn.Module):
    """SHRP's layer after pruning: one head and the expander."""

    def __init__(self, width: int, heads: torch.Tensor, head_size: int, eps: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.register_buffer("heads", heads, persistent=False)
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(width, head_size))
        self.expander = nn.Linear(head_size, width)
        self.expander_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, dropout: Dropout) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (batch, length, width) to the same shape, and the values of the attention."""
        context, values = attend(self, x, mask, dropout)
        update = self.expander_norm(functional.gelu(self.expander(context)))
        return x + functional.dropout(update, dropout.hidden, self.training), values


def attend(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor, dropout: Dropout) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the heads of a layer, shape (batch, length, heads * head size), and its values."""
    projected = [layer.query(x), layer.key(x), layer.value(x)]
    query, key, value = (part.view(*x.shape[:2], -1, layer.head_size).transpose(1, 2) for part in projected)
    rate = dropout.attention if layer.training else 0.0
    if mask.is_floating_point():  # of every head of the dense model
        mask = mask[:, layer.heads]
    context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
    return context.transpose(1, 2).flatten(2), projected[2]


class Encoder(nn.Module):
    """Embeddings, layers, pooler and classifier.

    Args:
        weights: State dict of a stock BERT, its names beginning with `embeddings.`, `encoder.` and `pooler.`; with
            `encoder.relative_attention_bias.weight`, of an MPNet in BERT's names (its positions are then not trained).
        num_labels: Columns of the logits.
        head_size: Width of a head.
        eps: Of the LayerNorms.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], num_labels: int, head_size: int = 32, eps: float = 1e-12) -> None:
        super().__init__()
        self.register_buffer("bias", weights.get("encoder.relative_attention_bias.weight"))
        tables = [weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
        self.word, self.position, self.token_type = (nn.Embedding.from_pretrained(table, freeze=False) for table in tables)
        width = tables[0].shape[1]
        self.embedding_norm = nn.LayerNorm(width, eps=eps)
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.embedding_norm.load_state_dict(_part(weights, "embeddings.LayerNorm."))
        self.pooler.load_state_dict(_part(weights, "pooler.dense."))
        self.layers, self.before = nn.ModuleList(), nn.ModuleList()
        self.num_waiting = 0  # the first layers that still run as `before` has them
        while (prefix := f"encoder.layer.{len(self.layers)}.") + "output.dense.weight" in weights:
            neurons = weights[prefix + "intermediate.dense.weight"].shape[0]
            heads = torch.arange(width // head_size)
            self.layers.append(OrdinaryLayer(width, heads, head_size, neurons, eps))
            for name, stock in _STOCK_NAMES.items():
                getattr(self.layers[-1], name).load_state_dict(_part(weights, f"{prefix}{stock}."))

    def forward(
        self, ids: torch.Tensor, types: torch.Tensor, mask: torch.Tensor, dropout: Dropout
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Maps ids, types and mask (batch, length) to logits, hidden states (embeddings first) and values of each layer."""
        x = self.word(ids) + self.position.weight[: ids.shape[1]] + self.token_type(types)
        x = functional.dropout(self.embedding_norm(x), dropout.hidden, self.training)
        hidden, values, mask = [x], [], self._mask(mask)
        for layer in (*self.before[: self.num_waiting], *self.layers[self.num_waiting :]):
            x, value = layer(x, mask, dropout)
            hidden.append(x)
            values.append(value)
        pooled = functional.dropout(torch.tanh(self.pooler(x[:, 0])), dropout.pooler, self.training)
        return self.classifier(pooled), hidden, values

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """What attention may see, (batch, 1, 1, length), or with MPNet's bias of positions, (batch, heads, length, length)."""
        if self.bias is None:
            return mask[:, None, None, :]
        places = torch.arange(mask.shape[1], device=mask.device)
        bias = self.bias[_bucket(places[None, :] - places[:, None], len(self.bias))].permute(2, 0, 1)
        return bias[None].masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)


def _bucket(distance: torch.Tensor, buckets: int) -> torch.Tensor:
    """T5's buckets of relative positions: half for each direction, half of each exact, the rest by the logarithm up to 128."""
    half = buckets // 2
    exact, far = half // 2, distance.abs()
    share = (far.clamp(min=1) / exact).log() / math.log(128 / exact)
    logarithmic = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(far < exact, far, logarithmic)


_STOCK_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def _part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@dataclass
class Scores:
    """What the layers of a dense model are cut by.

    Args:
        heads: Importance, shape (layers, heads).
        neurons: The same, (layers, neurons).
        contexts: Mean output of the heads over real tokens, (layers, heads * head size).
        inner: Mean activation of the neurons, (layers, neurons).
    """

    heads: torch.Tensor
    neurons: torch.Tensor
    contexts: torch.Tensor
    inner: torch.Tensor


def score(model: Encoder, batches: Sequence[Mapping[str, torch.Tensor]], loss_of: object) -> Scores:
    """Scores heads and neurons: mean over samples of |sum over tokens of activation x gradient|."""
    model.eval()
    sums: list[list[torch.Tensor]] = [[] for _ in range(4)]
    size = model.layers[0].head_size
    tokens = sum(int(batch["mask"].sum()) for batch in batches)
    for batch in batches:
        for layer in model.layers:
            layer.watched = []
        logits, _, _ = model(batch["ids"], batch["types"], batch["mask"], Dropout())
        watched = [layer.watched for layer in model.layers]
        flat = [tensor for pair in watched for tensor in pair]
        grads = torch.autograd.grad(loss_of(logits, batch["labels"]).sum(), flat)
        products = [(tensor * grad).sum(dim=1) for tensor, grad in zip(flat, grads, strict=True)]
        heads = [product.unflatten(1, (-1, size)).sum(dim=-1).abs().sum(dim=0) for product in products[::2]]
        sums[0].append(torch.stack(heads))
        sums[1].append(torch.stack([product.abs().sum(dim=0) for product in products[1::2]]))
        for place, parts in ((2, flat[::2]), (3, flat[1::2])):
            sums[place].append(torch.stack([(part.detach() * batch["mask"][..., None]).sum(dim=(0, 1)) for part in parts]))
    for layer in model.layers:
        layer.watched = None
    heads, neurons, contexts, inner = (sum(parts).detach() for parts in sums)
    return Scores(heads, neurons, contexts / tokens, inner / tokens)


def layers_of(structure: str) -> list[str]:
    """What each layer becomes.

    "1:whole,5:expert" is one as it was and five experts; "6:3x240", six of 3 heads and 240 neurons; "none", one that goes.
    """
    parts = [part.split(":") for part in structure.split(",")]
    return [kind for count, kind in parts for _ in range(int(count))]


@torch.no_grad()
def student_of(dense: Encoder, structure: str, scores: Scores, *, warm: bool = True, stepwise: bool = False) -> Encoder:
    """A smaller copy of `dense`.

    Args:
        dense: The dense model.
        structure: "dense", or see `layers_of`.
        scores: What it is cut by.
        warm: Whether expanders start from W_O, and what is cut leaves its mean contribution in the bias.
        stepwise: Keep the dense layers beside, to run as those at first.
    """
    student = copy.deepcopy(dense)
    if structure == "dense":
        return student
    if stepwise:
        student.before = copy.deepcopy(student.layers)
        student.num_waiting = len(student.layers)
    layers = []
    for i, (layer, kind) in enumerate(zip(dense.layers, layers_of(structure), strict=True)):
        if kind == "whole":
            layers.append(student.layers[i])
        elif kind == "expert":
            layers.append(_expert(layer, int(scores.heads[i].argmax()), warm))
        elif kind != "none":
            counts = [int(count) for count in kind.split("x")]
            best = (s[i].topk(k).indices.sort().values for s, k in zip((scores.heads, scores.neurons), counts, strict=True))
            layers.append(_thin(layer, *best, scores.contexts[i], scores.inner[i], warm))
    student.layers = nn.ModuleList(layers)
    return student.to(dense.word.weight.device)


def _expert(layer: OrdinaryLayer, head: int, warm: bool) -> ExpertLayer:
    width, size = layer.attended.out_features, layer.head_size
    small = ExpertLayer(width, layer.heads[[head]], size, layer.norm.eps).to(layer.up.weight.device, layer.up.weight.dtype)
    rows = slice(head * size, (head + 1) * size)
    for name in ("query", "key", "value"):
        getattr(small, name).weight.copy_(getattr(layer, name).weight[rows])
        getattr(small, name).bias.copy_(getattr(layer, name).bias[rows])
    small.expander_norm.weight.fill_(EXPANDER_GAIN)
    if warm:
        slices = layer.attended.weight.view(width, -1, size)
        small.expander.weight.copy_(slices.mean(dim=1) * slices.shape[1] ** 0.5)
        small.expander.bias.zero_()
    return small


def _thin(
    layer: OrdinaryLayer, heads: torch.Tensor, neurons: torch.Tensor, context: torch.Tensor, inner: torch.Tensor, warm: bool
) -> OrdinaryLayer:
    size = layer.head_size
    small = OrdinaryLayer(layer.up.in_features, layer.heads[heads], size, len(neurons), layer.norm.eps)
    small = small.to(inner.device, inner.dtype)
    rows = (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
    for name, kept in (("query", rows), ("key", rows), ("value", rows), ("up", neurons)):
        getattr(small, name).weight.copy_(getattr(layer, name).weight[kept])
        getattr(small, name).bias.copy_(getattr(layer, name).bias[kept])
    for name, kept, mean in (("attended", rows, context), ("down", neurons, inner)):
        full, part = getattr(layer, name), getattr(small, name)
        part.weight.copy_(full.weight[:, kept])
        part.bias.copy_(full.bias)
        if warm:
            cut = mean.clone()
            cut[kept] = 0.0
            part.bias.add_(full.weight @ cut)
    for name in ("attention_norm", "norm"):
        getattr(small, name).load_state_dict(getattr(layer, name).state_dict())
    return small
