"""An ordinary Trainer script, made SHRP by two class names.

python examples/convert_and_prune.py --model MODEL --dataset docstrings --num_expert_layers 5 --output_dir out/shrp
"""

from dataclasses import dataclass, field

from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from shrp_hf import ShrpTrainer, ShrpTrainingArguments
from shrp_hf.tasks import load_task


@dataclass
class ScriptArguments:
    """What the script itself needs."""

    model: str = field(metadata={"help": "Directory or Hub id of a plain BERT checkpoint."})
    dataset: str = field(default="docstrings", metadata={"help": "Task name, directory or Hub data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Directory with the task's files."})
    max_train: int | None = field(default=None, metadata={"help": "Most training rows."})
    keep: int = field(default=1, metadata={"help": "Experts that stay in each layer."})


def main() -> None:
    """Trains, prunes and saves."""
    script, args = HfArgumentParser((ScriptArguments, ShrpTrainingArguments)).parse_args_into_dataclasses()
    task = load_task(script.dataset, script.data_dir, max_train=script.max_train)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    data = task.tokenize(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(script.model, **task.config_kwargs)

    trainer = ShrpTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=task.compute_metrics,
    )
    trainer.train()
    routed = trainer.evaluate(data["test"], metric_key_prefix="routed")
    trainer.model.prune_heads(trainer.usage_plan(keep=script.keep))
    static = trainer.evaluate(data["test"], metric_key_prefix="static")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print({**routed, **static})


if __name__ == "__main__":
    main()
