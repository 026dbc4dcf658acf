"""Comparisons: the grid, cells that survive a kill, runs that share the work, tables, pictures, one page with everything."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plotly.offline import get_plotlyjs
from transformers import BertTokenizer
from typer.testing import CliRunner

from experiments import results as page
from shrp_hf import cli
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.tasks.loading import load_task
from shrp_hf.training.recipes import RECIPES, Recipe
from shrp_hf.workflows.compare import Comparison, Grid, Settings, measure_speed, read_cells, write_results
from shrp_hf.workflows.compare.architectures import Shape, empty_model
from shrp_hf.workflows.compare.claims import claim
from shrp_hf.workflows.compare.figures import _panels
from shrp_hf.workflows.compare.grid import ModelShape
from shrp_hf.workflows.compare.tables import estimate, rows_of
from tests.test_commands import BAD, FILLERS, GOOD
from tests.tiny import tiny_bert

SETTINGS = {"batch_size": 8, "max_length": 16, "calibration_samples": 16, "signature_size": 4, "dsp_epochs": 0.5}
SHAPE = ModelShape(num_layers=3, num_heads=4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a fine-tuned tiny model and its task's files."""
    folder = tmp_path_factory.mktemp("compare")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLERS]
    (folder / "model").mkdir()
    (folder / "model" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tiny_bert(num_labels=2, vocab_size=len(words), max_position_embeddings=40).save_pretrained(folder / "model")
    BertTokenizer(vocab=str(folder / "model" / "vocab.txt")).save_pretrained(folder / "model")
    (folder / "SST-2").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train.tsv", 40), ("test.tsv", 16)):
        lines = ["sentence\tlabel"]
        for i in range(count):
            fillers = [FILLERS[j] for j in torch.randint(len(FILLERS), (3,), generator=generator).tolist()]
            lines.append(f"{' '.join(fillers)} {(GOOD if i % 2 else BAD)[i // 2 % 4]} {name[:2]}{i}\t{i % 2}")
        (folder / "SST-2" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def quick(monkeypatch):
    recipe = Recipe("default", 0.25, 0.25, recovery_epochs=0.25, distillation_logits=1.0)
    monkeypatch.setitem(RECIPES, "default", recipe)


def comparison(work, output, grid, **settings):
    task = load_task("sst2", work)
    return Comparison(Settings(str(work / "model"), **(SETTINGS | settings)), grid, task, output, force=True)


FULL = Grid(
    selectors=("hies", "cahp"),
    knee_degrees=(3,),
    heads=(6,),
    expert_layers=(2,),
    experts=(2,),
    truncate=(1,),
    seeds=(0, 1),
    recovery_epochs=(0, None),
)


@pytest.fixture(scope="module")
def compared(work, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    recipe = Recipe("default", 0.25, 0.25, recovery_epochs=0.25, distillation_logits=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "default", recipe)
        made = comparison(work, output, FULL, dense_epochs=0.5)
        assert made.run() == {}
    return output


def test_cahp_without_a_plane_keeps_as_many_heads_as_cahp_at_a_knee(work, tmp_path):
    bare = {"without_random": True, "without_control": True, "recovery_epochs": (0,)}
    grid = Grid(selectors=("cahp-direct",), heads=(6,), knee_degrees=(3,), **bare)
    assert comparison(work, tmp_path, grid, min_heads_per_layer=0).run() == {}
    cells = {cell["key"]: cell for cell in read_cells(tmp_path)}
    assert cells["cahp-direct-heads6-recovery0-seed0"]["num_heads"] == 6
    found = json.loads((tmp_path / "parts" / "plan-cahp-knee3-seed0.json").read_text(encoding="utf-8"))
    assert cells["cahp-direct-knee3-recovery0-seed0"]["num_heads"] == found["num_kept"]


def test_every_cell_is_a_file_with_what_it_reached_and_cost(compared):
    cells = read_cells(compared)
    # dense and control; 3 methods x 2 budgets x 2 recoveries; conversion and truncation x 2 recoveries; 2 seeds of each
    assert len(cells) == 2 * (2 + 3 * 2 * 2 + 2 + 2)
    assert {cell["method"] for cell in cells} == {"dense", "control", "hies", "cahp", "random", "shrp", "truncate"}
    for cell in cells:
        assert cell["rows"] == 16
        assert cell["metrics"]["accuracy"] == cell["correct"] / 16
        assert cell["agreement"] == cell["num_agreeing"] / 16
        assert set(cell["parameters"]) == {"encoder", "encoder_and_pooler", "whole", "embeddings"}
        assert set(cell["versions"]) == {"shrp_hf", "torch", "transformers"}
    by_key = {cell["key"]: cell for cell in cells}
    assert by_key["dense-seed0"]["agreement"] == 1
    for seed in (0, 1):
        count = by_key[f"cahp-knee3-recovery0-seed{seed}"]["num_heads"]
        assert by_key[f"random-knee3-recovery0-seed{seed}"]["num_heads"] == count  # as many as CAHP found
        assert by_key[f"hies-heads6-recovery0-seed{seed}"]["num_heads"] == 6
        static = by_key[f"shrp-layers2-experts2-top1-coef0.1-default-recovery0.25-seed{seed}"]
        assert (static["expert_layers"], static["num_experts"]) == ([1, 2], 4)
        # A truncated model saw as many examples as the conversion of the layers it lacks, and the same recovery.
        short = by_key[f"truncate-layers1-default-recovery0.25-seed{seed}"]
        assert short["train_examples"] == static["train_examples"] > 0
        assert len(short["kept"]) == 1


def test_control_is_the_dense_model_trained_on_with_labels():
    grid = Grid(truncate=(1,), recipes=("default", "paper"), recovery_epochs=(0, 2, None))
    controls = {key: job for key, job in grid.jobs().items() if job.kind == "control"}
    assert list(controls) == [
        "control-default-recovery2-seed0",
        f"control-default-recovery{RECIPES['default'].recovery_epochs:g}-seed0",
        "control-paper-recovery2-seed0",
    ]
    assert RECIPES["default"].task_weight == 0
    assert {job.recipe.task_weight for job in controls.values()} == {1.0}
    assert all(job.needs == ("dense-seed0",) and job.is_cell for job in controls.values())
    assert not [job for job in replace(grid, without_control=True).jobs().values() if job.kind == "control"]


def test_shares_of_the_control_are_of_the_same_seed_and_training():
    def cell(method, seed, quality, **fields):
        return {"key": f"{method}-seed{seed}", "method": method, "seed": seed, "metrics": {"accuracy": quality}, **fields}

    trained = {"recipe": "default", "recovery_epochs": 2}
    cells = [cell("dense", seed, 0.5) for seed in (0, 1)]
    cells += [cell("control", 0, 0.8, **trained), cell("control", 1, 0.6, **trained)]
    cells += [cell("truncate", seed, 0.4, **trained) for seed in (0, 1)]
    cells += [cell("his", seed, 0.4, recipe="default", recovery_epochs=3) for seed in (0, 1)]
    *_, short, other = rows_of(cells)
    assert short.against_control(lambda cell: cell["metrics"]["accuracy"]).mean == pytest.approx((0.4 / 0.8 + 0.4 / 0.6) / 2)
    assert other.against_control(lambda cell: cell["metrics"]["accuracy"]) is None


def test_experts_may_be_chosen_by_routers_or_by_scores(work, tmp_path, quick):
    grid = Grid(expert_layers=(2,), experts=(1, 2), expert_selectors=("usage", "his"), balance_coefs=(0.0, 0.1), seeds=(0,))
    kinds = [job.kind for job in grid.jobs().values()]
    # Routers: a conversion for each balance loss. HIS: one for each number of experts, whatever the balance loss.
    assert (kinds.count("convert"), kinds.count("cell")) == (4, 6)
    made = comparison(work, tmp_path, grid, dense_epochs=0.5)
    assert made.run() == {}
    cells = {cell["key"]: cell for cell in read_cells(tmp_path)}
    by_usage = cells["shrp-layers2-experts2-top1-coef0.1-default-recovery0.25-seed0"]
    by_his = cells["shrp-layers2-experts2-by-his-default-recovery0.25-seed0"]
    assert by_usage["train_examples"] > by_his["train_examples"] > 0  # routers have their stages on top of the recovery
    assert (by_usage["num_experts"], by_his["num_experts"]) == (4, 4)
    assert (by_usage["flops"], by_usage["parameters"]) == (by_his["flops"], by_his["parameters"])
    assert (by_usage["expert_selector"], by_his["expert_selector"]) == ("usage", "his")
    write_results(tmp_path)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "shrp, 2 layers, 2 experts each, by his" in table
    assert "shrp, 2 layers, 2 experts each, top-1, balance 0.1" in table
    assert "default (by his)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = [row for row in rows_of(read_cells(tmp_path)) if row.cells[0]["method"] == "shrp"]
    (panel,) = _panels(rows, "accuracy", lambda row: row.cells[0]["num_experts"]).values()
    assert set(panel) == {f"shrp, {count}, by his" for count in ("1 expert", "2 experts")} | {
        f"shrp, {count}, by routers, balance {coef}" for count in ("1 expert", "2 experts") for coef in ("0", "0.1")
    }


def test_kept_heads_are_those_of_a_selector_run_by_hand(compared, work):
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from shrp_hf.plans.budget import Budget
    from shrp_hf.selectors import HiesSelector

    folder = compared / "models" / "dense-seed1"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = load_task("sst2", work).tokenize(tokenizer, max_length=16)["train"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:16].tolist()
    batches = DataLoader(train.select(order), 8, collate_fn=DataCollatorWithPadding(tokenizer))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    plan = HiesSelector(budget=Budget.heads(6), alpha=0.5).select(model, batches)
    cell = json.loads((compared / "cells" / "hies-heads6-recovery0-seed1.json").read_text(encoding="utf-8"))
    assert cell["kept"] == [list(heads) for heads in plan.kept]


def test_second_run_computes_nothing_and_a_missing_cell_comes_back_the_same(compared, work, quick):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (compared / "cells").iterdir()}
    made = comparison(work, compared, FULL, dense_epochs=0.5)
    assert made.run() == {}
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (compared / "cells").iterdir()} == before
    gone = compared / "cells" / "hies-heads6-default-recovery0.25-seed0.json"
    gone.unlink()
    assert comparison(work, compared, FULL, dense_epochs=0.5).run() == {}
    (again,) = [path for path, (when, _) in before.items() if path.stat().st_mtime_ns != when]
    assert again == gone
    was, now = json.loads(before[gone][1]), json.loads(gone.read_text(encoding="utf-8"))
    assert {**was, "seconds": 0} == {**now, "seconds": 0}


@pytest.mark.parametrize("method", ["dsp", "dsp-pipelined"])
def test_another_grid_adds_to_the_directory(compared, work, quick, method):
    before = {path: path.stat().st_mtime_ns for path in (compared / "cells").iterdir()}
    grid = Grid(selectors=(method,), heads=(6,), recovery_epochs=(0,), without_random=True)
    assert comparison(work, compared, grid, dense_epochs=0.5).run() == {}
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    cell = json.loads((compared / "cells" / f"{method}-heads6-default-recovery0-seed0.json").read_text(encoding="utf-8"))
    plan = json.loads((compared / "parts" / f"plan-{method}-heads6-default-seed0.json").read_text(encoding="utf-8"))
    assert cell["kept"] == plan["kept"]
    assert cell["num_heads"] == 6
    assert cell["train_examples"] == plan["train_examples"] == 18  # half an epoch of the 36 training rows


def test_agreement_of_a_regression_is_equality_within_the_tolerance(work, tmp_path):
    (tmp_path / "STS-B").mkdir()
    for name, count in (("train.tsv", 24), ("test.tsv", 9)):
        rows = [f"the film {name[:2]}{i}\tfilm {FILLERS[i % 7]}\t{i % 5}.5" for i in range(count)]
        text = "\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n"
        (tmp_path / "STS-B" / name).write_text(text.replace("4.5", "4.0"), encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(work / "model")
    tiny_bert(num_labels=1, vocab_size=len(tokenizer), max_position_embeddings=40).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = load_task("stsb", tmp_path)
    agreements = []
    for tolerance in (0.0, 100.0):
        settings = Settings(str(tmp_path / "model"), **SETTINGS, tolerance=tolerance)
        grid = Grid(selectors=("random",), heads=(4,), recovery_epochs=(0,))
        made = Comparison(settings, grid, task, tmp_path / str(tolerance), force=True)
        assert made.run() == {}
        dense, cut = read_cells(tmp_path / str(tolerance))
        assert dense["baseline"]["metrics"] == {"pearson": None, "spearmanr": None}  # a constant has no correlation
        assert (dense["method"], dense["agreement"], dense["correct"]) == ("dense", 1, None)
        agreements.append(cut["num_agreeing"])
    assert agreements == [0, 9]


def test_directory_of_other_settings_is_refused(compared, work, quick):
    message = "with another `max_length`: 16, not 24. Choose another directory, or remove this one."
    with pytest.raises(ValueError, match=re.escape(message)):
        comparison(work, compared, FULL, dense_epochs=0.5, max_length=24)


def groups(output):
    return {re.sub(r"-seed\d$", "", cell["key"]) for cell in read_cells(output)}


def test_speed_is_measured_once_for_all_shapes(compared, monkeypatch):
    monkeypatch.setattr("shrp_hf.measuring.timing.MIN_ROUND_SECONDS", 0.0)
    (compared / "speed.json").unlink(missing_ok=True)
    cells = read_cells(compared)
    with claim(compared / "claims" / "speed.lock"):
        assert measure_speed(compared, cells) == {}  # another run is at it
    speed = measure_speed(compared, cells, num_rounds=1)
    assert set(speed) == groups(compared)
    assert speed["dense"]["ratio"] == 1
    assert speed["random-heads6-recovery0"] == speed["hies-heads6-recovery0"]  # one shape
    assert measure_speed(compared, cells[:1]) == speed  # nothing is measured again
    rows = {row.name: row.speed for row in rows_of(cells, speed)}
    assert rows["first 1 layers"] == speed["truncate-layers1-default-recovery0.25"]


def test_tables_are_written_though_the_timing_fails(compared, monkeypatch):
    class Done:
        output = compared

        def __init__(self, *args, **options):
            pass

        def run(self, watch):
            return {}

    monkeypatch.setattr(sys.modules["shrp_hf.cli.compare"], "read_task", lambda *args, **options: None)
    monkeypatch.setattr("shrp_hf.workflows.compare.Comparison", Done)
    monkeypatch.setattr("shrp_hf.workflows.compare.measure_speed", lambda *args: 1 / 0)
    (compared / "table.md").unlink(missing_ok=True)
    words = ["compare", "MODEL", "--dataset", "docstrings", "--keep-models", "--output", str(compared)]
    result = CliRunner().invoke(cli.app, words)
    assert isinstance(result.exception, ZeroDivisionError)
    assert (compared / "table.md").exists()


def test_tables_figures_and_the_page_come_from_the_cells(compared):
    speed = {"ratio": 2.0, "p50_ms": 5.0, "p95_ms": 6.0, "sequences_per_second": 9.0, "batch_size": 8, "length": 32}
    speed |= {"num_threads": 1, "device": "cpu", "num_rounds": 3}
    (compared / "speed.json").write_text(json.dumps(dict.fromkeys(groups(compared), speed)), encoding="utf-8")
    words = ["compare", "MODEL", "--dataset", "sst2", "--report-only", "--output", str(compared)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    written = {path.name: path for path in (*compared.iterdir(), *(compared / "figures").iterdir())}
    assert {"cells.csv", "table.md", "frontier.png", "retention.png", "report.html"} <= set(written)
    assert {"heads-heads-6.png", "heads-knee_degree-3.png"} <= set(written)
    with written["cells.csv"].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["method"] != "majority"]) == len(read_cells(compared))
    assert [(row["key"], row["accuracy"]) for row in rows[-2:]] == [("majority-seed0", "0.5"), ("majority-seed1", "0.5")]
    values = [float(row["accuracy"]) for row in rows if re.match(r"random-heads6-recovery0-seed\d", row["key"])]
    mean = sum(values) / 2
    margin = 12.706204736 * abs(values[0] - values[1]) / 2  # t(0.975, 1), standard error of two values
    table = written["table.md"].read_text(encoding="utf-8")
    (line,) = [line for line in table.splitlines() if line.startswith("| random, 6 heads | 0 recovery | 2 |")]
    assert f"| {mean:.4f} ± {margin:.4f} |" in line
    (line_of_majority,) = [line for line in table.splitlines() if line.startswith("| majority class (")]
    assert "| 0.5000 ± 0.0000 |" in line_of_majority
    assert line_of_majority.count("|") == line.count("|")
    assert line.endswith("| 2.00x |")
    page = written["report.html"].read_text(encoding="utf-8")
    model = Path(json.loads((compared / "cells" / "dense-seed0.json").read_text(encoding="utf-8"))["settings"]["model"])
    assert str(model) not in page  # it is made to be sent
    assert f"model: directory {model.parent.name}/{model.name}" in page
    page = page.replace(get_plotlyjs(), "")
    assert "<img" not in page
    assert not re.search(r"https?://|src=\"(?!data:)|href=|@import", page)
    assert "random, 6 heads" in page


@pytest.mark.parametrize("undefined", ["one seed", "all", "dense"])
def test_undefined_metrics_are_said_and_left_out_of_pictures(undefined, compared, tmp_path):
    """As of a correlation, where all predictions are one number."""
    (tmp_path / "cells").mkdir()
    for path in (compared / "cells").glob("*.json"):
        cell = json.loads(path.read_text(encoding="utf-8"))
        is_chosen = cell["method"] == ("dense" if undefined == "dense" else "random")
        if is_chosen and (undefined != "one seed" or cell["seed"] == 1):
            cell["metrics"]["accuracy"] = cell["held_out"]["accuracy"] = None
        (tmp_path / "cells" / path.name).write_text(json.dumps(cell), encoding="utf-8")
    written = {path.name: path for path in write_results(tmp_path)}
    table = written["table.md"].read_text(encoding="utf-8")
    assert "nan" not in table
    start = "| dense |" if undefined == "dense" else "| random, 6 heads | 0 recovery |"
    (line,) = [line for line in table.splitlines() if line.startswith(start)]
    count = "1 of 2" if undefined == "one seed" else "2 of 2"
    assert f"| undefined: constant predictions ({count} seeds) | {'-' if undefined == 'dense' else 'undefined'}" in line
    assert ",,," in written["cells.csv"].read_text(encoding="utf-8")


def test_estimate_by_hand():
    assert estimate([0.5]).margin is None
    three = estimate([1.0, 2.0, 3.0])
    assert (three.mean, three.num) == (2.0, 3)
    assert three.margin == pytest.approx(4.302652730 / math.sqrt(3), rel=1e-6)
    assert estimate([None]).text() == "undefined: constant predictions"
    assert estimate([1.0, math.nan, None]).text() == "undefined: constant predictions (2 of 3 seeds)"
    with pytest.raises(ValueError, match="at least one number"):
        estimate([])


def test_rows_need_their_dense_model():
    assert rows_of([{"key": "hies-keep0.5-recovery0-seed3", "seed": 3, "method": "hies"}]) == []


def test_keep_rates_count_seeds(compared):
    (row,) = [
        row for row in rows_of(read_cells(compared)) if row.name == "random, 6 heads" and not row.cells[0]["recovery_epochs"]
    ]
    rates = row.keep_rates()
    for layer, head in ((0, 0), (2, 3)):
        assert rates[layer][head] == sum(head in cell["kept"][layer] for cell in row.cells) / 2


# --- killed, shared, failed ---

RUN = """
import sys
from shrp_hf import cli
from shrp_hf.training.recipes import RECIPES, Recipe
RECIPES["default"] = Recipe("default", 0.25, 0.25, recovery_epochs=0.25, distillation_logits=1.0)
sys.argv = ["shrp-hf", *sys.argv[1:]]
cli.main()
"""
WORDS = ["--dataset", "sst2", "--selectors", "magnitude", "--keep", "0.75,0.5", "--seeds", "0,1", "--recovery-epochs", "1"]
WORDS += ["--no-speed", "--force", "--batch-size", "8", "--max-length", "16", "--expert-layers", "1"]


def start(work, output):
    command = [sys.executable, "-c", RUN, "compare", str(work / "model"), "--data-dir", str(work), *WORDS]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--output", str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def results(output):
    return {c["key"]: {n: v for n, v in c.items() if "seconds" not in n} for c in read_cells(output)}


@pytest.mark.faults
def test_killed_run_resumes_and_two_runs_share_the_work(work, tmp_path, quick):
    first = start(work, tmp_path / "killed")
    while len(list((tmp_path / "killed" / "cells").glob("*.json"))) < 3:
        assert first.poll() is None, first.stdout.read().decode()
        time.sleep(0.02)  # the point of time is the kill's, no assertion depends on it
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "cells").glob("*.json")}
    runs = [start(work, tmp_path / "killed") for _ in range(2)]
    for run in runs:
        output = run.communicate()[0].decode()
        assert run.returncode == 0, output
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    words = ["compare", str(work / "model"), "--data-dir", str(work), *WORDS, "--output", str(tmp_path / "whole")]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    tables = [(tmp_path / name / "table.md").read_text(encoding="utf-8") for name in ("killed", "whole")]
    assert tables[0] == tables[1]
    done = [json.loads(path.read_text(encoding="utf-8"))["key"] for path in (tmp_path / "killed" / "cells").glob("*.json")]
    assert len(done) == len(set(done)) == 2 * (1 + 1 + 2 * 2 + 1)  # dense and its control, heads, experts


def test_claim_is_one_process_s_and_dies_with_it(tmp_path):
    path = tmp_path / "claims" / "job.lock"
    with claim(path) as ours:
        assert ours
        with claim(path) as theirs:
            assert not theirs
    child = os.fork()
    if not child:
        with claim(path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with claim(path) as ours:
        assert ours


def test_failed_cell_is_kept_with_its_error_and_the_others_go_on(work, tmp_path, quick, monkeypatch):
    from shrp_hf.workflows.compare import cells

    monkeypatch.setattr(cells, "keep_layers", lambda *args: 1 / 0)
    grid = Grid(selectors=("magnitude",), keep=(0.5,), truncate=(2,), recovery_epochs=(0,), without_random=True)
    made = comparison(work, tmp_path, grid)
    errors = made.run()
    assert list(errors) == ["truncate-layers2-default-recovery0-seed0"]
    assert errors.popitem()[1].endswith("ZeroDivisionError: division by zero")
    assert {cell["method"] for cell in read_cells(tmp_path)} == {"dense", "magnitude"}
    monkeypatch.undo()
    monkeypatch.setitem(RECIPES, "default", Recipe("default", 0.25, 0.25, distillation_logits=1.0))
    assert comparison(work, tmp_path, grid).run() == {}


def test_structures_stand_side_by_side(work, tmp_path, quick, monkeypatch):
    from shrp_hf.measuring import flop_table
    from shrp_hf.workflows.compare import cells as jobs

    monkeypatch.setattr(jobs, "latency_table", flop_table)
    grid = Grid(thin=(2, 3), thin_keep=(0.5,), spread=(2,), truncate=(2,), expert_layers=(2,), recovery_epochs=(0, 0.25))
    made = comparison(work, tmp_path, grid)
    assert made.run() == {}
    cells = {cell["key"]: cell for cell in read_cells(tmp_path)}
    dense = cells["dense-seed0"]["flops"]
    for times in (2, 3):
        thin = cells[f"thin-speedup{times}-default-recovery0.25-seed0"]
        assert thin["flops"] <= dense / times
        assert thin["expert_layers"] == []
        assert thin["train_examples"] > 0 == cells[f"thin-speedup{times}-recovery0-seed0"]["train_examples"]
    half = cells["thin-keep0.5-default-recovery0.25-seed0"]
    assert [len(heads) for heads in half["kept"]] == [2, 2, 2]
    assert half["neurons"] == [32, 32, 32]
    assert (
        cells["spread-layers2-default-recovery0-seed0"]["flops"] == cells["truncate-layers2-default-recovery0-seed0"]["flops"]
    )
    spread, first = (cells[f"{name}-layers2-default-recovery0-seed0"]["metrics"] for name in ("spread", "truncate"))
    assert spread["loss"] != first["loss"] if "loss" in spread else True
    timings = measure_speed(tmp_path, read_cells(tmp_path), num_rounds=1)
    assert set(timings) == {key.removesuffix("-seed0") for key in cells}
    write_results(tmp_path)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for name in ("thin, searched for 2x", "thin, 50% of heads and neurons", "2 layers evenly spread", "first 2 layers"):
        assert f"| {name} | default, 0.25 recovery" in table
    assert comparison(work, tmp_path, grid).is_missing is False


def test_thin_cells_out_of_range_are_refused(work, tmp_path, quick, monkeypatch):
    from shrp_hf.measuring import flop_table
    from shrp_hf.workflows.compare import cells as jobs

    for name, value, message in (
        ("thin", 1, "`thin` must be speed-ups above 1, such as 4, got 1"),
        (
            "thin_keep",
            0.1,
            "`thin_keep` must be shares of which a layer of 4 heads keeps one at least, from 0.125 to 1, got 0.1",
        ),
        ("thin_keep", 1.1, "`thin_keep` must be shares"),
        ("spread", 3, r"`spread` must be between 1 and 2 \(the model has 3 layers of 4 heads\), got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Grid(**{name: (value,)}).check(SHAPE)
    monkeypatch.setattr(jobs, "latency_table", flop_table)
    with pytest.raises(ValueError, match=r"`thin` 5000 is out of reach on this machine: thin layers run up to \d+\.\d\dx"):
        comparison(work, tmp_path, Grid(thin=(5000,)))
    assert not (tmp_path / "cells").exists()


# --- architectures ---


def test_empty_model_has_the_flops_of_the_cell():
    from shrp_hf.measuring import count_flops, count_parameters

    dense = to_shrp(tiny_bert())
    cut = prune_heads(dense, KeepPlan(((0, 1, 2, 3), (1,), (0,)), 4))
    shape = Shape.of({"kept": [[0, 1, 2, 3], [1], [0]], "expert_layers": []})
    empty = empty_model(dense, shape)
    assert [len(empty.config.heads_of(i)) for i in range(3)] == [2, 2, 2]
    assert count_flops(empty, 2, 8) == count_flops(cut, 2, 8)
    assert count_parameters(empty) == count_parameters(cut)
    static = empty_model(dense, Shape.of({"kept": [[0, 1, 2, 3], [2], [0, 3]], "expert_layers": [1, 2]}))
    assert static.config.expert_layers == [1, 2]
    assert [len(static.config.heads_of(i)) for i in range(3)] == [4, 1, 2]


# --- refusals ---


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {},
            "Nothing to compare: give `selectors` with a budget, `expert_layers`, `thin`, `thin_keep`, `truncate` or "
            + "`spread`.",
        ),
        (
            {"selectors": ("hise",), "keep": (0.5,)},
            "`selectors` must be names of cahp, cahp-direct, entropy, hies, his, magnitude, random, dsp, dsp-pipelined, "
            "got 'hise'.",
        ),
        ({"truncate": (1,), "seeds": (3, 3)}, "`seeds` names 3 twice, got [3, 3]: leave one out."),
        ({"truncate": (1,), "seeds": ()}, "`seeds` must hold at least one value, got none."),
        ({"truncate": (1,), "seeds": (-1,)}, "`seeds` must be whole numbers from 0, got -1."),
        (
            {"selectors": ("his",)},
            "`selectors` without a budget (`keep`, `heads` or `knee_degrees`) compares nothing: give both or neither.",
        ),
        (
            {"selectors": ("his",), "heads": (13,)},
            "`heads` must be between 3 and 12 (the model has 12 heads, and `min_heads_per_layer=1` holds 3), got 13.",
        ),
        (
            {"selectors": ("his",), "keep": (0.1,)},
            "`keep` must be shares from 0.25 to 1 (the model has 12 heads, and `min_heads_per_layer=1` holds 3), got 0.1.",
        ),
        ({"selectors": ("cahp",), "knee_degrees": (7,)}, "`knee_degrees` must be between 2 and 6, got 7."),
        ({"expert_layers": (4,)}, "`expert_layers` must be between 1 and 3 (the model has 3 layers of 4 heads), got 4."),
        (
            {"expert_layers": (1,), "experts": (5,)},
            "`experts` must be between 1 and 4 (the model has 3 layers of 4 heads), got 5.",
        ),
        ({"truncate": (3,)}, "`truncate` must be between 1 and 2 (the model has 3 layers of 4 heads), got 3."),
        ({"truncate": (1,), "recipes": ("mine",)}, "`recipe` must be one of default, paper, got 'mine'."),
        ({"truncate": (1,), "recovery_epochs": (-1,)}, "`recovery_epochs` must be 0 or more, got -1."),
        (
            {"expert_layers": (1,), "balance_coefs": (0.0, 0.1)},
            "`balance_coefs` is about routers, which nothing here has: give `expert_selectors` with usage.",
        ),
        (
            {"expert_layers": (1,), "expert_selectors": ("cahp",)},
            "`expert_selector` must be one of usage, his, hies, entropy, magnitude, random, got 'cahp'.",
        ),
    ],
)
def test_bad_grids_are_refused_before_any_work(grid, message):
    with pytest.raises(ValueError, match=r".") as error:
        Grid(**grid).check(SHAPE)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
        ({"examples_per_epoch": 0}, "`examples_per_epoch` must be at least 1, got 0."),
        ({"dense_epochs": -1}, "`dense_epochs` must be 0 or more, got -1."),
        ({"dsp_epochs": 0}, "`dsp_epochs` must be more than 0, got 0."),
        ({"alpha": 1.0}, '`alpha` must be in [0, 1) or "search", got 1.0.'),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings("model", **settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,one"], "'0,one' is no list of numbers separated by commas"),
        (["--alpha", "high"], "'high' is neither a number nor \"search\""),
    ],
)
def test_words_that_are_no_numbers_are_refused(words, message, tmp_path):
    result = CliRunner().invoke(cli.app, ["compare", "MODEL", "--dataset", "sst2", "--output", str(tmp_path), *words])
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)


def test_grids_that_do_not_suit_the_model_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^`expert_layers` must be left out, got \[1\]: this family does not convert to SHRP\.$"
    ):
        Grid(expert_layers=(1,)).check(ModelShape(3, 4, has_expert_layers=False))
    grid = Grid(selectors=("cahp",), heads=(6,))
    with pytest.raises(ValueError, match="compares classes, but the task has no single class for each row"):
        grid.check(ModelShape(3, 4, has_classes=False))
    monkeypatch.setattr("shrp_hf.workflows.compare.grid.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package sklearn: pip install 'shrp_hf\[posthoc\]', or leave it out"):
        grid.check(SHAPE)
    direct = Grid(selectors=("cahp-direct",), heads=(6,))
    with pytest.raises(ImportError, match=r"^`selectors` with cahp-direct needs the package kmedoids: pip install "):
        direct.check(SHAPE)
    monkeypatch.setattr(
        "shrp_hf.workflows.compare.grid.find_spec", lambda name: None if name in ("sklearn", "kneed") else name
    )
    direct.check(SHAPE)  # neither a plane nor a knee
    with pytest.raises(ImportError, match="needs the package sklearn: "):
        replace(direct, knee_degrees=(3,)).check(SHAPE)


def test_models_that_cannot_be_compared_are_refused(work, tmp_path):
    task, grid = load_task("sst2", work), Grid(truncate=(1,))
    tiny_bert(num_labels=3).save_pretrained(tmp_path / "three")
    message = f"`{tmp_path / 'three'}` predicts 3 labels, but the task 'sst2' has 2: give a model that was fine-tuned on it."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Comparison(Settings(str(tmp_path / "three")), grid, task, tmp_path / "out")
    prune_heads(tiny_bert(num_labels=2), {0: [1]}).save_pretrained(tmp_path / "cut")
    message = (
        f"`model` {str(tmp_path / 'cut')!r} has pruned heads or expert layers already: compare from the dense model it "
        "came from."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Comparison(Settings(str(tmp_path / "cut")), grid, task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_grids_of_a_directory_are_worked_on_in_their_order(work, tmp_path, quick):
    first, second = Grid(truncate=(2,), seeds=(0,)), Grid(truncate=(1, 2), seeds=(0,))
    made = comparison(work, tmp_path, (first, second), dense_epochs=0.5)
    assert list(made.jobs) == [*first.jobs(), *(key for key in second.jobs() if key not in first.jobs())]
    done = []
    while made.step(lambda done_so_far, total, doing: done.append(doing)):
        pass
    assert done == list(made.jobs)
    assert not made.is_missing
    assert made.failures() == {}


@pytest.mark.parametrize("task", page.TASKS)
def test_grids_of_the_results_page_suit_its_model(task):
    shape = ModelShape(6, 12, has_classes=task != "stsb")
    for grid in page.grids(task, (0, 1, 2)):
        grid.check(shape)
    page.settings(task, "model")


def test_results_page_is_taken_up_and_tells_failures(work, tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(page, "grids", lambda task, seeds: [Grid(truncate=(1,), seeds=seeds)])
    monkeypatch.setattr(page, "settings", lambda task, model: Settings(model, **SETTINGS, dense_epochs=0.5))
    paths = {"--model": work / "model", "--data-dir": work, "--output": tmp_path}
    words = [str(word) for pair in paths.items() for word in pair] + "--tasks sst2 --seeds 0".split()
    assert page.main(words) == 0
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "sst2" / "cells").iterdir()}
    assert {path.name for path in cells} == {
        "control-default-recovery0.25-seed0.json",
        "dense-seed0.json",
        "truncate-layers1-default-recovery0.25-seed0.json",
    }
    assert page.main(words) == 0
    assert cells == {path: path.stat().st_mtime_ns for path in (tmp_path / "sst2" / "cells").iterdir()}
    assert f"Written: {tmp_path / 'sst2' / 'report.html'}" in capsys.readouterr().out

    monkeypatch.setattr("shrp_hf.workflows.compare.cells.keep_layers", lambda *args: 1 / 0)
    monkeypatch.setattr(page, "grids", lambda task, seeds: [Grid(truncate=(2,), seeds=seeds)])
    assert page.main(words) == 1
    assert "Failed: truncate-layers2-default-recovery0.25-seed0: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        page.main([*words, "--tasks", "sst2,cola"])
    assert "--tasks must be of sst2, sst5, stsb, mnli, got cola" in capsys.readouterr().err


def test_report_without_cells_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no cells: run the comparison first, without `report_only`"):
        write_results(tmp_path)


@pytest.mark.slow
def test_small_grid_on_docstrings(tmp_path):
    from shrp_hf.cli.train import _demo_model

    words = ["compare", str(_demo_model()), "--dataset", "docstrings"]
    words += ["--max-train", "900", "--dense-epochs", "2", "--selectors", "hies", "--keep", "0.5", "--expert-layers", "3"]
    words += ["--truncate", "3", "--seeds", "0", "--recovery-epochs", "1", "--max-length", "64", "--output", str(tmp_path)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    by_method = {cell["method"]: cell["metrics"]["accuracy"] for cell in read_cells(tmp_path)}
    assert by_method["dense"] > 0.3  # nine classes: chance is 0.11
    assert by_method["hies"] > 0.8 * by_method["dense"]
    assert by_method["shrp"] > 0.7 * by_method["dense"]
    assert (tmp_path / "speed.json").exists()
    assert (tmp_path / "figures" / "frontier.png").exists()
