"""From the usage of experts to a keep plan (SHRP)."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from shrp_hf.plans.keep_plan import KeepPlan


def plan_by_usage(
    model: PreTrainedModel, counts: Mapping[int, Sequence[int]], keep: int = 1, scope: str = "layer"
) -> KeepPlan:
    """Keeps the most used experts; ordinary layers stay as they are.

    Args:
        model: A routed Shrp model.
        counts: Sequences routed to each expert: layer index -> one count per expert.
        keep: Experts per expert layer.
        scope: "layer": the top `keep` of each layer. "model": `keep` times the number of expert layers in all, by their
            share of their layer's usage, at least one a layer.

    Returns:
        A plan for the whole model. Ties go to the lower index.

    Raises:
        ValueError: `keep` or `scope` is out of range, there is no expert layer, or a layer has no usage recorded.
    """
    config = model.config
    layers = list(config.expert_layers)
    if not layers or not config.routed:
        raise ValueError("The model has no routed expert layers: convert some with `from_pretrained(..., expert_layers=n)`.")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= config.num_attention_heads:
        raise ValueError(f"`keep` must be between 1 and {config.num_attention_heads} experts, got {keep}.")
    if scope not in ("layer", "model"):
        raise ValueError(f'`scope` must be "layer" or "model", got {scope!r}.')
    for layer in layers:
        if not sum(counts.get(layer, ())):
            raise ValueError(
                f"No usage is recorded for expert layer {layer}: train with ShrpTrainer, or count on a dataset with "
                "`trainer.usage_plan(dataset)`."
            )
    ranked = {i: sorted(range(len(counts[i])), key=lambda expert: -counts[i][expert]) for i in layers}
    kept = {i: ranked[i][:1] for i in layers}
    if scope == "layer":
        kept = {i: ranked[i][:keep] for i in layers}
    else:
        rest = [(-counts[i][expert] / sum(counts[i]), i, expert) for i in layers for expert in ranked[i][1:]]
        for _, i, expert in sorted(rest)[: (keep - 1) * len(layers)]:
            kept[i].append(expert)
    return KeepPlan(
        kept=tuple(tuple(kept[i] if i in kept else config.heads_of(i)) for i in range(config.num_hidden_layers)),
        num_heads=config.num_attention_heads,
    )


def usage_table(counts: Mapping[int, Sequence[int]]) -> str:
    """Prints usage as a text table: one line per layer, the share of sequences in percent per expert."""
    if not counts:
        return "no routed expert layers"
    width = max(len(row) for row in counts.values())
    lines = ["layer  sequences  " + " ".join(f"e{expert:<4}" for expert in range(width))]
    for layer, row in sorted(counts.items()):
        total = sum(row)
        shares = " ".join(f"{100 * count / total:5.1f}" if total else "    -" for count in row)
        lines.append(f"{layer:>5}  {total:>9}  {shares}")
    return "\n".join(lines)
