"""`shrp-hf inspect`."""

import json
import sys
from dataclasses import asdict
from typing import Any

from rich.table import Table

from shrp_hf.cli.app import JsonOption, ModelArgument, app, console


@app.command()
def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Prints layers, heads, experts, neurons, usage and parameter counts.

    Example: `shrp-hf inspect out/demo/static`
    """
    from shrp_hf.checkpoints import open_model
    from shrp_hf.measuring import count_parameters
    from shrp_hf.pruning import to_shrp

    loaded = to_shrp(open_model(model)[0])
    config, count, usage = loaded.config, count_parameters(loaded), loaded.usage()
    layers = [_layer(config, i, usage.get(i)) for i in range(config.num_hidden_layers)]
    if as_json:
        found = {"model": model, "model_type": config.model_type, "layers": layers, "parameters": asdict(count)}
        sys.stdout.write(json.dumps(found) + "\n")
        return
    table = Table(title=f"{model} ({config.model_type})")
    for column in ("layer", "kind", "kept", "heads or experts", "neurons", "usage (sequences per expert)"):
        table.add_column(column)
    for i, layer in enumerate(layers):
        kept = f"{len(layer['kept'])} of {config.num_attention_heads}"
        heads, counts = (" ".join(map(str, layer[name] or ())) for name in ("kept", "usage"))
        table.add_row(str(i), layer["kind"], kept, heads or "none", f"{layer['neurons']} of {config.ffn_width}", counts)
    console.print(table)
    console.print(
        f"Parameters: encoder {count.encoder:,}; encoder + pooler {count.encoder_and_pooler:,}; whole model {count.whole:,}."
    )


def _layer(config: Any, i: int, usage: list[int] | None) -> dict[str, Any]:
    kind = "ordinary"
    if i in config.expert_layers:
        kind = "expert, routed" if config.routed else "expert, static"
    elif i in config.pending_layers:
        kind = "pending"
    return {"kind": kind, "kept": list(config.heads_of(i)), "neurons": config.num_neurons_of(i), "usage": usage}
