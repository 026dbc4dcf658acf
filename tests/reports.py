"""Reports of made-up results, for tests of the pages: many methods, several seeds, names that would break a page."""

from shrp_hf.workflows.compare.page import html_report
from shrp_hf.workflows.compare.tables import Row, rows_of

RECIPE = {"name": "default", "expert_selector": "his", "experts_per_sequence": 1, "balance_coef": 0.1}
SETTINGS = {"task": "moods <b>&amp;", "model": "org/model", "reported": "the last rows </script>"}
METHODS = [f"method{i}" for i in range(17)]
NUM_LAYERS, NUM_HEADS, WIDTH = 6, 12, 1536


def cell(method: str, seed: int, quality: float, flops: float = 1.0, **fields) -> dict:
    words = [method, str(fields.get("value", "")), f"recovery{fields.get('recovery_epochs', 0)}"]
    return {
        "key": f"{'-'.join(filter(None, words))}-seed{seed}",
        "method": method,
        "seed": seed,
        "budget": "keep",
        "recovery_epochs": 0,
        "recipe": "default",
        "metrics": {"accuracy": quality},
        "held_out": {"accuracy": quality},
        "agreement": quality,
        "kept": [list(range(NUM_HEADS))] * NUM_LAYERS,
        "neurons": None,
        "ffn_width": WIDTH,
        "expert_layers": [],
        "num_heads": NUM_LAYERS * NUM_HEADS,
        "num_experts": 0,
        "parameters": {"encoder": 1000, "encoder_and_pooler": 1100, "whole": 3000},
        "flops": flops,
        "train_examples": 0,
        "rows": 400,
        "settings": SETTINGS | {"recipe": RECIPE},
        "versions": {"shrp_hf": "0"},
        **fields,
    }


def rows(is_timed: bool = True, shift: float = 0.0) -> list[Row]:
    """20 kinds of models, two seeds, with and without recovery; what is faster keeps less, and `shift` more of it."""
    cells, timings = [], {}
    for seed in (0, 1):
        cells.append(cell("dense", seed, 0.9))
        for epochs in (0, 5):
            for i, method in enumerate((*METHODS, "random", "thin", "truncate")):
                quality = 0.9 - 0.004 * i + 0.001 * seed - 0.05 * (epochs == 0) + shift
                kept = {"kept": [[0, 1 + seed]] * NUM_LAYERS, "num_heads": 2 * NUM_LAYERS, "recovery_epochs": epochs}
                kept |= {"neurons": [WIDTH // 4] * NUM_LAYERS} if method == "thin" else {}
                value = 2 if method == "truncate" else 0.25
                found = cell(method, seed, quality, 1 / (1.5 + 0.1 * i), value=value, **kept)
                cells.append(found)
                timings[found["key"].removesuffix(f"-seed{seed}")] = {
                    "ratio": 1.5 + 0.1 * i, "batch_size": 8, "length": 128, "num_threads": 1, "device": "cpu", "num_rounds": 5,
                }  # fmt: skip
    return rows_of(cells, timings if is_timed else None)


def comparison_page(**options) -> str:
    return html_report(rows(**options), "accuracy")
