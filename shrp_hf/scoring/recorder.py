"""Hooks that read heads while a model runs: no model code changes, and nothing is kept longer than one layer."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from shrp_hf.families import HeadLayout
from shrp_hf.scoring.neurons import NeuronRecorder, token_sum
from shrp_hf.scoring.stats import FIXED_POINT, MAX_CLASS_SAMPLES, HeadStats


def resize_weights(token_mask: torch.Tensor, size: int) -> torch.Tensor:
    """Matrices R that crop an attention map A to the real tokens and resize it bilinearly: R A R^T.

    Bilinear resizing (align_corners=False, no antialiasing) is separable, so one pair of matrix products serves
    samples of all lengths, whichever side the padding is on.

    Args:
        token_mask: True for real tokens, shape (batch, length); at least one per sample.
        size: Side B of the result.

    Returns:
        Shape (batch, B, length), float32.
    """
    count = token_mask.sum(dim=1, keepdim=True)  # (batch, 1)
    target = torch.arange(size, device=token_mask.device)
    source = ((target + 0.5) * (count / size) - 0.5).clamp_min(0)  # (batch, B), in real tokens
    lower = source.long()
    upper = torch.minimum(lower + 1, count - 1)
    weight = (source - lower).unsqueeze(-1)
    position = token_mask.logical_not().sort(dim=1, stable=True).indices  # real tokens first, in order
    matrices = torch.zeros(*source.shape, token_mask.shape[1], device=token_mask.device)
    matrices.scatter_add_(2, position.gather(1, lower).unsqueeze(-1), 1 - weight)
    matrices.scatter_add_(2, position.gather(1, upper).unsqueeze(-1), weight)
    return matrices


def attention_entropy(attention: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """AE = sum over real queries of H(attention) / (n log n), in [0, 1]; 0 for a single token (arXiv 2510.13832).

    Args:
        attention: Shape (batch, heads, length, length).
        token_mask: True for real tokens, shape (batch, length); padding counts neither as query nor as key.

    Returns:
        Shape (batch, heads).
    """
    batch, heads, length, _ = attention.shape
    real = token_mask.to(attention.dtype)
    per_query = torch.bmm(torch.special.entr(attention).view(batch, heads * length, length), real.unsqueeze(2))
    total = torch.bmm(per_query.view(batch, heads, length), real.unsqueeze(2)).squeeze(2)
    count = token_mask.sum(dim=1, keepdim=True)
    return total / (count * count.log()).clamp_min(math.log(2))  # a single token has entropy 0 already


def _ask_for_map(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of attention that returns its map only when asked: MPNet's, DeBERTa's.

    The model itself is not asked, so it does not gather the maps of all layers.
    """
    position = list(inspect.signature(module.forward).parameters).index("output_attentions")
    if len(args) > position:
        return (*args[:position], True, *args[position + 1 :]), kwargs
    return args, kwargs | {"output_attentions": True}


class HeadRecorder:
    """Adds what one batch after the other shows about the heads to a `HeadStats`.

    Args:
        layout: The model's heads.
        stats: What to measure and where to add it.
    """

    def __init__(self, layout: HeadLayout, stats: HeadStats) -> None:
        self.layout = layout
        self.stats = stats
        starts = [0]
        for heads in stats.scored:
            starts.append(starts[-1] + len(heads))
        self._rows = {i: slice(starts[i], starts[i + 1]) for i, heads in enumerate(stats.scored) if heads}
        self._batch_index = -1
        self._targets: Sequence[str] = ()
        self._token_mask: torch.Tensor | None = None
        self._labels: torch.Tensor | None = None
        self._resize: torch.Tensor | None = None
        self._masks: dict[int, torch.Tensor] = {}
        self._layers_seen: set[int] = set()
        self._neurons = NeuronRecorder(layout, stats)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Installs the hooks for as long as the context lasts."""
        handles = []
        try:
            for layer in self._rows:
                handles.append(self.layout.output(layer).register_forward_pre_hook(partial(self._read_heads, layer)))
                if self.stats.request.needs_attention_maps:
                    attention = self.layout.attention(layer)
                    handles.append(attention.register_forward_hook(partial(self._read_map, layer)))
                    if "output_attentions" in inspect.signature(attention.forward).parameters:
                        handles.append(attention.register_forward_pre_hook(_ask_for_map, with_kwargs=True))
            handles.extend(self._neurons.hooks())
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, index: int, batch: Mapping[str, torch.Tensor], targets: Sequence[str]) -> None:
        """Prepares for a forward pass of `batch`.

        Args:
            index: Number of the batch, for messages.
            batch: The model's inputs.
            targets: Where its importance is to be added: "importance", "salience", "neurons", or none without a gradient.

        Raises:
            ValueError: The attention mask is not (batch, length) with a real token in every sample.
        """
        self._batch_index, self._targets = index, targets
        self._labels, self._token_mask, self._resize, self._masks = batch.get("labels"), None, None, {}
        self._layers_seen = set()
        mask = batch.get("attention_mask")
        if mask is not None:
            self._set_token_mask(mask, batch)
        self._neurons.begin(self._token_mask, "neurons" in targets)

    def _set_token_mask(self, mask: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        index = self._batch_index
        tokens = batch.get("input_ids", mask)
        if mask.shape != tokens.shape:
            raise ValueError(
                f"`attention_mask` of batch {index} has shape {tuple(mask.shape)}, but the tokens have "
                f"{tuple(tokens.shape)}: give one value per token."
            )
        self._token_mask = mask.flatten(0, -2) != 0  # multiple choice: (batch, choices, length)
        if not self._token_mask.any(dim=1).all():
            raise ValueError(f"Batch {index} holds a sample without any real token: leave it out.")

    def end(self, loss: torch.Tensor | None, batch_size: int) -> None:
        """Checks what was read of the batch just run and adds its importance, if there are targets for it.

        The loss is the mean over its terms (samples, or labelled tokens: labels other than -100), so the gradient of
        each sample's own mean loss follows from a single backward pass.

        Args:
            loss: The model's loss, with gradient.
            batch_size: Number of samples.

        Raises:
            ValueError: There is no loss, a gradient is not finite, or attention maps came back empty.
        """
        silent = sorted(self._rows.keys() - self._layers_seen) if self.stats.request.needs_attention_maps else []
        if silent:
            raise ValueError(
                f"Layers {silent} gave no attention maps for batch {self._batch_index}, though attention is eager: "
                "their class does not follow it. Load the model with attn_implementation='eager'."
            )
        if not self._targets:
            return
        if loss is None:
            raise ValueError(
                f"Batch {self._batch_index} gives no loss: importance needs `labels`, and a model with a task head."
            )
        self._add_importance(loss, batch_size)

    def _add_importance(self, loss: torch.Tensor, batch_size: int) -> None:
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        terms = loss.new_ones(batch_size)  # the mean is over so many terms of each sample
        if self._labels is not None and not self._labels.is_floating_point():
            terms = (self._labels != -100).reshape(batch_size, -1).sum(dim=1).to(loss.dtype)
        own_mean = torch.where(terms > 0, 1 / terms.clamp_min(1), 0)
        masks = list(self._masks.values())
        self._neurons.expect(batch_size)
        gradients = torch.autograd.grad(
            loss * terms.sum(), [*masks, *self._neurons.leaves], allow_unused=True, materialize_grads=True
        )
        if masks:
            self._add_head_importance(gradients[: len(masks)], terms, own_mean)
        if "neurons" in self._targets:
            self._neurons.end(own_mean, self._check_finite)
        self._masks = {}

    def _add_head_importance(self, gradients: Sequence[torch.Tensor], terms: torch.Tensor, own_mean: torch.Tensor) -> None:
        per_token = torch.cat([gradient.squeeze(-1) for gradient in gradients], dim=-1)  # (batch, length, rows)
        # Padding is not left out: with padding on the left BERT's pooler reads a padded position.
        num_tokens = per_token.shape[:2].numel() if self._token_mask is None else int(self._token_mask.sum())
        per_token = per_token.reshape(len(terms), -1, per_token.shape[-1])  # choices of a sample side by side
        per_sample = per_token.sum(dim=1)  # (batch, rows)
        for layer, rows in self._rows.items():
            self._check_finite(f"gradient of layer {layer}", per_sample[:, rows])
        own_mean = own_mean.to(per_token.dtype)
        sums = (
            (per_sample * own_mean[:, None]).abs().sum(dim=0),
            (per_token * own_mean[:, None, None]).abs().sum(dim=(0, 1)),
            (per_sample.sum(dim=0) / terms.sum()).abs(),
        )
        counts = torch.tensor([int((terms > 0).sum()), num_tokens, 1], dtype=torch.float64)
        for target in set(self._targets) - {"neurons"}:
            self.stats.sums[target].add_(torch.stack(sums).cpu())
            self.stats.sums[f"{target}_counts"].add_(counts)

    def _read_heads(self, layer: int, module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Multiplies the input of an output projection by a mask of ones that collects the gradient; adds its mean."""
        context = inputs[0]  # (batch, length, heads * head_size)
        if self.stats.request.means:
            self._add_head_means(layer, context)
        if not set(self._targets) - {"neurons"}:
            return None
        dtype = torch.promote_types(context.dtype, torch.float32)
        num_heads = len(self.stats.scored[layer])
        mask = torch.ones(*context.shape[:2], num_heads, 1, dtype=dtype, device=context.device, requires_grad=True)
        self._masks[layer] = mask
        heads = context.unflatten(-1, (num_heads, -1)).to(dtype)
        return ((heads * mask).flatten(-2).to(context.dtype),)

    def _add_head_means(self, layer: int, context: torch.Tensor) -> None:
        size = self.stats.head_size
        rows = slice(self._rows[layer].start * size, self._rows[layer].stop * size)
        self._check_mask(f"the head outputs of layer {layer}", context)
        self.stats.sums["head_means"][rows].add_(token_sum(context, self._token_mask).cpu())
        if layer == next(iter(self._rows)):
            num_tokens = context.shape[:-1].numel() if self._token_mask is None else int(self._token_mask.sum())
            self.stats.sums["means_counts"].add_(num_tokens)

    def _check_mask(self, what: str, values: torch.Tensor) -> None:
        if self._token_mask is not None and self._token_mask.shape != values.shape[:2]:
            raise ValueError(
                f"`attention_mask` of batch {self._batch_index} has shape {tuple(self._token_mask.shape)}, but {what} have "
                f"{tuple(values.shape)}: give one value per token."
            )

    def _read_map(self, layer: int, module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        """Adds the entropy and the signatures of one layer's attention maps."""
        attention = outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None
        if attention is None:
            return  # `end` says so
        self._layers_seen.add(layer)
        with torch.no_grad():
            attention = attention.detach().to(torch.promote_types(attention.dtype, torch.float32))
            if self._token_mask is None:
                self._token_mask = attention.new_ones(attention.shape[0], attention.shape[-1], dtype=torch.bool)
            if self._token_mask.shape != (attention.shape[0], attention.shape[-1]):
                raise ValueError(
                    f"`attention_mask` of batch {self._batch_index} has shape {tuple(self._token_mask.shape)}, but "
                    f"the attention maps of layer {layer} have {tuple(attention.shape)}: give one value per token."
                )
            if self.stats.request.entropy:
                self._add_entropy(layer, attention)
            if self.stats.request.signature_size:
                self._add_signatures(layer, attention)

    def _add_entropy(self, layer: int, attention: torch.Tensor) -> None:
        entropy = attention_entropy(attention, self._token_mask)
        self._check_finite(f"attention of layer {layer}", entropy)
        self.stats.sums["entropy"][self._rows[layer]].add_(entropy.sum(dim=0, dtype=torch.float64).cpu())
        if layer == next(iter(self._rows)):
            self.stats.sums["entropy_counts"].add_(len(entropy))

    def _add_signatures(self, layer: int, attention: torch.Tensor) -> None:
        """Adds maps (batch, heads, length, length), resized to (B, B), to the sums of their samples' classes."""
        batch, heads, length, _ = attention.shape
        if self._resize is None:
            self._resize = resize_weights(self._token_mask, self.stats.request.signature_size).to(attention.dtype)
        columns = torch.bmm(attention.reshape(batch, heads * length, length), self._resize.transpose(1, 2))
        resized = self._resize.unsqueeze(1) @ columns.view(batch, heads, length, -1)  # (batch, heads, B, B)
        self._check_finite(f"attention of layer {layer}", resized)
        fixed = (resized.flatten(2) * FIXED_POINT).round().to(torch.int64)
        self.stats.sums["signature"][:, self._rows[layer]].index_add_(0, self._labels, fixed)
        self.stats.sums["signature_squares"][:, self._rows[layer]].index_add_(0, self._labels, fixed * fixed)
        if layer == next(iter(self._rows)):
            counts = self.stats.sums["signature_counts"]
            counts.add_(self._labels.bincount(minlength=len(counts)))
            if counts.max() > MAX_CLASS_SAMPLES:
                raise ValueError(f"More than {MAX_CLASS_SAMPLES} samples of a class overflow the sums: give fewer.")

    def _check_finite(self, what: str, values: torch.Tensor) -> None:
        if not values.isfinite().all():
            raise ValueError(
                f"The {what} in batch {self._batch_index} holds NaN or infinity: check the weights and that batch, or "
                "score in float32 if the model is in half precision."
            )
