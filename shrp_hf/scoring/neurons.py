"""Hooks that read FFN neurons while a model runs: their importance in the backward pass, their mean activation."""

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from shrp_hf.families import HeadLayout
from shrp_hf.scoring.stats import HeadStats


class NeuronRecorder:
    """Adds what one batch after the other shows about the neurons to a `HeadStats`.

    The importance of a neuron is |sum over tokens of activation x gradient| of each sample: what a mask on the neuron would
    get as its gradient, without a mask. The gradient passes by in the backward pass; the activation is computed again there
    from what the graph holds anyway, the output of the first FFN matrix, so one layer's are in memory at a time.

    Args:
        layout: The model's neurons.
        stats: What to measure and where to add it.
    """

    def __init__(self, layout: HeadLayout, stats: HeadStats) -> None:
        self.layout = layout
        self.stats = stats
        starts = [0]
        for count in stats.widths:
            starts.append(starts[-1] + count)
        self._rows = {i: slice(starts[i], starts[i + 1]) for i, count in enumerate(stats.widths) if count}
        self._is_recomputable: dict[int, bool] = {}
        self._is_scoring = False
        self._mask: torch.Tensor | None = None
        self._before: dict[int, dict[str, torch.Tensor]] = {}
        self._sums: dict[int, torch.Tensor] = {}
        self._num_samples = 0
        self.leaves: list[torch.Tensor] = []

    def hooks(self) -> Iterator[Any]:
        """Installs the hooks, and yields the handle of each."""
        for layer in self._rows:
            yield self.layout.neurons_out(layer).register_forward_pre_hook(partial(self._read, layer))
            if self.stats.request.neurons and self.layout.layer_map.activation is not None:
                for path in self.layout.layer_map.neuron_paths[:-1]:
                    module = self.layout.layers[layer].get_submodule(path)
                    yield module.register_forward_hook(partial(self._hold, layer, path))

    def begin(self, token_mask: torch.Tensor | None, is_scoring: bool) -> None:
        """Prepares for a forward pass.

        Args:
            token_mask: True for real tokens, shape (batch, length), or None.
            is_scoring: Whether a backward pass will follow.
        """
        self._mask, self._is_scoring = token_mask, is_scoring
        self._before, self._sums, self.leaves = {}, {}, []

    def expect(self, num_samples: int) -> None:
        """Prepares for the backward pass over so many samples."""
        self._num_samples = num_samples

    def end(self, own_mean: torch.Tensor, check: Callable[[str, torch.Tensor], None]) -> None:
        """Adds what the backward pass gave.

        Args:
            own_mean: What makes the gradient of each sample that of its own mean loss, shape (batch,).
            check: Refuses values that are not finite, by name.
        """
        for layer, per_sample in self._sums.items():
            check(f"gradient of layer {layer}", per_sample)
        for layer, per_sample in self._sums.items():
            importance = (per_sample * own_mean.to(per_sample.dtype)[:, None]).abs().sum(dim=0)
            self.stats.sums["neurons"][self._rows[layer]].add_(importance.cpu())
        self.stats.sums["neurons_counts"].add_(int((own_mean > 0).sum()))
        self._before, self._sums, self.leaves = {}, {}, []

    def _hold(self, layer: int, path: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if self._is_scoring:
            self._before.setdefault(layer, {})[path] = output.detach()

    def _read(self, layer: int, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        activation, *rest = inputs  # (batch, length, neurons)
        if self.stats.request.means:
            total = token_sum(activation, self._mask)
            self.stats.sums["neuron_means"][self._rows[layer]].add_(total.cpu())
        if not self._is_scoring:
            return None
        if not activation.requires_grad:  # nothing that learns comes before it
            activation = activation.detach().requires_grad_()
            self.leaves.append(activation)
        activation.register_hook(partial(self._add, layer, self._source(layer, activation.detach())))
        return activation, *rest

    def _source(self, layer: int, activation: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Returns what gives the activation in the backward pass; holds the activation itself only where it has to."""
        before = self._before.pop(layer, None)
        if before is None or self._is_recomputable.get(layer) is False:
            return lambda: activation
        again = partial(self._activated, layer, [part.of(before[part.path], -1) for part in self._parts])
        if layer not in self._is_recomputable:
            self._is_recomputable[layer] = torch.equal(again(), activation)
            return self._source(layer, activation) if not self._is_recomputable[layer] else again
        return again

    @property
    def _parts(self) -> tuple:
        return self.layout.layer_map.neurons_in

    @torch.no_grad()
    def _activated(self, layer: int, before: list[torch.Tensor]) -> torch.Tensor:
        activation = operator.attrgetter(self.layout.layer_map.activation)(self.layout.layers[layer])(before[0])
        return activation * before[1] if len(before) > 1 else activation

    def _add(self, layer: int, source: Callable[[], torch.Tensor], gradient: torch.Tensor) -> None:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        product = source().to(dtype) * gradient.to(dtype)
        per_sample = product.reshape(self._num_samples, -1, product.shape[-1]).sum(dim=1)  # (batch, neurons)
        self._sums[layer] = per_sample + self._sums[layer] if layer in self._sums else per_sample


def token_sum(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Sums values (batch, length, width) over the real tokens: shape (width,)."""
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32)).flatten(0, -2)
    return values.sum(dim=0) if token_mask is None else token_mask.flatten().to(values.dtype) @ values
