"""The commands, from a plain checkpoint and a folder of data to a model that loads."""

import ast
import inspect
import io
import json
import logging
import re
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import AutoModelForSequenceClassification, BertTokenizer, TrainerState
from typer.models import OptionInfo
from typer.testing import CliRunner

from shrp_hf import ShrpBertForSequenceClassification, cli, prune_heads
from shrp_hf.cli.app import NOT_VERIFIED
from shrp_hf.cli.panels import PANELS
from shrp_hf.cli.progress import one_bar_each
from shrp_hf.measuring import CostTable
from shrp_hf.plans.budget import Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.publishing.record import Rows, RunRecord, source_name
from shrp_hf.scoring import HeadStats
from shrp_hf.selectors import SELECTORS
from shrp_hf.selectors import base as selectors_base
from shrp_hf.tasks import load_task
from shrp_hf.training.recipes import Recipe
from shrp_hf.workflows import train as workflow
from shrp_hf.workflows.compress import Compression, CompressOptions, Targets
from shrp_hf.workflows.prune import PruneOptions, prune_posthoc
from shrp_hf.workflows.run_directory import problem_when_reopened
from shrp_hf.workflows.train import REOPENED, Workflow, WorkflowOptions
from tests.tiny import same_state, tiny_bert

GOOD, BAD = ("good", "great", "fine", "warm"), ("bad", "dull", "poor", "cold")
FILLERS = ("the", "film", "is", "very", "and", "a", "story")
QUICK = WorkflowOptions(
    num_expert_layers=1,
    recipe=Recipe("quick", specialise_epochs=1, recovery_epochs=1, distillation_logits=1, distillation_hidden_states=1),
    dense_epochs=1,
    batch_size=8,
    max_length=16,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "SST-2"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train.tsv", 64), ("test.tsv", 24)):
        lines = ["sentence\tlabel"]
        for i in range(count):
            words = [FILLERS[j] for j in torch.randint(len(FILLERS), (4,), generator=generator).tolist()]
            mood = (GOOD if i % 2 else BAD)[torch.randint(4, (1,), generator=generator).item()]
            lines.append(f"{' '.join(words)} {mood} {name[:2]}{i}\t{i % 2}")
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLERS]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tiny_bert(num_labels=2, max_position_embeddings=40).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def not_reopened(monkeypatch):
    """Leaves out the new process that opens what was trained, which costs seconds."""
    monkeypatch.setattr(workflow, "problem_when_reopened", lambda *args: "")


def run(*words):
    return CliRunner().invoke(cli.app, list(map(str, words)))


@pytest.mark.usefixtures("not_reopened")
def test_train_ends_with_three_models_and_a_report_and_takes_up_what_is_there(plain, data_dir, tmp_path):
    task = load_task("sst2", data_dir)
    report = Workflow(plain, task, tmp_path, QUICK).run()
    assert {"dense", "routed", "static", "report.md", "usage.png", "run.json"} <= {p.name for p in tmp_path.iterdir()}
    names = ("dense", "routed", "static")
    models = {name: AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in names}
    assert [m.config.expert_layers for m in models.values()] == [[], [2], [2]]
    assert models["routed"].config.routed
    assert not models["static"].config.routed
    assert sum(models["routed"].usage()[2]) == len(task.validation)
    kept = models["static"].config.kept_heads[2]
    assert kept == [max(range(4), key=lambda expert: models["routed"].usage()[2][expert])]
    text = report.read_text(encoding="utf-8")
    assert all(word in text for word in ("dense", "routed", "static", "Encoder + pooler", "Throughput", "95% interval"))

    card = ModelCard.load(tmp_path / "static" / "README.md")
    record = RunRecord.from_json(tmp_path / "static" / "shrp_record.json")
    assert [r.metric_value for r in card.data.eval_results] == [record.model.scores[0].value]
    assert f"accuracy {record.model.scores[0].value:.4f}" in text
    assert (record.method, record.calibration.count, record.model.name) == ("shrp", len(task.validation), "static")

    written = {name: (tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in models}
    (tmp_path / "static" / "config.json").unlink()  # as if killed before the last step was whole
    Workflow(plain, task, tmp_path, QUICK).run()
    again = {name: (tmp_path / name / "model.safetensors").stat().st_mtime_ns for name in models}
    assert again["dense"] == written["dense"]
    assert again["routed"] == written["routed"]
    assert again["static"] > written["static"]
    message = "holds a run with another model, task or options"
    with pytest.raises(ValueError, match=message):
        Workflow(plain, load_task("sst2", data_dir, max_train=20), tmp_path, QUICK)
    with pytest.raises(ValueError, match=message):
        Workflow(plain, task, tmp_path, WorkflowOptions())


@pytest.mark.usefixtures("not_reopened")
def test_train_without_routers_ends_with_a_static_model_and_says_how_its_experts_were_chosen(plain, data_dir, tmp_path):
    task = load_task("sst2", data_dir)
    options = replace(QUICK, recipe=replace(QUICK.recipe, expert_selector="his"), keep=2)
    report = Workflow(plain, task, tmp_path, options).run().read_text(encoding="utf-8")
    assert not {"routed", "usage.png"} & {p.name for p in tmp_path.iterdir()}
    converted, static = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("converted", "static")
    )
    assert converted.config.kept_heads == static.config.kept_heads
    assert len(static.config.kept_heads[2]) == 2
    assert not same_state(converted, static)  # the recovery trained it on
    assert report.startswith("# sst2: dense, converted, static\n")
    assert "No routers: the 2 best heads of each layer in the dense model, by `his`" in report
    card = (tmp_path / "static" / "README.md").read_text(encoding="utf-8")
    assert "SHRP without routers" in card
    assert "the most used experts" not in card
    record = RunRecord.from_json(tmp_path / "static" / "shrp_record.json")
    assert (record.method, record.calibration) == ("shrp-without-routers", Rows(len(task.train), "training rows of sst2"))


@pytest.mark.parametrize("selector", sorted(set(SELECTORS) - {"usage", "cahp", "cahp-direct"}))
def test_prune_writes_a_smaller_model_by_every_selector(selector, plain, data_dir, tmp_path):
    words = ("prune", plain, "--dataset", "sst2", "--data-dir", data_dir, "--selector", selector, "--keep", 0.5)
    result = run(*words, "--output", tmp_path, "--calibration-samples", 32, "--max-length", 16)
    assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    plan = KeepPlan.from_json(tmp_path / "plan.json")
    assert plan.num_kept == 6
    assert model.config.kept_heads == [list(heads) for heads in plan.kept]
    assert (tmp_path / "heads.png").exists()
    record = RunRecord.from_json(tmp_path / "shrp_record.json")
    assert (record.method, record.kept, record.training) == (selector, plan, None)
    assert record.calibration == Rows(32, "training rows of sst2")
    means = HeadStats.load(tmp_path / "scores.safetensors").output_means()
    expected = prune_heads(AutoModelForSequenceClassification.from_pretrained(plain), plan, means)
    assert same_state(model, expected)
    assert ModelCard.load(tmp_path / "README.md").data.eval_results[0].metric_value == record.model.scores[0].value
    assert "6 of 12 heads stay" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_prune_with_zeros_leaves_nothing_of_what_is_cut(plain, data_dir, tmp_path):
    words = ("prune", plain, "--dataset", "sst2", "--data-dir", data_dir, "--selector", "magnitude", "--keep", 0.5, "--zeros")
    assert run(*words, "--output", tmp_path, "--max-length", 16).exit_code == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    plan = KeepPlan.from_json(tmp_path / "plan.json")
    assert same_state(model, prune_heads(AutoModelForSequenceClassification.from_pretrained(plain), plan))
    assert RunRecord.from_json(tmp_path / "shrp_record.json").calibration is None
    assert not (tmp_path / "scores.safetensors").exists()


def test_prune_by_cahp_draws_its_plane(plain, data_dir, tmp_path):
    words = ("prune", plain, "--dataset", "sst2", "--data-dir", data_dir, "--selector", "cahp", "--heads", 5)
    result = run(*words, "--output", tmp_path, "--signature-size", 4, "--recovery-epochs", 1)
    assert result.exit_code == 0, result.output
    assert KeepPlan.from_json(tmp_path / "plan.json").num_kept >= 5
    assert (tmp_path / "clusters.png").exists()


def test_prune_by_cahp_without_a_plane_draws_the_knee_alone(plain, data_dir, tmp_path):
    words = ("prune", plain, "--dataset", "sst2", "--data-dir", data_dir, "--selector", "cahp-direct", "--knee-degree", 2)
    result = run(*words, "--output", tmp_path, "--signature-size", 4)
    assert result.exit_code == 0, result.output
    plan = KeepPlan.from_json(tmp_path / "plan.json")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.kept_heads == [list(h) for h in plan.kept]
    assert RunRecord.from_json(tmp_path / "shrp_record.json").options["signature_size"] == 4
    assert (tmp_path / "knee.png").exists()
    assert not (tmp_path / "clusters.png").exists()


@pytest.mark.parametrize("words", [("--keep-flops", 0.5), ("--speedup", 1.5), ("--keep", 0.5, "--neurons")])
def test_prune_cuts_heads_and_neurons_within_one_budget(words, plain, data_dir, tmp_path, monkeypatch):
    table = CostTable("seconds", 1.0, 1.0, (0, 4), (0.0, 8.0), (0, 64), (0.0, 16.0))
    asked = []
    monkeypatch.setattr(selectors_base, "latency_table", lambda model, at: asked.append(at) or table)
    words = ("prune", plain, "--dataset", "sst2", "--data-dir", data_dir, "--selector", "his", *words)
    more = ("--shape", "1x16", "--runtime", "onnx", "--threads", 1, "--max-length", 16)
    result = run(*words, *more, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    plan = KeepPlan.from_json(tmp_path / "plan.json")
    assert plan.num_kept_neurons < 192
    assert model.config.intermediate_sizes == [len(left) for left in plan.neurons]
    if "--speedup" in words:
        assert set(asked) == {Serving(1, 16, "onnx", 1)}
        layers = zip(map(len, plan.kept), map(len, plan.neurons), strict=True)
        assert table.total(layers) <= table.total([(4, 64)] * 3) / 1.5
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"{plan.num_kept} of 12 heads and {plan.num_kept_neurons} neurons stay" in report


def test_prune_names_the_best_speedup_before_it_scores_or_trains(plain, data_dir, tmp_path, monkeypatch):
    table = CostTable("seconds", 1.0, 1.0, (0, 4), (0.0, 8.0), (0, 64), (0.0, 16.0))
    monkeypatch.setattr(selectors_base, "latency_table", lambda model, at: table)
    options = PruneOptions(selector="his", speedup=50, recovery_epochs=1)
    with pytest.raises(ValueError, match=r"the least that can be reached is 1.6e\+04 ms, 21.1%, a speed-up of 4.75x"):
        prune_posthoc(plain, load_task("sst2", data_dir), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_prune_refuses_what_is_no_shape(plain, tmp_path):
    result = run("prune", plain, "--dataset", "sst2", "--speedup", 2, "--shape", "8by128", "--output", tmp_path)
    assert result.exit_code == 2
    assert "'8by128' is no shape such as 8x128" in result.output


def test_prune_by_measured_quality(plain, data_dir, tmp_path):
    words = ("prune", plain, "--dataset", "sst2", "--data-dir", data_dir, "--keep-quality", 0.5, "--output", tmp_path)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert 3 <= KeepPlan.from_json(tmp_path / "plan.json").num_kept <= 12


@pytest.fixture(scope="module")
def routed(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    model = ShrpBertForSequenceClassification.from_pretrained(plain, expert_layers=2)
    for layer in (1, 2):
        model.layers[layer].router.usage += torch.tensor([1, 5, 2, 9])
    model.save_pretrained(folder)
    BertTokenizer.from_pretrained(plain).save_pretrained(folder)
    return folder


def test_prune_by_usage_leaves_a_static_encoder(routed, data_dir, tmp_path):
    words = ("prune", routed, "--dataset", "sst2", "--data-dir", data_dir, "--selector", "usage")
    result = run(*words, "--heads", 2, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.kept_heads == [[0, 1, 2, 3], [3], [3]]
    assert not model.config.routed


def test_prune_recovers_by_its_recipe_and_its_teacher(routed, plain, data_dir, tmp_path):
    words = ("prune", routed, "--dataset", "sst2", "--data-dir", data_dir, "--selector", "usage", "--heads", 2, "--bf16")
    variants = {"itself": (), "dense": ("--teacher", plain), "nobody": ("--recipe", "paper"), "none": None}
    for name, more in variants.items():
        epochs = 0 if more is None else 1
        result = run(*words, "--recovery-epochs", epochs, *(more or ()), "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in variants]
    assert not any(same_state(one, other) for one, other in combinations(models, 2))
    options = RunRecord.from_json(tmp_path / "dense" / "shrp_record.json").options
    assert (options["recipe"], options["teacher"]) == ("default", source_name(plain))


def test_prune_refuses_a_teacher_of_another_task_and_an_unknown_recipe(plain, data_dir, tmp_path):
    three = tmp_path / "three"
    tiny_bert(num_labels=3, max_position_embeddings=40).save_pretrained(three)
    task = load_task("sst2", data_dir)
    message = f"`{three}` predicts 3 labels, but the task 'sst2' has 2: give a model that was fine-tuned on it."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prune_posthoc(plain, task, tmp_path / "out", PruneOptions(keep=0.5, teacher=str(three), recovery_epochs=1))
    with pytest.raises(ValueError, match="^`recipe` must be one of default, paper, got 'mine'.$"):
        prune_posthoc(plain, task, tmp_path / "out", PruneOptions(keep=0.5, recipe="mine"))
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_that_would_change_nothing_is_refused(plain, data_dir, tmp_path):
    task = load_task("sst2", data_dir)
    with pytest.raises(ValueError, match="^`learning_rate` 0.0001 would change nothing, .*give `recovery_epochs`"):
        prune_posthoc(plain, task, tmp_path / "out", PruneOptions(keep=0.5, learning_rate=1e-4))
    with pytest.raises(ValueError, match="^`recovery_learning_rate` must be above 0, got -1"):
        prune_posthoc(plain, task, tmp_path / "out", PruneOptions(keep=0.5, recovery_epochs=1, learning_rate=-1))


@pytest.mark.parametrize("options", [{}, {"recovery_epochs": 1, "recipe": "paper"}])
def test_prune_refuses_a_teacher_that_would_teach_nothing(options, plain, data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"^`teacher` .* would teach nothing: give `recovery_epochs`, and a recipe"):
        prune_posthoc(plain, load_task("sst2", data_dir), tmp_path / "out", PruneOptions(keep=0.5, teacher=plain, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"selector": "hise", "keep": 0.5},
            "`selector` must be one of cahp, cahp-direct, entropy, hies, his, magnitude, random, usage, got 'hise'.",
            id="unknown selector",
        ),
        pytest.param(
            {},
            "Give exactly one of `keep`, `heads`, `speedup`, `keep_latency`, `keep_flops`, `keep_parameters`, `keep_quality`, "
            "`knee_degree`, got none.",
            id="no budget",
        ),
        pytest.param(
            {"keep": 0.5, "heads": 3},
            "Give exactly one of `keep`, `heads`, `speedup`, `keep_latency`, `keep_flops`, `keep_parameters`, `keep_quality`, "
            "`knee_degree`, got ['keep', 'heads'].",
            id="two budgets",
        ),
        pytest.param(
            {"selector": "his", "keep": 0.5, "alpha": 0.3},
            "`alpha=0.3` belongs to the selector hies, not to 'his'.",
            id="alpha without hies",
        ),
        pytest.param(
            {"selector": "cahp", "keep": 0.5, "per_layer": True},
            "`per_layer=True` does not suit CAHP: its clusters reach over layers. Take another selector.",
            id="clusters of one layer",
        ),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=r".") as error:
        PruneOptions(**options).make_selector(lambda plan: 0.0)
    assert str(error.value) == message


def test_inspect_prints_layers_and_the_three_counts(plain):
    result = run("inspect", plain)
    assert result.exit_code == 0, result.output
    assert "ordinary" in result.output
    assert "encoder + pooler" in result.output


def test_inspect_prints_json_alone_for_scripts(plain):
    found = json.loads(run("inspect", plain, "--json").stdout)
    assert found["model_type"] == "shrp_bert"
    assert [(layer["kind"], len(layer["kept"])) for layer in found["layers"]] == [("ordinary", 4)] * len(found["layers"])
    assert found["parameters"]["encoder"] < found["parameters"]["whole"]


def test_defaults_of_options_stand_in_one_place():
    files = Path(cli.__file__).parent.glob("*.py")
    found = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    defaults = [default for node in found if isinstance(node, ast.FunctionDef) for default in node.args.defaults]
    values = [default.value for default in defaults if isinstance(default, ast.Constant)]
    assert {value for value in values if type(value) in (int, float)} <= {0}  # all others are names in shrp_hf.defaults


def test_every_option_has_one_panel_and_every_panel_options():
    listed = [name for names in PANELS.values() for name in names.split()]
    assert len(listed) == len(set(listed))
    commands = [inspect.signature(command.callback).parameters for command in cli.app.registered_commands]
    options = {
        name
        for parameters in commands
        for name, parameter in parameters.items()
        if any(isinstance(info, OptionInfo) for info in parameter.annotation.__metadata__)
    }
    assert options == set(listed)
    text = run("prune", "--help").stdout
    assert [title for title in PANELS if title in text] == list(PANELS)


@pytest.mark.parametrize("command", ["inspect", "train", "prune", "demo", "card"])
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"shrp-hf {command}" in result.output


def test_error_is_one_line_and_exit_code_1(plain, monkeypatch, capsys, tmp_path):
    words = ["shrp-hf", "prune", plain, "--dataset", "sst3", "--data-dir", str(tmp_path), "--keep", "0.5", "--output", "x"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    captured = capsys.readouterr().err
    assert captured.startswith("Error:")
    assert "Traceback" not in captured


def test_run_json_holds_what_was_run(plain, data_dir, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    Workflow(plain, load_task("sst2", data_dir), tmp_path, QUICK)
    identity = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert identity["model"] == plain
    assert identity["num_expert_layers"] == 1


# --- the end of a long run ---


def classifier(plain, folder):
    """A saved classifier, the tokenised rows and the tokenizer that it is checked with."""
    tokenizer = BertTokenizer.from_pretrained(plain)
    model = ShrpBertForSequenceClassification.from_pretrained(plain).eval()
    model.save_pretrained(folder, with_code=True)
    rows = Dataset.from_list([{**tokenizer(f"the film is {word}"), "label": 0} for word in GOOD + BAD])
    return model, rows, tokenizer


def test_what_is_reopened_is_compared_in_double_and_nothing_is_raised(plain, tmp_path):
    model, rows, tokenizer = classifier(plain, tmp_path)
    assert problem_when_reopened(tmp_path, model, rows, tokenizer) == ""
    with torch.no_grad():
        model.classifier.bias[0] += 1e-5  # far below what float32 may round of a large output
    problem = problem_when_reopened(tmp_path, model, rows, tokenizer)
    assert re.fullmatch(r"`.*` gives other outputs in a new process, by up to 1\.0e-05 in float64\.", problem)
    assert model.dtype == torch.float32
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert " does not open in a new process:\n" in problem_when_reopened(tmp_path, model, rows, tokenizer)


def test_a_static_model_that_is_not_verified_is_kept_reported_and_has_its_own_exit_code(
    plain, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(workflow, "problem_when_reopened", lambda *args: "`static` gives other outputs.")
    words = ("train", plain, "--dataset", "sst2", "--data-dir", data_dir, "--num-expert-layers", 1, "--max-length", 16)
    epochs = ("--dense-epochs", 1, "--recipe", "paper", "--specialise-epochs", 1)
    result = run(*words, *epochs, "--output", tmp_path)
    assert result.exit_code == NOT_VERIFIED == 4
    assert "`static` gives other outputs." in result.stderr
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "static").config.expert_layers == [2]
    assert "**Not verified**: `static` gives other outputs." in (tmp_path / "report.md").read_text(encoding="utf-8")

    # The table is what the terminal ends with, and nothing of the libraries' own stands before it.
    assert max(result.stdout.rindex(text) for text in ("Written to", "Kept:", "Reported on")) < result.stdout.rindex("dense")
    assert not [word for word in ("'loss'", "grad_norm", "Loading weights", "examples/s") if word in result.output]
    monkeypatch.undo()
    again = run(*words, *epochs, "--output", tmp_path)  # takes up the models, and checks once more
    assert again.exit_code == 0, again.output
    assert REOPENED in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_the_pictures_need_is_asked_for_before_the_work(plain, data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    task = load_task("sst2", data_dir)
    for start in (
        lambda: Workflow(plain, task, tmp_path / "out", QUICK),
        lambda: Compression(plain, task, tmp_path / "out", CompressOptions(Targets(speedup=2.0))),
        lambda: prune_posthoc(plain, task, tmp_path / "out", PruneOptions(keep=0.5)),
    ):
        with pytest.raises(ImportError, match=r"^Pictures need matplotlib: pip install 'shrp-hf\[plots\]'\.$"):
            start()
    assert not (tmp_path / "out").exists()


def test_each_training_draws_one_bar_and_a_failed_one_gives_the_terminal_back():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    state = TrainerState(max_steps=3)

    def fail():
        with one_bar_each(console) as bar:
            assert datasets.are_progress_bars_disabled()
            for _ in range(2):
                state.global_step = 0
                bar.on_train_begin(None, state, None)
                bar.on_log(None, state, None, logs={"loss": 0.25})
                for state.global_step in (1, 2, 3):
                    bar.on_step_end(None, state, None)
                bar.on_train_end(None, state, None)
            bar.on_train_begin(None, state, None)
            raise RuntimeError(bar)

    with pytest.raises(RuntimeError) as stopped:
        fail()
    assert stopped.value.args[0].progress is None
    assert not datasets.are_progress_bars_disabled()
    text = console.file.getvalue()
    assert "loss 0.250" in text
    assert text.count("3/3") >= 2
