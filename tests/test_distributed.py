"""Two gloo processes of 4 sequences each against one process of 8. The workers are this file, run by `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.selectors import CahpSelector, HiesSelector
from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.trainer import ShrpTrainer
from tests.tiny import NO_DROPOUT, batch, examples, tiny_bert, tiny_routed

ROOT = Path(__file__).parents[1]
LOSSES = ("task_loss", "balance_loss")
WRAPPINGS = ("ddp", "fsdp")


def in_parallel(model: torch.nn.Module, wrapping: str | None) -> torch.nn.Module:
    if wrapping == "fsdp":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model, find_unused_parameters=True) if wrapping == "ddp" else model


def gradients_of_losses(rank: int = 0, wrapping: str | None = None) -> dict:
    """The gradient of each loss over a batch or this process's half of it, its balance loss and the usage."""
    inputs, found = batch(size=8) | {"labels": torch.arange(8) % 3}, {}
    share = {name: value.chunk(2)[rank] if wrapping else value for name, value in inputs.items()}
    for loss in LOSSES:
        model = tiny_routed(2, dtype=torch.float64, **NO_DROPOUT).train()
        parallel = in_parallel(model, wrapping)  # held here: the backward pass finds it by a weak reference
        output = parallel(**share)
        output[loss].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[loss] = {name: g.full_tensor() if wrapping == "fsdp" else g for name, g in gradients.items()}
        found["usage"], found["balance"] = model.usage(), output.balance_loss.detach()
    return found


def training(folder: str, processes: int = 1) -> dict:
    """Converts two layers under way; the shares of two processes together are the batches of one."""
    args = ShrpTrainingArguments(
        folder,
        num_expert_layers=2,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=3,
        gradient_checkpointing=processes > 1,
        usage_holdout=0.3,
        optim="sgd",
        learning_rate=0.5,
        save_strategy="no",
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = tiny_bert(num_labels=2, dtype=torch.float64, **NO_DROPOUT)
    trainer = ShrpTrainer(model, args, train_dataset=examples(23))  # 16 to train on, 7 held out: no whole shares
    trainer.train()
    specialised = trainer.model.usage()
    plan = trainer.usage_plan(keep=2)
    names = ("stage", "task_loss", "balance_loss", "usage_max/layer_2", "routing_entropy/layer_2")
    return {
        "specialised": specialised,
        "usage": trainer.model.usage(),
        "plan": plan.to_json(),
        "logs": [[entry[name] for name in names] for entry in trainer.state.log_history if "stage" in entry],
        "weights": {name: value for name, value in trainer.model.state_dict().items() if value.is_floating_point()},
        "layers": trainer.model.config.expert_layers,
    }


def scoring(rank: int = 0, processes: int = 1) -> dict:
    """Head statistics over this process's share of the batches, and the plans that follow from all of them."""
    model = tiny_bert(num_labels=2, dtype=torch.float64).eval()
    rows = batch(size=9) | {"labels": torch.arange(9) % 2}  # five batches: no equal shares
    batches = [{name: value[i : i + 2] for name, value in rows.items()} for i in range(0, 9, 2)][rank::processes]
    heads = collect_head_stats(model, batches, StatsRequest(importance=True, entropy=True))
    signatures = collect_head_stats(model, batches, StatsRequest(salience=True, signature_size=4))
    plans = [
        HiesSelector(budget=Budget.fraction(0.5)).select(model, stats=heads),
        CahpSelector(budget=Budget.fraction(0.5), signature_size=4).select(model, stats=signatures),
    ]
    return {"heads": heads.sums, "signatures": signatures.sums, "plans": [plan.to_json() for plan in plans]}


def work(folder: str) -> None:
    rank = int(os.environ["RANK"])
    found = {"training": training(folder, processes=2)}  # sets the process group up
    found["scoring"] = scoring(rank, processes=2)
    found |= {wrapping: gradients_of_losses(rank, wrapping) for wrapping in WRAPPINGS}
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort now and then while the interpreter is torn down; all is written by now


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    # `--multi_gpu` means several processes: on a machine without GPUs they join over gloo. Port 0: a free one.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    run = subprocess.run(
        [*launch, __file__, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_two_processes_are_those_of_one(loss, wrapping, pair):
    whole = gradients_of_losses()
    assert whole[loss]["bert.encoder.layer.1.router.weight"].abs().max() > 1e-6
    for found in pair:
        given = {name: gradient for name, gradient in found[wrapping][loss].items() if name in whole[loss]}
        assert_close(given, whole[loss])


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_balance_loss_and_usage_are_those_of_the_whole_batch(wrapping, pair):
    whole = gradients_of_losses()
    for found in pair:
        torch.testing.assert_close(found[wrapping]["balance"], whole["balance"], rtol=0, atol=1e-12)
        assert found[wrapping]["usage"] == whole["usage"]


def test_training_by_two_processes_is_training_by_one(pair, tmp_path):
    whole = training(str(tmp_path))
    assert whole["layers"] == [1, 2]
    assert {layer: sum(counts) for layer, counts in whole["specialised"].items()} == {1: 16, 2: 16}
    assert {layer: sum(counts) for layer, counts in whole["usage"].items()} == {1: 7, 2: 7}
    for found in (found["training"] for found in pair):
        for name in ("layers", "specialised", "usage", "plan"):
            assert found[name] == whole[name], name
        assert_close(found["weights"], whole["weights"])
        for ours, theirs in zip(found["logs"], whole["logs"], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-4)
    assert KeepPlan.from_json(whole["plan"]).num_kept == 8


def test_scoring_by_two_processes_is_scoring_by_one(pair):
    whole = scoring()
    for found in (found["scoring"] for found in pair):
        assert found["plans"] == whole["plans"]
        assert_close(found["heads"], whole["heads"])
        assert found["signatures"].keys() == whole["signatures"].keys()
        for name, value in found["signatures"].items():
            if name.startswith("signature"):  # t-SNE is chaotic: every bit counts
                assert torch.equal(value, whole["signatures"][name]), name


if __name__ == "__main__":
    work(sys.argv[1])
