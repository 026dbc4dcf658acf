"""Tiny models and batches, built from configs: every weight drawn at random, so that none hides behind a zero."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.numerics import ROUNDINGS, rounding_bound

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def randomize_(model: nn.Module, std: float = 0.15, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def tiny_bert(head: type = BertForSequenceClassification, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    """A stock BERT, in evaluation mode."""
    attention, seed = fields.pop("attn_implementation", "sdpa"), fields.pop("seed", 7)
    config = BertConfig(**(SIZES | fields | ({"num_labels": 2} if "QuestionAnswering" in head.__name__ else {})))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = head._from_config(config, attn_implementation=attention)
    randomize_(model, seed=seed)
    return model.to(dtype).eval()


def tiny_routed(
    expert_layers: int | Iterable[int] = 2, head: type = ShrpBertForSequenceClassification, **fields
) -> PreTrainedModel:
    """A Shrp BERT with these layers converted, in evaluation mode."""
    stock = next(base for base in head.__mro__ if base.__name__ == head.__name__.removeprefix("Shrp"))
    router = {k: fields.pop(k) for k in ("experts_per_sequence", "router_pooling") if k in fields}
    model = head.from_stock(tiny_bert(stock, **fields))
    for name, value in router.items():
        setattr(model.config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        model.convert_layers_(expert_layers if isinstance(expert_layers, int) else list(expert_layers))
    randomize_(model)
    return model


def force_experts_(model: PreTrainedModel, layer: int, experts: Iterable[int]) -> None:
    """Makes the router of this layer choose these experts, whatever it reads."""
    router = model.layers[layer].router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.fill_(-50.0)
        for rank, expert in enumerate(experts):
            router.bias[expert] = 50.0 - rank * 1e-3


def batch(padding: str | None = "right", size: int = 5, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids and, unless `padding` is None, a mask that pads two sequences on that side."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(1, 99, (size, length), generator=generator)}
    if padding is None:
        return inputs
    mask = torch.ones(size, length, dtype=torch.long)
    for row, real in ((1, 4), (2, 1)):
        mask[row, slice(real, None) if padding == "right" else slice(None, length - real)] = 0
    return inputs | {"attention_mask": mask}


def examples(count: int = 64, length: int = 9, seed: int = 1) -> list[dict]:
    """A training set: which half of the vocabulary is the first token from?"""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 99, (count, length), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0] > 50)} for row in rows]


def assert_near(ours: Any, reference: Any, dtype: torch.dtype = torch.float32, roundings: int = ROUNDINGS) -> None:
    """Nothing but rounding in `dtype` tells `ours` from the reference, on any processor."""
    ours, reference = (torch.as_tensor(values).detach().double() for values in (ours, reference))
    torch.testing.assert_close(ours, reference, rtol=0, atol=rounding_bound(float(reference.abs().max()), dtype, roundings))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
