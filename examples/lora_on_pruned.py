"""Cut heads, then recover with LoRA (PEFT): the adapter is merged, and what is saved is a plain pruned model.

python examples/lora_on_pruned.py --model DENSE --dataset docstrings --keep 0.5 --output_dir out/lora
"""

from dataclasses import dataclass, field

from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from shrp_hf import Budget, HisSelector, prune_heads
from shrp_hf.tasks import load_task


@dataclass
class ScriptArguments:
    """What the script itself needs."""

    model: str = field(metadata={"help": "Directory or Hub id of a fine-tuned classifier."})
    dataset: str = field(default="docstrings", metadata={"help": "Task name, directory or Hub data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Directory with the task's files."})
    max_train: int | None = field(default=None, metadata={"help": "Most training rows."})
    keep: float = field(default=0.5, metadata={"help": "Share of the heads that stay."})
    rank: int = field(default=16, metadata={"help": "Rank of the adapter."})


def main() -> None:
    """Scores, cuts, adapts, merges and saves."""
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    task = load_task(script.dataset, script.data_dir, max_train=script.max_train)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    data = task.tokenize(tokenizer)
    dense = AutoModelForSequenceClassification.from_pretrained(script.model)

    calibration = data["train"].select(range(min(512, len(data["train"]))))
    batches = [tokenizer.pad(calibration[i : i + 32], return_tensors="pt") for i in range(0, len(calibration), 32)]
    for batch in batches:
        batch["labels"] = batch.pop("label")
    plan = HisSelector(budget=Budget.fraction(script.keep)).select(dense, batches)
    pruned = prune_heads(dense, plan)

    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=script.rank, lora_alpha=2 * script.rank)
    trainer = Trainer(
        get_peft_model(pruned, lora),
        args,
        train_dataset=data["train"],
        processing_class=tokenizer,
        compute_metrics=task.compute_metrics,
    )
    before = trainer.evaluate(data["test"], metric_key_prefix="pruned")
    trainer.train()
    after = trainer.evaluate(data["test"], metric_key_prefix="recovered")
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print({**before, **after})


if __name__ == "__main__":
    main()
