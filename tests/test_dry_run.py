"""What `--dry-run` says: the trainings of the run that follows, in order and to the step; and that it leaves no trace."""

import json
from dataclasses import replace

import pytest
from datasets import DatasetDict
from transformers import AutoModel, BertTokenizer
from typer.testing import CliRunner

from shrp_hf import cli
from shrp_hf.measuring import flop_table
from shrp_hf.pruning import to_shrp
from shrp_hf.training import effort
from shrp_hf.training.effort import Pace, Training, measure_pace
from shrp_hf.training.recipes import Setup, find_recipe
from shrp_hf.workflows.compare import Grid, preview_comparison
from shrp_hf.workflows.compress import Compression, CompressionPreview, Experts, Targets
from shrp_hf.workflows.compress import run as compress_run
from shrp_hf.workflows.preview import duration
from tests.test_compare import comparison, quick, work  # noqa: F401
from tests.test_compress import QUICK, TASK, flop_time, plain, predict_by  # noqa: F401
from tests.tiny import same_state, tiny_bert

PACE = Pace(step=2.0, forward=0.5, num_steps=3, where="an abacus")


@pytest.fixture(autouse=True)
def _steady(monkeypatch):
    """Costs are counted, a step takes two seconds, and nothing is opened in a new process."""
    monkeypatch.setattr("shrp_hf.workflows.compress.verdict.NUM_RESAMPLES", 50)
    monkeypatch.setattr(compress_run, "latency_table", flop_table)
    monkeypatch.setattr(compress_run, "problem_when_reopened", lambda *args: "")
    for module in ("compress", "compare"):
        monkeypatch.setattr(f"shrp_hf.workflows.{module}.preview.measure_pace", lambda *args: PACE)


@pytest.fixture
def lengths(monkeypatch):
    """Steps of every training of a run, in order."""
    steps, original = [], Setup.train

    def told(self, trainer):
        model = original(self, trainer)
        steps.append(trainer.state.max_steps)
        return model

    monkeypatch.setattr(Setup, "train", told)
    return steps


def options_of(targets, **options):
    return replace(QUICK, targets=targets, **{"structures": ("experts",), "force": True, **options})


def compress_preview_of(model, folder, options, **kwargs):
    return CompressionPreview(model, TASK, folder, options, measure=flop_time, **kwargs).preview(lambda text: None)


def compressed(model, folder, options, **kwargs):
    return Compression(model, TASK, folder, options, measure=flop_time, **kwargs).run()


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def steps_of(found):
    return [training.steps for step in found.steps if step.num_done < step.num for training in step.trainings]


DEFAULT = replace(find_recipe("default"), recovery_epochs=2)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options_of(Targets(speedup=1.9)), id="routers"),
        pytest.param(options_of(Targets(speedup=1.9), dense_epochs=2.0, examples_per_epoch=None), id="fine-tuned first"),
        pytest.param(options_of(Targets(1.5), structures=None, recipe=DEFAULT, max_trials=3), id="every structure"),
        pytest.param(options_of(Targets(1.2, 0.99), experts=(1,), max_trials=2), id="a quality that none keeps"),
        pytest.param(options_of(Targets(None, 0.99), experts=(1,), max_trials=2), id="bisection for a quality"),
    ],
)
def test_compression_trains_what_the_preview_says_and_finds_nothing_left_of_it(options, plain, tmp_path, lengths):  # noqa: F811
    # Expert layers keep nothing here, where a quality is to be kept.
    judged = {"predict": predict_by({0: 1.0, 1: 0.5, 2: 0.5, 3: 0.5})} if options.targets.keep_quality else {}
    output = tmp_path / "out"
    found = compress_preview_of(plain, output, options, **judged)
    assert not output.exists()
    assert lengths == []
    verdict = compressed(plain, output, options, **judged)
    assert lengths == steps_of(found)
    assert [step.name for step in found.steps] == ["dense", *(trial.candidate.name for trial in verdict.trials)]
    before = files_of(output)
    again = compress_preview_of(plain, output, options, **judged)
    assert files_of(output) == before
    assert {step.name for step in again.steps if step.num_done == step.num} >= {step.name for step in found.steps}
    assert again.seconds < found.seconds
    assert "kept" in again.text()


def test_estimate_of_a_compression_by_hand(plain, tmp_path):  # noqa: F811
    found = compress_preview_of(plain, tmp_path / "out", options_of(Targets(speedup=1.9), dense_epochs=2.0))
    dense, chosen = found.steps
    # 8 of the 48 rows are an epoch, a batch has 8: a step an epoch, of 6 in the set. A conversion has 46 rows, in 6 batches.
    assert dense.trainings == (Training("fine-tuning", 2.0, 16, 2),)
    assert dense.seconds == 2 * PACE.step
    assert chosen.name == "2x2"
    assert chosen.trainings == (Training("conversion", 3, 23, 3, True), Training("recovery", 1, 8, 1, True))
    models = {"dense": to_shrp(tiny_bert(num_labels=2)), "2x2": compress_run.untrained(tiny_bert(num_labels=2), Experts(2, 2))}
    timings = flop_time(models, 2, 16, 1)
    faster = timings["2x2"].ratio_to(timings["dense"])
    assert chosen.seconds == pytest.approx(3 * PACE.step + PACE.step / faster + 4 * PACE.forward)
    assert found.other_seconds == pytest.approx((20 + 2 * 40) / 8 * PACE.forward)
    text = found.text()
    assert "**2 of 2 to do (0 there already), 6 training steps, about " in text
    assert "rests on 3 training steps of the dense model, timed here on an abacus: 2 s each" in text
    assert "before its fine-tuning" in text


def test_preview_refuses_what_a_compression_refuses_and_claims_nothing(plain, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="`speedup` 50 is out of reach on this machine"):
        compress_preview_of(plain, output, options_of(Targets(50)))
    majority = {"predict": predict_by(dict.fromkeys(range(4), 0.5))}
    with pytest.raises(ValueError, match="has learned nothing that could be kept"):
        compress_preview_of(plain, output, options_of(Targets(1.9), force=False), **majority)
    nothing = {"predict": predict_by(dict.fromkeys(range(4), 0.0))}
    with pytest.raises(ValueError, match="needs a dense model that has learned: its held-out accuracy is 0.0000"):
        compress_preview_of(plain, output, options_of(Targets(None, 0.9)), **nothing)
    assert not output.exists()
    Compression(plain, TASK, output, options_of(Targets(1.9)), measure=flop_time)
    with pytest.raises(ValueError, match="holds a run with another model, task or options"):
        compress_preview_of(plain, output, options_of(Targets(1.9), seed=1))


BARE = {"recovery_epochs": (0.5,), "without_random": True}
GRIDS = {
    "heads": Grid(selectors=("his",), heads=(6,), seeds=(0, 1), **BARE),
    "choosing in training": Grid(selectors=("dsp",), heads=(6,), **BARE),
    "routers and fewer layers": Grid(expert_layers=(2,), expert_selectors=("usage",), truncate=(1,), spread=(2,), **BARE),
    "thin layers and experts by scores": Grid(expert_layers=(2,), expert_selectors=("his",), thin_keep=(0.5,), **BARE),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_comparison_trains_what_the_preview_says(grid, work, tmp_path, quick, lengths):  # noqa: F811
    output, settings = tmp_path / "out", {"dense_epochs": 0.5, "examples_per_epoch": 24}
    found = preview_comparison(comparison(work, output, grid, **settings))
    assert not output.exists()
    assert lengths == []
    done = comparison(work, output, grid, **settings)
    assert done.run() == {}
    expected = [training.steps for step in found.steps for training in step.trainings for _ in range(step.num)]
    assert sorted(lengths) == sorted(expected)
    names = {step.name for step in found.steps}
    assert names == {job.key.rpartition("-seed")[0] for job in done.jobs.values() if done.worker.file(job).exists()}
    assert len(names) >= 4


def test_siblings_of_other_seeds_tell_how_long_what_is_left_takes(work, tmp_path, quick):  # noqa: F811
    output, grid = tmp_path / "out", GRIDS["heads"]
    assert comparison(work, output, grid).run() == {}
    (output / "cells" / "his-heads6-default-recovery0.5-seed1.json").unlink()
    before = files_of(output)
    found = preview_comparison(comparison(work, output, grid))
    assert files_of(output) == before
    (left,) = [step for step in found.steps if step.num_done < step.num]
    assert (left.name, left.what, left.num, left.num_done) == ("his-heads6-default-recovery0.5", "his, 6 heads", 2, 1)
    record = json.loads((output / "cells" / "his-heads6-default-recovery0.5-seed0.json").read_text(encoding="utf-8"))
    assert left.seconds == record["seconds"]
    assert "For 1 of the kinds of jobs it is what the same took for other seeds here" in found.text()
    assert "1 of 2" in found.text()


def test_preview_of_a_comparison_refuses_a_dense_model_that_has_learned_nothing(work, tmp_path, monkeypatch):  # noqa: F811
    made = comparison(work, tmp_path / "out", Grid(truncate=(1,)))
    made.unchecked = [job for job in made.jobs.values() if job.kind == "dense"]
    monkeypatch.setattr(type(made.worker.task), "compute_metrics", lambda self, prediction: {"accuracy": 0.0})
    with pytest.raises(ValueError, match="has learned nothing that could be kept"):
        preview_comparison(made)


def test_steps_on_pairs_are_counted(plain):  # noqa: F811
    tokenizer = BertTokenizer.from_pretrained(plain)
    data = TASK.tokenize(tokenizer, max_length=16, model=tiny_bert(num_labels=2))
    data = DatasetDict({**data, "pairs": data["train"].select(range(20))})
    found = effort.recovery(Setup(data, tokenizer, None, batch_size=8), DEFAULT)
    assert [(training.name, training.rows, training.steps) for training in found] == [("recovery", 96, 12), ("pairs", 20, 3)]
    assert effort.recovery(Setup(data, tokenizer, None), replace(DEFAULT, recovery_epochs=0)) == []


def test_pace_is_measured_on_a_copy(plain):  # noqa: F811
    tokenizer, dense, before = BertTokenizer.from_pretrained(plain), tiny_bert(num_labels=2), tiny_bert(num_labels=2)
    data = TASK.tokenize(tokenizer, max_length=16, model=dense)
    for model in (dense, _embedder(plain)):
        pace = measure_pace(model, Setup(data, tokenizer, None, batch_size=8))
        assert 0 < pace.forward
        assert 0 < pace.step
        assert pace.num_steps == 6
    assert same_state(dense, before)
    assert all(parameter.grad is None for parameter in dense.parameters())
    rows = Setup(DatasetDict(train=data["train"].select([0])), tokenizer, None)
    assert measure_pace(dense, rows).num_steps == 1


def _embedder(plain):  # noqa: F811
    model = AutoModel.from_pretrained(plain)
    model.config.sentence_embedding = {"modes": ["mean"], "normalize": True, "similarity": "cosine"}
    return model


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (90, "1.5 min"), (1500, "25 min"), (5400, "1.5 h"), (3600e3, "1,000 h")]
)
def test_durations_are_said_in_a_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text


def test_commands_say_it_and_write_nothing(plain, work, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(Compression.__init__.__kwdefaults__, "measure", flop_time)
    output = tmp_path / "out"
    words = [plain, "--dataset", "sst2", "--data-dir", str(work), "--output", str(output), "--dry-run", "--force"]
    done = CliRunner().invoke(cli.app, ["compress", *words, "--shape", "2x16", "--speedup", "1.5", "--max-length", "16"])
    assert done.exit_code == 0, done.output
    assert "nothing was trained, and nothing was written" in " ".join(done.output.split())
    done = CliRunner().invoke(cli.app, ["compare", *words, "--truncate", "1,2", "--seeds", "0,1", "--max-length", "16"])
    assert done.exit_code == 0, done.output
    assert "first 2 layers" in done.output
    assert not output.exists()
    done = CliRunner().invoke(cli.app, ["compare", *words, "--report-only"])
    assert "`dry_run` and `report_only`" in str(done.exception)
