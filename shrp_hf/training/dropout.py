"""Dropout of a model while it trains, whatever its config says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shrp_hf.families import head_layout

_ATTRIBUTES = ("dropout", "dropout_prob", "attention_dropout")


@contextmanager
def dropout_rates(
    model: Any, *, hidden: float | None = None, attention: float | None = None, classifier: float | None = None
) -> Iterator[None]:
    """Sets the dropout of a model for as long as the context lasts; its config keeps what it says.

    Args:
        model: A model of a family that `shrp_hf.families` knows.
        hidden: Of embeddings and of what the layers add; None: as it is.
        attention: Of the attention weights.
        classifier: Of everything behind the base model, such as the pooled state before a classifier.

    Raises:
        ValueError: The family is not known.
    """
    rates = {"hidden": hidden, "attention": attention, "classifier": classifier}
    before: list[tuple[nn.Module, str, float]] = []
    if any(rate is not None for rate in rates.values()):
        for kind, module, name in _places(model):
            if rates[kind] is not None:
                before.append((module, name, getattr(module, name)))
                setattr(module, name, rates[kind])
    try:
        yield
    finally:
        for module, name, rate in before:
            setattr(module, name, rate)


def _places(model: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields what kind of dropout it is, the module and the name of the rate, for all that the model has."""
    layout = head_layout(model)
    attention = [layout.attention(layer) for layer in range(layout.num_layers)]
    of_weights = {id(child) for module in attention for child in module.children() if isinstance(child, nn.Dropout)}
    for module in attention:
        yield from (("attention", module, name) for name in _ATTRIBUTES if isinstance(vars(module).get(name), float))
    base = {id(module) for module in model.base_model.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Dropout) or "lora_" in name:
            continue
        kind = "attention" if id(module) in of_weights else "hidden" if id(module) in base else "classifier"
        yield kind, module, "p"
