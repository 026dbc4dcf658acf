"""`shrp-hf inspect`."""

from rich.table import Table

from shrp_hf.cli.app import ModelArgument, app, console


@app.command()
def inspect(model: ModelArgument) -> None:
    """Prints layers, heads, experts, neurons, usage and parameter counts.

    Example: `shrp-hf inspect out/demo/static`
    """
    from shrp_hf.checkpoints import open_model
    from shrp_hf.measuring import count_parameters
    from shrp_hf.pruning import to_shrp

    loaded = to_shrp(open_model(model)[0])
    config = loaded.config
    table = Table(title=f"{model} ({config.model_type})")
    for column in ("layer", "kind", "kept", "heads or experts", "neurons", "usage (sequences per expert)"):
        table.add_column(column)
    usage = loaded.usage()
    for i in range(config.num_hidden_layers):
        kind = "ordinary"
        if i in config.expert_layers:
            kind = "expert, routed" if config.routed else "expert, static"
        elif i in config.pending_layers:
            kind = "pending"
        heads = config.heads_of(i)
        counts = " ".join(map(str, usage[i])) if i in usage else ""
        kept = f"{len(heads)} of {config.num_attention_heads}"
        neurons = f"{config.num_neurons_of(i)} of {config.ffn_width}"
        table.add_row(str(i), kind, kept, " ".join(map(str, heads)) or "none", neurons, counts)
    console.print(table)
    count = count_parameters(loaded)
    console.print(
        f"Parameters: encoder {count.encoder:,}; encoder + pooler {count.encoder_and_pooler:,}; whole model {count.whole:,}."
    )
