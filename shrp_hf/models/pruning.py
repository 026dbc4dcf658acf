"""Layers as the config describes them, and the cut that makes them smaller; part of every Shrp model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .expert_layer import ExpertLayer
from .rebuilding import check_plain
from .slicing import OutputMeans, add_output_biases_, heads_to_keep, keep_heads_, keep_neurons_, neurons_to_keep


class PrunedLayersMixin:
    """Builds layers of any width, and cuts heads and neurons out. Mixed in before a Transformers class."""

    config: Any
    base_model: Any

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers."""
        module = self.base_model
        for name in self.config.layer_map.layers.split("."):
            module = module._modules[name]  # no attribute access: where ViT has its layers, it would end here again
        return module

    def _build_layers_(self) -> None:
        """Turns freshly built stock layers into those that the config describes (called by `__init__`)."""
        config = self.config
        config.check_layers()
        layers = self.layers
        for i, stock in enumerate(layers):
            kept = config.heads_of(i)
            is_pending = i in config.pending_layers
            if i not in config.expert_layers or is_pending:
                keep_heads_(stock, self.config.layer_map, range(config.num_attention_heads), kept, config)
                keep_neurons_(stock, self.config.layer_map, range(config.num_neurons_of(i)))
                if config.output_bias:
                    add_output_biases_(stock, self.config.layer_map)
            if i in config.expert_layers or is_pending:
                layers[i] = ExpertLayer(config, i, stock)
                if not config.routed:
                    layers[i].keep_experts_(kept)

    def prune_heads(self, plan: Any, output_means: OutputMeans | None = None) -> None:
        """Cuts the model down in place, for good; the counterpart that returns a new model is `shrp_hf.prune_heads`.

        Args:
            plan: A `KeepPlan` (heads of ordinary and experts of expert layers that *stay*, and neurons where it names them;
                routers go), or the form of Transformers 4, `{layer: [heads to remove]}`, for ordinary layers. Heads are named
                by their index in the unpruned model, neurons by theirs in this one.
            output_means: What heads and neurons put out on average: what is cut leaves its mean contribution in the output
                bias. None: it leaves nothing, which equals masking.

        Raises:
            ValueError: The plan has another shape, names a head that is gone, a neuron or a layer that is not there, leaves
                an expert layer without experts, or is for other widths; the means are of another model; the
                conversion has not finished; or a matrix that would be cut is wrapped (adapted, parametrized, masked or
                quantised). The model is as it was.
        """
        if self.config.pending_layers:
            raise ValueError(
                f"Layers {self.config.pending_layers} are still pending: finish the training, or call "
                "`finish_conversion_()`, before pruning."
            )
        config, by_plan = self.config, not isinstance(plan, Mapping)
        present = [config.heads_of(i) for i in range(config.num_hidden_layers)]
        widths = [config.num_neurons_of(i) for i in range(config.num_hidden_layers)]
        target = heads_to_keep(plan, present, config.num_attention_heads, config.expert_layers)
        neurons = neurons_to_keep(plan, widths, config.expert_layers)
        means = self._means_of_layers(output_means, present, widths)
        cut = [target[i] != present[i] or (neurons is not None and len(neurons[i]) < widths[i]) for i in range(len(target))]
        check_plain({i: self.layers[i] for i, is_cut in enumerate(cut) if is_cut}, config.layer_map)
        if output_means is not None and any([add_output_biases_(self.layers[i], self.config.layer_map) for i in means]):
            config.output_bias = True
        for i, layer in enumerate(self.layers):
            if i in config.expert_layers:
                if by_plan:
                    layer.keep_experts_([present[i].index(head) for head in target[i]])
                continue
            head_means, neuron_means = means.get(i, (None, None))
            keep_heads_(layer, self.config.layer_map, present[i], target[i], config, head_means)
            if neurons is not None:
                keep_neurons_(layer, self.config.layer_map, neurons[i], neuron_means)
        if by_plan and config.expert_layers:
            config.routed = False
        is_full = all(len(heads) == config.num_attention_heads for heads in target)
        config.kept_heads = None if is_full else target
        if neurons is not None:
            config.set_num_neurons_([len(kept) for kept in neurons])
        self._refresh_()

    def _means_of_layers(
        self, output_means: OutputMeans | None, present: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> dict:
        if output_means is None:
            return {}
        size, ordinary = self.config.head_size, set(range(len(present))) - set(self.config.expert_layers)
        return {i: output_means.of_layer(i, (len(present[i]), size), widths[i]) for i in sorted(ordinary)}

    def _refresh_(self) -> None:
        if self.config.intermediate_sizes is not None:  # a layer that became an expert layer has lost its own
            self.config.set_num_neurons_(self.config.intermediate_sizes)
        self.config.check_layers()
        for module in {self, self.base_model}:
            module._list_layer_classes_()
