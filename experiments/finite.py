"""What looking for NaN and infinity costs a training step: `python -m experiments.finite`.

`ShrpTrainer` looks at the loss and at the norm of all gradients before the optimizer steps. Stock and looking trainers take
turns on one model: forward, backward, AdamW.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from shrp_hf.measuring import measure_calls, random_inputs
from shrp_hf.training.finite import FiniteTrainer

SHAPES = {"MiniLM (6 x 12 x 384)": (6, 384, 1536), "BERT-base (12 x 12 x 768)": (12, 768, 3072)}
SERVED = ((32, 24), (8, 128))


def step_of(trainer_class: type[Trainer], model: BertForSequenceClassification, shape: tuple[int, int]) -> Callable[[], None]:
    """A call that does one training step by this trainer."""
    inputs = random_inputs(model, *shape) | {"labels": torch.zeros(shape[0], dtype=torch.long)}
    arguments = TrainingArguments(tempfile.gettempdir(), use_cpu=True, report_to=[])
    trainer = trainer_class(model=model, args=arguments)
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        trainer.training_step(model, dict(inputs))
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> int:
    """Prints the time of a step with the checks, as a multiple of one without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    words = parser.parse_args()
    sys.stdout.write("| model | sequences x tokens | a step, ms | with the checks |\n|---|---|---:|---:|\n")
    for name, (layers, width, neurons) in SHAPES.items():
        torch.manual_seed(0)
        config = BertConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=12, intermediate_size=neurons)
        model = BertForSequenceClassification(config)
        for shape in SERVED:
            calls = {kind.__name__: step_of(kind, model, shape) for kind in (Trainer, FiniteTrainer)}
            plain, checked = measure_calls(calls, *shape, num_rounds=words.rounds).values()
            cost = f"{checked.p50 / plain.p50:.3f}x"
            sys.stdout.write(f"| {name} | {shape[0]} x {shape[1]} | {1e3 * plain.p50:.0f} | {cost} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
