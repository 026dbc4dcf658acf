"""Compression to a target: which candidates are tried, which is kept, what is written, what is refused."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from plotly.offline import get_plotlyjs
from transformers import AutoModel, AutoModelForSequenceClassification, BertTokenizer, EvalPrediction
from typer.testing import CliRunner

from shrp_hf import cli
from shrp_hf.measuring import Timing, count_flops, flop_table
from shrp_hf.pruning import to_shrp
from shrp_hf.tasks import Task
from shrp_hf.training.recipes import Recipe
from shrp_hf.workflows.compress import Compression, CompressOptions, Experts, Targets, Trial, verdict
from shrp_hf.workflows.compress import run as compress_run
from shrp_hf.workflows.compress.candidates import candidates, untrained, worthwhile
from shrp_hf.workflows.compress.search import best, check_reachable, search
from shrp_hf.workflows.compress.verdict import Verdict
from tests.tiny import batch, same_state, tiny_bert

WORDS = ("good", "bad", "the", "film", "is", "very")
QUICK = CompressOptions(
    Targets(speedup=1.2),
    shape=(2, 16),
    recipe=Recipe("quick", 1, 1, recovery_epochs=1, distillation_logits=1, distillation_hidden_states=1),
    batch_size=8,
    max_length=16,
    examples_per_epoch=8,
)


def rows(count):
    return Dataset.from_dict(
        {"text": [f"the film is {WORDS[1 - i % 2]} {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    )


TASK = Task("moods", rows(48), rows(20), rows(40), ("negative", "positive"), ("accuracy",), "the last rows")


def flop_time(models, batch_size, length, num_rounds):
    """Stands in for a clock: a model takes as long as it has FLOPs."""
    return {
        name: Timing(name, batch_size, length, "cpu", 1, ((1e-9 * count_flops(model, batch_size, length),),) * num_rounds)
        for name, model in models.items()
    }


def predict_by(held_out, reported=None):
    """Stands in for a forward pass: a model with n layers converted has accuracy held_out[n], on 40 rows reported[n]."""

    def predict(model, data, tokenizer):
        table = reported if reported and len(data) == 40 else held_out
        labels = np.array(data["label"])
        num_correct = round(table[len(model.config.expert_layers)] * len(labels))
        answers = np.where(np.arange(len(labels)) < num_correct, labels, 1 - labels)
        return EvalPrediction(np.eye(2)[answers], labels)

    return predict


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    model = tiny_bert(num_labels=2)
    model.config.id2label, model.config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    model.save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Opens no result in a new process, as `test_compress_structures` does, and draws few resamples: both cost seconds."""
    monkeypatch.setattr("shrp_hf.workflows.compress.verdict.NUM_RESAMPLES", 50)
    monkeypatch.setattr(compress_run, "latency_table", flop_table)
    monkeypatch.setattr(compress_run, "problem_when_reopened", lambda *args: "")


@pytest.fixture
def trainings(monkeypatch):
    """The names of what was trained, in order."""
    names = []
    for function in ("convert", "recover", "fine_tune"):
        original = getattr(compress_run, function)

        def counted(*args, original=original, **kwargs):
            names.append(kwargs["name"])
            return original(*args, **kwargs)

        monkeypatch.setattr(compress_run, function, counted)
    return names


def compression(plain, folder, targets, held_out=None, reported=None, **options):
    predict = {} if held_out is None else {"predict": predict_by(held_out, reported)}
    options.setdefault("structures", ("experts",))
    options.setdefault("force", held_out is None)  # a model of random weights is no better than the majority class
    return Compression(plain, TASK, folder, replace(QUICK, targets=targets, **options), measure=flop_time, **predict)


# --- candidates ---


def test_candidates_are_every_depth_with_powers_of_two_and_all_heads():
    model = tiny_bert(num_attention_heads=12, hidden_size=48)
    assert {c.keep for c in candidates(model, ["experts"])} == {1, 2, 4, 8, 12}
    assert {c.num_layers for c in candidates(model, ["experts"])} == {1, 2, 3}
    assert candidates(model, ["experts"], (2,)) == [Experts(1, 2), Experts(2, 2), Experts(3, 2)]
    assert list(Experts(2, 1).layers(6)) == [4, 5]


@pytest.mark.parametrize("experts", [(), (0, 1), (1, 5)], ids=["none", "zero", "too many"])
def test_numbers_of_experts_out_of_range_are_refused(experts):
    with pytest.raises(ValueError, match="`experts` must be between 1 and 4, the heads of a layer, got"):
        candidates(tiny_bert(), None, experts)


def test_untrained_shape_is_that_of_the_candidate_and_the_dense_model_is_left_alone():
    dense, before = to_shrp(tiny_bert()), to_shrp(tiny_bert())
    model = untrained(dense, Experts(2, 3))
    assert model.config.expert_layers == [1, 2]
    assert [len(model.config.heads_of(i)) for i in range(3)] == [4, 3, 3]
    assert not model.config.routed
    assert same_state(dense, before)
    assert dense.config.expert_layers == []
    assert torch.equal(dense(**batch()).logits, before(**batch()).logits)
    word = "bert.embeddings.word_embeddings.weight"
    assert model.get_parameter(word) is dense.get_parameter(word)  # dozens of shapes are measured side by side


def test_beaten_and_slow_candidates_are_not_worth_training():
    speeds = {
        Experts(1, 1): 1.4,
        Experts(1, 2): 1.45,  # measured faster with more experts: noise, and 1x1 is not worth trying
        Experts(1, 4): 0.98,  # slower than dense
        Experts(2, 1): 2.0,
        Experts(2, 2): 1.3,  # slower than 1x2, which is expected to be better
        Experts(2, 4): 1.1,
    }
    assert worthwhile(speeds) == [Experts(2, 4), Experts(1, 2), Experts(2, 1)]


# --- search ---

SPEEDS = {Experts(n, k): n + 1 - k / 10 for n in range(1, 6) for k in (1, 2, 4)}
ORDERED = sorted(SPEEDS, key=SPEEDS.get)


def trials_of(targets, retention, measured=None, max_trials=6):
    """Names of what is tried and of what is kept, for the retention by number of layers."""

    def attempt(candidate):
        share = retention[candidate.num_layers - 1]
        return Trial(candidate, share, share, SPEEDS[candidate] if measured is None else measured[candidate.name])

    trials = search(ORDERED, SPEEDS, targets, attempt, max_trials)
    return [trial.candidate.name for trial in trials], best(trials, targets)


@pytest.mark.parametrize(
    ("targets", "retention", "measured", "tried", "kept"),
    [
        pytest.param(Targets(2.8), [0.9] * 5, None, ["2x2"], "2x2", id="speed: least converted, most experts"),
        pytest.param(
            Targets(2.8), [0.9] * 5, {"2x2": 2.79, "2x1": 2.9}, ["2x2", "2x1"], "2x1", id="speed missed when measured again"
        ),
        pytest.param(
            Targets(5.8), [0.9] * 5, {"5x2": 5.7, "5x1": 5.75}, ["5x2", "5x1"], "5x1", id="speed never reached: the fastest"
        ),
        pytest.param(
            Targets(None, 0.95), [1, 0.98, 0.96, 0.9, 0.8], None, ["3x2", "4x1", "4x4", "3x1"], "3x1", id="quality: bisection"
        ),
        pytest.param(
            Targets(None, 0.99), [0.9, 0.98, 0.8, 0.7, 0.6], None, ["3x2", "2x4", "1x2", "1x4"], "2x4",
            id="quality never held: the best",
        ),
        pytest.param(Targets(3.8, 0.95), [1, 1, 0.96, 0.9, 0.8], None, ["3x2"], "3x2", id="both, at once"),
        pytest.param(
            Targets(3.8, 0.95), [1, 1, 0.9, 0.96, 0.8], None, ["3x2", "3x1", "4x4"], "4x4", id="both, by expected quality"
        ),
        pytest.param(
            Targets(4.8, 0.95), [1, 1, 1, 0.9, 0.8], None, ["4x2", "4x1", "5x4", "5x2", "5x1"], "4x1", id="both, in vain"
        ),
    ],
)  # fmt: skip
def test_search(targets, retention, measured, tried, kept):
    names, chosen = trials_of(targets, retention, measured)
    assert names == tried
    assert chosen.candidate.name == kept


def test_search_trains_no_more_than_it_may():
    assert trials_of(Targets(1.5, 1.0), [0.9] * 5, max_trials=2)[0] == ["1x4", "1x2"]
    assert len(trials_of(Targets(None, 1.0), [0.9] * 5, max_trials=2)[0]) == 2


def test_unreachable_speed_names_the_best():
    message = (
        "`speedup` 7 is out of reach on this machine: the fastest of 15 candidates (5 of 6 layers converted, 1 expert in "
        "each) runs 5.90x as fast as the dense model. Ask for at most 5.9, or measure at another `shape`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_reachable(SPEEDS, Targets(7), 6)
    with pytest.raises(ValueError, match="No candidate runs faster than the dense model"):
        check_reachable({Experts(1, 1): 0.9}, Targets(None, 0.9), 6)


@pytest.mark.parametrize(
    ("speedup", "keep_quality", "message"),
    [
        (None, None, "Give a target: `speedup` (4 is four times as fast), `keep_quality` (0.98), or both."),
        (1.0, None, "`speedup` must be above 1, the dense model's own speed, got 1.0."),
        (float("nan"), None, "`speedup` must be above 1, the dense model's own speed, got nan."),
        (None, 0.0, "`keep_quality` must be a share above 0 and at most 1, got 0.0."),
        (4, 98, "`keep_quality` must be a share above 0 and at most 1, got 98."),
    ],
)
def test_targets_out_of_range_are_refused(speedup, keep_quality, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Targets(speedup, keep_quality)


def test_undefined_quality_is_neither_the_best_nor_a_number():
    found = [Trial(Experts(n, 1), quality, quality / 0.8, 2.0 + n) for n, quality in ((1, 0.4), (2, math.nan), (3, 0.3))]
    for targets in (Targets(speedup=1.5), Targets(speedup=9), Targets(keep_quality=0.1), Targets(keep_quality=0.9)):
        for order in (found, found[::-1], found[1:] + found[:1]):
            assert not math.isnan(best(order, targets).quality)
    assert not found[1].meets(Targets(keep_quality=0.1))
    speeds = {trial.candidate: trial.speedup for trial in found}
    judged = Verdict("org/model", QUICK, 3, 0.8, speeds, tuple(found), found[1])
    (line,) = [line for line in verdict._trial_table(judged, TASK).splitlines() if line.startswith("| 2x1 |")]
    assert line.endswith("| undefined: constant predictions | - | **chosen** |")
    none = verdict.Reported(0.8, (0.7, 0.9), math.nan, (math.nan, math.nan), math.nan, (math.nan, math.nan))
    text = verdict._headline(judged, "pearson") + verdict._on_reported_rows("pearson", Targets(keep_quality=0.5), none)
    assert "pearson is (undefined: constant predictions) against 0.8000 (95% interval 0.7000 to 0.9000) dense" in text
    assert "**does not hold** there" in text
    assert "nan" not in text


# --- the whole job ---


def test_speed_alone_ends_with_a_model_that_loads_and_a_report(plain, tmp_path, trainings):
    shown = []
    verdict = compression(plain, tmp_path, Targets(speedup=1.9)).run(say=shown.append, show=shown.append)
    assert verdict.met
    assert [trial.candidate.name for trial in verdict.trials] == ["2x2"]
    assert trainings == ["dense", "routed-2", "static-2x2"]
    assert [text[:3] for text in shown if "/5" in text[:3]] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert shown[1].startswith("| layers converted | 1 expert | 2 experts | 4 experts |")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.expert_layers == [1, 2]
    assert not model.config.routed
    assert same_state(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "trials" / "2x2"))
    assert BertTokenizer.from_pretrained(tmp_path / "model").vocab_size == 5 + len(WORDS)
    assert {"README.md", "shrp_record.json", "modeling_shrp_bert.py"} <= {path.name for path in (tmp_path / "model").iterdir()}
    assert (tmp_path / "trials.png").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert '<p class="answer"><b>The target is met</b>: 2 of 3 layers converted, 2 experts in each: ' in page
    assert '"name": "experts"' in page
    assert '<button type="button">choice</button>' in page
    assert "<summary>2x2: 2 of 3 layers converted, 2 experts in each</summary><svg" in page
    assert str(tmp_path) not in page
    assert plain not in page
    assert not any((tmp_path / "checkpoints").iterdir())
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# moods: at least 1.9x the speed\n\n**The target is met**: 2 of 3 layers converted, 2 experts")
    assert "95% interval" in report
    assert "| 2x2 | 2 of 3 layers converted, 2 experts in each | 2.0" in report
    summary = json.loads((tmp_path / "compress.json").read_text(encoding="utf-8"))
    assert summary["met"]
    assert summary["chosen"]["speedup"] == verdict.chosen.speedup >= 1.9


def test_quality_alone_finds_the_fastest_that_holds_it(plain, tmp_path, trainings):
    accuracy = {0: 1.0, 1: 0.95, 2: 0.9, 3: 0.5}
    verdict = compression(plain, tmp_path, Targets(keep_quality=0.85), accuracy, accuracy).run()
    assert verdict.met
    assert verdict.chosen.candidate == Experts(2, 1)
    assert trainings.count("routed-2") == 1  # one conversion serves every number of experts
    assert "The target of 85.0% **also holds** there" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_without_routers_every_candidate_is_converted_to_its_own_experts(plain, tmp_path, trainings):
    accuracy = {0: 1.0, 1: 0.95, 2: 0.6, 3: 0.7}
    recipe = replace(QUICK.recipe, expert_selector="his")
    verdict = compression(plain, tmp_path, Targets(2, 0.9), accuracy, accuracy, experts=(1, 2), recipe=recipe).run()
    assert [trial.candidate.name for trial in verdict.trials] == ["2x1", "3x2", "3x1"]
    assert trainings == ["dense", *(f"{kind}-{name}" for name in ("2x1", "3x2", "3x1") for kind in ("converted", "static"))]
    assert "SHRP without routers" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_what_holds_on_held_out_rows_may_not_hold_on_the_reported_ones(plain, tmp_path):
    held_out, reported = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0, 1: 0.5, 2: 0.5, 3: 0.5}
    verdict = compression(plain, tmp_path, Targets(2, 0.9), held_out, reported, experts=(1,)).run()
    assert verdict.met
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "50.0% (95% interval" in report
    assert "The target of 90.0% **does not hold** there." in report


def test_targets_that_are_not_met_leave_the_best_found_and_other_targets_take_it_up(plain, tmp_path, trainings):
    accuracy = {0: 1.0, 1: 0.95, 2: 0.6, 3: 0.7}
    options = {"experts": (1,), "held_out": accuracy, "reported": accuracy}
    verdict = compression(plain, tmp_path, Targets(2, 0.9), **options).run()
    assert not verdict.met
    assert [trial.candidate.name for trial in verdict.trials] == ["2x1", "3x1"]
    assert verdict.chosen.candidate.name == "3x1"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config.expert_layers == [0, 1, 2]
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**The target is NOT met (quality)**; the best of 2 tried is 3 of 3 layers converted, 1 expert in each" in report
    trainings.clear()
    verdict = compression(plain, tmp_path, Targets(2, 0.65), **options).run()
    assert verdict.met
    assert verdict.chosen.candidate.name == "3x1"
    assert trainings == []


def test_run_that_was_interrupted_trains_nothing_twice(plain, tmp_path, trainings):
    def interrupted(models, *shape, num_rounds):
        if "3x1" in models and len(models) == 2:
            raise InterruptedError("out of patience")
        return flop_time(models, *shape, num_rounds=num_rounds)

    accuracy = {0: 1.0, 1: 0.95, 2: 0.6, 3: 0.7}
    job = compression(plain, tmp_path, Targets(2, 0.9), accuracy, experts=(1,))
    job.measure = interrupted
    with pytest.raises(InterruptedError):
        job.run()
    assert trainings == ["dense", "routed-2", "static-2x1", "routed-3", "static-3x1"]
    trainings.clear()
    verdict = compression(plain, tmp_path, Targets(2, 0.9), accuracy, experts=(1,)).run()
    assert trainings == []
    assert len(verdict.trials) == 2
    # A teacher comes back frozen: a second conversion from the same object would train hardly anything.
    names = ("dense", "trials/2x1", "trials/3x1")
    dense, *models = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in names)
    for weight in ("bert.embeddings.word_embeddings.weight", "classifier.weight"):
        assert not any(torch.equal(model.get_parameter(weight), dense.get_parameter(weight)) for model in models)


def test_speeds_are_kept_unless_they_are_of_another_machine(plain, tmp_path):
    job = compression(plain, tmp_path, Targets(2))
    speeds = job.speeds(job.choices)
    path = tmp_path / "speeds.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["predicted"] = {name: 1.5 for name in stored["predicted"]}
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert set(job.speeds(job.choices).values()) == {1.5}
    stored["on"]["machine"] = "1 x abacus"
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert job.speeds(job.choices) == speeds


def test_dense_model_is_fine_tuned_first_when_asked_to(plain, tmp_path):
    base = AutoModel.from_pretrained(plain)
    base.save_pretrained(tmp_path / "base")
    BertTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "base")
    job = compression(str(tmp_path / "base"), tmp_path / "out", Targets(2), dense_epochs=2.0)
    assert job.run().met
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense")
    assert trained.config.id2label == {0: "negative", 1: "positive"}
    word = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(trained.get_parameter(word), tiny_bert(num_labels=2).get_parameter(word))


# --- refusals ---


def refused(plain, folder, message, targets=None, task=TASK, **options):
    chosen = replace(QUICK, targets=targets or Targets(2), structures=("experts",), **options)
    with pytest.raises(ValueError, match=r".") as error:
        Compression(plain, task, folder, chosen, measure=flop_time).run()
    assert message in str(error.value)


def test_speed_out_of_reach_is_refused_before_anything_is_trained(plain, tmp_path, trainings):
    refused(plain, tmp_path, "`speedup` 50 is out of reach on this machine: the fastest of 9 candidates", Targets(50))
    assert trainings == []
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "speeds.json"}


def test_dense_model_that_has_learned_nothing_is_refused(plain, tmp_path, trainings):
    majority = dict.fromkeys(range(4), 0.5)  # what always answering "negative" reaches
    job = compression(plain, tmp_path, Targets(speedup=1.9), majority)
    message = (
        r"has learned nothing that could be kept: its accuracy on the 20 held-out rows is 0\.5000, not above the 0\.5000 of "
        r"the majority class \(negative\)\. .* `--force`"
    )
    with pytest.raises(ValueError, match=message):
        job.run()
    assert trainings == ["dense"]  # loaded, nothing else
    forced = compression(plain, tmp_path, Targets(speedup=1.9), majority, force=True)
    assert forced.run().met
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| majority class (negative) |  |  |  | 0.5000 |  |  |" in table
    assert "| majority class (negative) | 0.500 (0.352 to 0.648) | - |" in table


def test_a_dense_model_without_quality_has_no_shares(plain, tmp_path):
    nothing = dict.fromkeys(range(4), 0.0)
    with pytest.raises(ValueError, match="needs a dense model that has learned: its held-out accuracy is 0.0000"):
        compression(plain, tmp_path / "a", Targets(None, 0.9), nothing, force=True).run()
    shown = []
    compression(plain, tmp_path / "b", Targets(speedup=1.9), nothing, force=True).run(say=shown.append, show=shown.append)
    report = (tmp_path / "b" / "report.md").read_text(encoding="utf-8")
    assert "nan" not in report + "".join(shown)
    assert (
        "No share of the dense model's quality can be given (a dash): its accuracy is not above 0, or one is undefined."
        in report
    )
    summary = (tmp_path / "b" / "compress.json").read_text(encoding="utf-8")
    assert "NaN" not in summary
    assert json.loads(summary)["reported"]["retention"] is None


def test_output_of_another_run_is_refused(plain, tmp_path):
    compression(plain, tmp_path, Targets(2))
    compression(plain, tmp_path, Targets(3, 0.9))  # other targets, the same run
    with pytest.raises(ValueError, match="holds a run with another model, task or options"):
        compression(plain, tmp_path, Targets(2), seed=1)


def test_models_that_do_not_fit_the_task_are_refused(plain, tmp_path):
    three = replace(TASK, label_names=("negative", "neutral", "positive"))
    refused(plain, tmp_path, "predicts 2 labels, but the task 'moods' has 3: give a model that was fine-tuned", task=three)
    flipped = replace(TASK, label_names=("positive", "negative"))
    refused(plain, tmp_path, "numbers its labels ['negative', 'positive'], but the task 'moods' numbers them", task=flipped)
    AutoModel.from_pretrained(plain).save_pretrained(tmp_path / "base")
    refused(str(tmp_path / "base"), tmp_path, "has no trained task head (classifier.bias is missing): give a model that")
    model = to_shrp(AutoModelForSequenceClassification.from_pretrained(plain))
    model.prune_heads({0: [1]})
    model.save_pretrained(tmp_path / "pruned")
    refused(str(tmp_path / "pruned"), tmp_path, "this model is already pruned")
    assert not (tmp_path / "run.json").exists()


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`max_trials` must be at least 1, got 0"):
        replace(QUICK, max_trials=0)


# --- the command ---


def run(*words):
    return CliRunner().invoke(cli.app, ["compress", *map(str, words)])


def test_command_says_by_its_exit_code_whether_the_target_was_met(plain, tmp_path, monkeypatch):
    folder = tmp_path / "moods"
    folder.mkdir()
    for name, data in (("train.tsv", TASK.train), ("test.tsv", TASK.test)):
        lines = [f"{'un' * (name == 'train.tsv')}seen {row['text']}\t{row['label']}" for row in data]
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    accuracy = {0: 1.0, 1: 0.5, 2: 0.5, 3: 0.5}
    words = [plain, "--dataset", folder, "--output", tmp_path / "out", "--shape", "2x16", "--experts", "1,2"]
    words += ["--structures", "experts"]
    words += ["--speedup", 2, "--max-trials", 1, "--batch-size", 8, "--examples-per-epoch", 8, "--recovery-epochs", 0]
    monkeypatch.setitem(Compression.__init__.__kwdefaults__, "measure", flop_time)
    monkeypatch.setitem(Compression.__init__.__kwdefaults__, "predict", predict_by(accuracy))
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "The target is met" in done.output
    done = run(*words, "--keep-quality", 0.9)
    assert done.exit_code == 3, done.output
    assert "NOT met" in done.output


def test_command_explains_itself(plain, tmp_path):
    text = run("--help").output
    assert "shrp-hf compress" in text
    assert "Exit code 0" in text
    for option, value in (("--shape", "8-128"), ("--shape", "8x128x2"), ("--experts", "1;2")):
        done = run(plain, "--dataset", "sst2", "--output", tmp_path, "--speedup", 2, option, value)
        assert f"`{option[2:]}` must be written like" in str(done.exception)


# --- for real ---


@pytest.mark.slow
def test_docstrings_compress_to_four_times_the_speed(tmp_path):
    from shrp_hf.cli.train import _demo_model
    from shrp_hf.tasks import load_task

    task = load_task("docstrings", max_train=2700)
    options = CompressOptions(
        Targets(4, 0.9), dense_epochs=3, dense_learning_rate=1e-4, max_length=64, experts=(1, 4), max_trials=2
    )
    verdict = Compression(str(_demo_model()), task, tmp_path, options).run()
    assert verdict.dense_quality > 0.5
    assert verdict.chosen.speedup > 3.5
    assert verdict.chosen.retention > 0.85
    assert verdict.met == verdict.chosen.meets(options.targets)
