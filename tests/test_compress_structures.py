"""Compression over several structures: what is planned, measured, tried, chosen and written, and for which families."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EvalPrediction,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from shrp_hf.measuring import flop_table
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import to_shrp
from shrp_hf.structures import keep_layers, thin_reach
from shrp_hf.training.recipes import find_recipe
from shrp_hf.workflows.compress import (
    STRUCTURES,
    Compression,
    Experts,
    FirstLayers,
    SpreadLayers,
    Targets,
    Thin,
    Trial,
    Uniform,
)
from shrp_hf.workflows.compress import run as compress_run
from shrp_hf.workflows.compress.candidates import candidates, probes, rungs, table_error, untrained, worthwhile
from shrp_hf.workflows.compress.search import best, check_reachable, search
from tests.test_compress import QUICK, TASK, WORDS, flop_time, plain  # noqa: F401
from tests.test_families import TABLE, outputs, stock
from tests.tiny import randomize_, same_state, tiny_bert
from tests.toy_family import ToyConfig, ToyForSequenceClassification, forgotten_afterwards, register

RECIPE = replace(find_recipe("default"), recovery_epochs=1)


def kind_of(config):
    """Which structure a model has, by its config."""
    if config.expert_layers:
        return "experts"
    if config.num_hidden_layers < 3:
        return "layers"
    widths = config.intermediate_sizes
    if widths is None and config.kept_heads is None:
        return "dense"
    shapes = {(len(config.heads_of(i)), width) for i, width in enumerate(widths)}
    return "uniform" if len(shapes) == 1 else "thin"


def predict_by_kind(**accuracy):
    """Stands in for a forward pass."""

    def predict(model, data, tokenizer):
        labels = np.array(data["label"])
        num_correct = round({"dense": 1.0, **accuracy}[kind_of(model.config)] * len(labels))
        answers = np.where(np.arange(len(labels)) < num_correct, labels, 1 - labels)
        return EvalPrediction(np.eye(2)[answers], labels)

    return predict


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Costs are counted, few resamples are drawn, and the result is opened in a new process in one test only."""
    monkeypatch.setattr("shrp_hf.workflows.compress.verdict.NUM_RESAMPLES", 50)
    monkeypatch.setattr(compress_run, "latency_table", flop_table)
    if "new_process" not in request.node.name:
        monkeypatch.setattr(compress_run, "problem_when_reopened", lambda *args: "")


@pytest.fixture
def trained(monkeypatch):
    """The names of what was recovered, in order."""
    names, original = [], compress_run.recover

    def counted(*args, **kwargs):
        names.append(kwargs["name"].removeprefix("static-"))
        return original(*args, **kwargs)

    monkeypatch.setattr(compress_run, "recover", counted)
    return names


def compression(model, folder, targets, accuracy=None, **options):
    predict = {} if accuracy is None else {"predict": predict_by_kind(**accuracy)}
    options = {"recipe": RECIPE, "experts": None, "force": accuracy is None, **options}
    return Compression(str(model), TASK, folder, replace(QUICK, targets=targets, **options), measure=flop_time, **predict)


# --- candidates ---


def test_candidates_of_every_structure():
    found = candidates(tiny_bert())
    assert [c for c in found if c.structure == "uniform"] == [Uniform(1, 16), Uniform(2, 32), Uniform(3, 48)]
    assert [c for c in found if c.structure == "spread"] == [SpreadLayers(2)]
    assert [c for c in found if c.structure == "first"] == [FirstLayers(1), FirstLayers(2)]
    assert {c.structure for c in found} == set(STRUCTURES) - {"thin"}  # whose plans need scores
    assert SpreadLayers(2).layers(6) == [0, 5]
    assert FirstLayers(2) != SpreadLayers(2)
    assert len({candidate.name for candidate in found}) == len(found)


@pytest.mark.parametrize("family", TABLE)
def test_every_family_has_every_structure(family):
    assert {c.structure for c in candidates(stock(family))} == set(STRUCTURES) - {"thin"}


def test_registered_family_has_the_other_structures():
    with forgotten_afterwards():
        register()
        assert {c.structure for c in candidates(ToyForSequenceClassification(ToyConfig()))} == {"uniform", "spread", "first"}


@pytest.mark.parametrize("candidate", [Uniform(2, 32), FirstLayers(2), SpreadLayers(2)], ids=lambda c: c.name)
def test_untrained_shape_is_that_of_the_candidate(candidate):
    dense = to_shrp(tiny_bert())
    before = copy.deepcopy(dense)
    model = untrained(dense, candidate)
    if candidate.structure == "uniform":
        assert model.config.intermediate_sizes == [32] * 3
        assert [len(model.config.heads_of(i)) for i in range(3)] == [2] * 3
    else:
        assert len(model.layers) == model.config.num_hidden_layers == 2
        assert model.layers[1].output.dense.weight is dense.layers[candidate.layers(3)[1]].output.dense.weight
    assert same_state(dense, before)
    assert dense.config.num_hidden_layers == len(dense.layers) == 3
    word = "bert.embeddings.word_embeddings.weight"
    assert model.get_parameter(word) is dense.get_parameter(word)


@pytest.mark.parametrize("family", TABLE)
@pytest.mark.parametrize("candidate", [FirstLayers(2), SpreadLayers(2), Uniform(2, 24), Experts(2, 1)], ids=lambda c: c.name)
def test_every_family_takes_every_shape(family, candidate, tmp_path):
    dense = to_shrp(stock(family))
    model = untrained(dense, candidate)
    if isinstance(candidate, FirstLayers):
        short = keep_layers(dense, candidate.layers(3))
        torch.testing.assert_close(outputs(short, family), outputs(model, family), rtol=0, atol=1e-10)
        assert not torch.equal(outputs(short, family), outputs(dense, family))
    else:
        short = model
        assert short.config.intermediate_sizes == ([24] * 3 if isinstance(candidate, Uniform) else None)
    short.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float64)
    assert same_state(loaded, short)
    torch.testing.assert_close(outputs(loaded, family), outputs(short, family), rtol=0, atol=1e-10)


def test_candidates_are_beaten_by_their_own_structure_only():
    speeds = {
        Uniform(2, 32): 2.0,
        Uniform(1, 16): 1.9,  # smaller, and slower all the same
        FirstLayers(2): 1.5,
        FirstLayers(1): 3.0,
        Experts(1, 4): 1.4,
    }
    assert worthwhile(speeds) == [Experts(1, 4), FirstLayers(2), Uniform(2, 32), FirstLayers(1)]


def test_rungs_leave_a_margin_and_stay_within_reach():
    assert rungs(4, 100) == [4, 4.2, 4.4, 4.8, 5.4, 6.4]
    assert rungs(4, 4.3) == [4, 4.2]
    assert rungs(4, 3.9) == []
    assert rungs(None, 3.5) == [1.25, 1.5, 2, 2.5, 3]


# --- search ---


def thin(times):
    return Thin(times, KeepPlan(((0,),), 4))


SPEEDS = {
    **{thin(times): times for times in (2.0, 3.0, 4.0, 5.0)},
    **{Uniform(heads, 8 * heads): 6.0 - heads for heads in (1, 2, 3, 4)},
    **{Experts(layers, 1): float(layers) for layers in (2, 3, 4)},
    **{FirstLayers(count): 5.5 - count for count in (1, 2, 3)},
}


def trials_of(targets, quality, max_trials=99, measured=None):
    def attempt(candidate):
        share = quality(candidate)
        if share is None:
            raise KeyboardInterrupt
        return Trial(candidate, share, share, (measured or {}).get(candidate.name, SPEEDS[candidate]))

    trials = search(worthwhile(SPEEDS), SPEEDS, targets, attempt, max_trials)
    return [trial.candidate.name for trial in trials], best(trials, targets).candidate.name


def test_with_a_speed_alone_every_structure_has_one_turn_and_the_best_is_kept():
    quality = {"thin": 0.9, "uniform": 0.8, "experts": 0.95, "first": 0.7}
    names = ["thin-4x", "uniform-2h16n", "4x1", "first-1"]
    assert trials_of(Targets(4), lambda c: quality[c.structure]) == (names, "4x1")
    assert trials_of(Targets(4), lambda c: quality[c.structure], max_trials=2) == (names[:2], "thin-4x")
    slow = {"thin-4x": 3.98}
    assert trials_of(Targets(4), lambda c: quality[c.structure], 99, slow) == ([*names, "thin-5x"], "4x1")


def test_with_both_targets_the_first_that_meets_them_ends_the_search():
    assert trials_of(Targets(4, 0.9), lambda c: 0.95) == (["thin-4x"], "thin-4x")
    only_experts = {"experts": 0.95}
    names = ["thin-4x", "uniform-2h16n", "4x1"]
    assert trials_of(Targets(4, 0.9), lambda c: only_experts.get(c.structure, 0.5)) == (names, "4x1")


def test_with_a_quality_alone_later_structures_must_be_faster():
    names, kept = trials_of(Targets(None, 0.9), lambda c: 0.95 if SPEEDS[c] <= 4 or c.structure == "uniform" else 0.5)
    assert names == ["thin-3x", "thin-4x", "thin-5x", "uniform-1h8n"]  # nothing else is faster than that
    assert kept == "uniform-1h8n"


def test_interrupted_trial_ends_the_search_with_those_before_it():
    assert trials_of(Targets(4), lambda c: {"thin": 0.9}.get(c.structure)) == (["thin-4x"], "thin-4x")
    with pytest.raises(KeyboardInterrupt):
        trials_of(Targets(4), lambda c: None)


def test_unreachable_speed_names_what_thin_layers_reach():
    message = (
        "`speedup` 9 is out of reach on this machine: thin layers run 7.25x as fast as the dense model. Ask for at most 7.25, "
        "or measure at another `shape`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_reachable(SPEEDS, Targets(9), 6, thin=7.25)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_reachable({}, Targets(9), 6, thin=7.25)
    check_reachable(SPEEDS, Targets(7), 6, thin=7.25)
    with pytest.raises(ValueError, match="No candidate runs faster than the dense model"):
        check_reachable({}, Targets(9), 6)


# --- the whole job ---


def test_thin_layers_win_and_open_in_a_new_process(plain, tmp_path, trained):  # noqa: F811
    accuracy = {"thin": 0.95, "uniform": 0.9, "experts": 0.8, "layers": 0.7}
    shown = []
    job = compression(plain, tmp_path, Targets(2), accuracy)
    verdict = job.run(say=shown.append, show=shown.append)
    assert verdict.met
    assert not verdict.problem
    assert verdict.chosen.candidate.structure == "thin"
    assert [trial.candidate.structure for trial in verdict.trials] == ["thin", "uniform", "experts", "first"]
    assert trained == [trial.candidate.name for trial in verdict.trials]
    assert all(trial.speedup >= 2 for trial in verdict.trials)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert kind_of(model.config) == "thin"
    assert same_state(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "trials" / trained[0]))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**The target is met**: 3 thin layers, " in report
    assert f"The best of another structure is {trained[1]}: {trained[0]} has 0.9500 at" in report
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "Thin layers: the heads (by HIS)" in card
    assert "| layer | kind | kept | heads | neurons |" in card
    assert "training rows of moods" in card
    summary = json.loads((tmp_path / "compress.json").read_text(encoding="utf-8"))
    assert summary["chosen"]["structure"] == "thin"
    assert len(summary["trials"]) == 4
    assert any("Thin layers, by FLOPs: up to" in text for text in shown)


def test_first_usable_model_is_there_before_the_second_is_trained(plain, tmp_path, monkeypatch):  # noqa: F811
    accuracy = {"thin": 0.8, "uniform": 0.9, "experts": 0.8, "layers": 0.7}
    seen, original = [], compress_run.recover

    def spied(*args, **kwargs):
        folder = tmp_path / "model"
        seen.append(kind_of(AutoModelForSequenceClassification.from_pretrained(folder).config) if folder.exists() else None)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(compress_run, "recover", spied)
    verdict = compression(plain, tmp_path, Targets(2), accuracy).run()
    assert seen == [None, "thin", "uniform"]
    assert [trial.candidate.structure for trial in verdict.trials] == ["thin", "uniform"]
    assert verdict.chosen.candidate.structure == "uniform"
    assert (tmp_path / "model" / "README.md").exists()


def test_plans_are_kept_and_nothing_is_trained_twice(plain, tmp_path, trained, monkeypatch):  # noqa: F811
    accuracy = {"thin": 0.95}
    first = compression(plain, tmp_path, Targets(2), accuracy, structures=("thin",)).run()
    assert len(trained) == 1
    trained.clear()
    monkeypatch.setattr(compress_run, "thin_plan", lambda *args: 1 / 0)
    monkeypatch.setattr(compress_run, "score", lambda *args, **kwargs: 1 / 0)
    again = compression(plain, tmp_path, Targets(2, 0.9), accuracy, structures=("thin",)).run()
    assert trained == []
    assert again.chosen.candidate.plan == first.chosen.candidate.plan


def garbage_table(model, at, anew=False):
    """A table as it is measured while other work runs: heads cost nothing."""
    table = flop_table(model, at)
    free = (0.0,) * len(table.attention)
    return replace(table, unit="seconds", attention=free, fixed=table.fixed / 2)


def test_table_that_misjudges_what_is_measured_is_made_anew_or_left(plain, tmp_path, monkeypatch):  # noqa: F811
    made = []

    def tables(model, at, anew=False):
        made.append(anew)
        good = replace(flop_table(model, at), unit="seconds")
        return good if anew and len(made) == 2 else garbage_table(model, at)

    monkeypatch.setattr(compress_run, "latency_table", tables)
    shown = []
    for name, unit in (("again", "seconds"), ("never", "FLOPs")):
        job = compression(plain, tmp_path / name, Targets(5000), {}, structures=("thin",))
        with pytest.raises(ValueError, match="`speedup` 5000 is out of reach"):  # judged before anything is trained
            job.run(show=shown.append)
        assert job.table.unit == unit
        assert made[:2] == [False, True]
        assert any("misjudges what was measured by" in text and "planned by FLOPs" in text for text in shown) == (
            unit == "FLOPs"
        )


def test_plans_that_turn_out_too_slow_are_followed_by_faster_ones(plain, tmp_path):  # noqa: F811
    def slower(models, *shape, num_rounds):
        """Half of the time is no layer's: what is planned for 2x runs 1.3x."""
        timings = flop_time(models, *shape, num_rounds=num_rounds)
        more = timings["dense"].seconds[0][0]
        later = {name: tuple((value + more,) for (value,) in timing.seconds) for name, timing in timings.items()}
        return {name: replace(timing, seconds=later[name]) for name, timing in timings.items()}

    job = compression(plain, tmp_path, Targets(1.5), {"thin": 0.95, "uniform": 0.95}, structures=("thin",))
    job.measure = slower
    verdict = job.run()
    assert verdict.met
    assert verdict.chosen.candidate.speedup > 1.5 * 1.6


def test_error_of_a_table_is_the_worst_of_uniform_layers():
    dense = to_shrp(tiny_bert())
    table = flop_table(dense, compress_run.Serving(2, 16))
    whole = table.total([(4, 64)] * 3)
    exact = {Uniform(h, n): whole / table.total([(h, n)] * 3) for h, n in ((1, 16), (2, 32), (3, 48))}
    assert table_error(table, dense, {**exact, FirstLayers(1): 9.0}) == pytest.approx(0)
    assert table_error(table, dense, {c: 1.25 * speed for c, speed in exact.items()}) == pytest.approx(0.25)
    assert table_error(table, dense, {c: speed / 1.25 for c, speed in exact.items()}) == pytest.approx(0.25)
    assert table_error(table, dense, {c: speed * (1.25 if c.heads == 2 else 1) for c, speed in exact.items()}) > 0.24
    assert len(set(probes(dense))) == 4
    with pytest.raises(ValueError, match="at least one of uniform layers"):
        table_error(table, dense, {FirstLayers(1): 9.0})


def test_quality_alone_finds_the_fastest_thin_layers(plain, tmp_path):  # noqa: F811
    accuracy = {"thin": 0.95, "uniform": 0.95}  # the thinnest are all alike
    job = compression(plain, tmp_path, Targets(None, 0.9), accuracy, structures=("thin",))
    verdict = job.run()
    assert verdict.met
    assert len(verdict.trials) > 1
    assert verdict.chosen.speedup == max(job.speeds(list(verdict.speeds)).values())


def test_unreachable_speed_is_refused_before_anything_is_scored_or_trained(plain, tmp_path, trained, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compress_run, "score", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(compress_run, "fine_tune", lambda *args, **kwargs: 1 / 0)
    reach = thin_reach(tiny_bert(), flop_table(tiny_bert(num_labels=2), compress_run.Serving(2, 16)))
    with pytest.raises(ValueError, match=rf"`speedup` 5000 is out of reach on this machine: thin layers run {reach:.2f}x"):
        compression(plain, tmp_path, Targets(5000), structures=("thin", "uniform")).run()
    assert trained == []


def distilbert():
    return DistilBertConfig(dim=32, n_heads=4, n_layers=3, hidden_dim=64, vocab_size=99, max_position_embeddings=40)


def modernbert():
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    return ModernBertConfig(**sizes, pad_token_id=0, max_position_embeddings=40)


@pytest.mark.parametrize(
    ("config", "head"),
    [(distilbert, DistilBertForSequenceClassification), (modernbert, ModernBertForSequenceClassification)],
)
def test_other_families_are_compressed(config, head, tmp_path, trained):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    model = head(config()).eval()
    randomize_(model)
    model.config.id2label, model.config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    model.save_pretrained(tmp_path / "dense")
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    verdict = compression(tmp_path / "dense", tmp_path / "out", Targets(1.5)).run()
    tried = [trial.candidate.structure for trial in verdict.trials]
    assert tried == ["thin", "uniform", "experts", "first"]  # two layers are too slow
    assert verdict.chosen.speedup >= 1.5
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert type(opened).__name__ == f"Shrp{head.__name__}"


def test_layers_are_those_of_the_dense_model_trained_on(plain, tmp_path):  # noqa: F811
    recipe = replace(RECIPE, recovery_epochs=0)
    compression(plain, tmp_path, Targets(1.2), structures=("spread",), recipe=recipe).run()
    dense, short = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("dense", "model"))
    assert short.config.num_hidden_layers == 2
    assert same_state(short.layers[1], to_shrp(dense).layers[2])
    assert torch.equal(short.classifier.weight, dense.classifier.weight)
    assert "evenly spread over its depth" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_structures_that_are_none_are_refused():
    with pytest.raises(
        ValueError, match=r"`structures` must be some of thin, uniform, experts, spread, first, got \['wide'\]"
    ):
        replace(QUICK, structures=("wide",))
    with pytest.raises(ValueError, match="`structures` must be some of"):
        replace(QUICK, structures=())
    with pytest.raises(ValueError, match=r"`experts` \[1\] is about expert layers, which `structures` leaves out"):
        replace(QUICK, structures=("thin",), experts=(1,))


def test_command_takes_structures(plain, tmp_path, monkeypatch):  # noqa: F811
    from typer.testing import CliRunner

    from shrp_hf import cli

    folder = tmp_path / "moods"
    folder.mkdir()
    for name, data in (("train.tsv", TASK.train), ("test.tsv", TASK.test)):
        lines = [f"{'un' * (name == 'train.tsv')}seen {row['text']}\t{row['label']}" for row in data]
        (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    monkeypatch.setitem(Compression.__init__.__kwdefaults__, "measure", flop_time)
    monkeypatch.setitem(Compression.__init__.__kwdefaults__, "predict", predict_by_kind(thin=0.95, uniform=0.9))
    words = ["compress", plain, "--dataset", str(folder), "--output", str(tmp_path / "out"), "--shape", "2x16"]
    words += ["--speedup", "2", "--recovery-epochs", "0", "--structures"]
    done = CliRunner().invoke(cli.app, [*words, "thin,uniform"])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "compress.json").read_text(encoding="utf-8"))
    assert [trial["structure"] for trial in summary["trials"]] == ["thin", "uniform"]
    done = CliRunner().invoke(cli.app, [*words, "wide"])
    assert "`structures` must be some of thin" in str(done.exception)
