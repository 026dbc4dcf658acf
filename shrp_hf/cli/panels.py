"""Where `--help` shows each option: what is made, from which data, how it trains, where it runs, what is written."""

import inspect

import typer
from typer.models import OptionInfo

PANELS = {
    "Data": "dataset data_dir text_column text_pair_column label_column task corpus pairs max_train texts calibration "
    "held_out split_seed",
    "What is made": "selector selectors keep heads speedup keep_latency keep_flops keep_parameters keep_quality knee_degree "
    "knee_degrees neurons num_expert_layers expert_layers experts truncate spread thin thin_keep structures max_trials "
    "without_random without_control format precision int8 graph opset embeddings min_agreement floor alphabet",
    "How it is chosen": "alpha signature_size calibration_samples per_layer min_heads_per_layer output_means expert_selector "
    "expert_selectors dsp_epochs tolerance",
    "How it trains": "recipe recipes dense_epochs dense_learning_rate balance_epochs_per_layer specialise_epochs "
    "recovery_epochs learning_rate experts_per_sequence balance_coef teacher bf16 batch_size max_length examples_per_epoch "
    "seed seeds",
    "Where it runs": "shape shapes runtime runtimes threads device dtype rounds speed",
    "What is written": "output as_json force keep_models report_only dry_run",
}
"""Title -> names of parameters; an option of one name means the same in every command, and stands in the same panel."""
PANEL_OF = {name: title for title, names in PANELS.items() for name in names.split()}


def arrange(app: typer.Typer) -> None:
    """Puts every option of every command into its panel.

    Args:
        app: The application, with all its commands.
    """
    for command in app.registered_commands:
        for name, parameter in inspect.signature(command.callback).parameters.items():
            for info in getattr(parameter.annotation, "__metadata__", ()):
                if isinstance(info, OptionInfo):
                    info.rich_help_panel = PANEL_OF[name]
