"""Models side by side as they are served: the same figures whatever the runtime, and words where FLOPs promised more."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import BertTokenizer, GPT2Config, GPT2Model, RobertaConfig, RobertaModel
from typer.testing import CliRunner

from experiments import int8 as int8_benchmark
from experiments import serving as serving_benchmark
from shrp_hf import KeepPlan, cli, prune_heads
from shrp_hf.measuring import Timing, count_flops, environment
from shrp_hf.measuring.environment import instruction_sets, versions_of
from shrp_hf.measuring.runtimes import EXPORTED, FileRunner, TorchRunner
from shrp_hf.measuring.workloads import Workload, count_flops_of
from shrp_hf.pruning import to_shrp
from shrp_hf.publishing.plots import plot_speed
from shrp_hf.workflows.benchmark import ServingOptions, ServingResult, ServingRow, measure_serving, write_serving
from tests.tiny import assert_near, tiny_bert

WORDS = ("good", "bad", "the", "film", "is")
RUNTIMES_ARE = "^`runtimes` must be of eager, compiled, onnx, int8, openvino, openvino-int8, each once, got "
TEXTS = ("good", "the film is bad", "the film", "is is is is is is is is is is is is is is is is is")


@pytest.fixture(autouse=True)
def quick(monkeypatch, traced_once):
    for name in ("onnx", "int8"):  # half the tracing
        monkeypatch.setitem(EXPORTED, name, replace(EXPORTED[name], graph="fused"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    return BertTokenizer(vocab=str(path))


@pytest.fixture(scope="module")
def models(tokenizer):
    dense = tiny_bert(num_labels=2).eval()
    half = prune_heads(dense, KeepPlan(((0, 1),) * dense.config.num_hidden_layers, dense.config.num_attention_heads))
    return {"dense": (dense, tokenizer), "half": (half, tokenizer)}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def run(*words):
    return CliRunner().invoke(cli.app, list(map(str, words)))


@pytest.mark.parametrize("runtimes", [("eager",), pytest.param(("eager", "compiled"), marks=pytest.mark.slow)])
def test_every_model_runs_every_workload_in_pytorch(runtimes, models):
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, (model, _) in models.items()}
    seen = []
    options = ServingOptions(runtimes, ((1, 4), (2, 8)), TEXTS, batch_size=2, num_rounds=2, num_threads=1)
    result = measure_serving(models, options, watch=lambda *state: seen.append(state))
    names = ["1 x 4", "2 x 8", "4 sentences, batches of 2"]
    assert [(r.workload, r.model, r.runtime) for r in result.rows] == [
        (w, m, r) for w in names for m in models for r in runtimes
    ]
    for workload in names:
        dense, half = (result.row(name, runtimes[-1], workload) for name in ("dense", "half"))
        assert dense.runtime_speedup == dense.flop_ratio == dense.share == 1
        assert half.flop_ratio == dense.flops / half.flops > 1
        assert half.share == half.runtime_speedup / half.flop_ratio
        assert half.weight_bytes < dense.weight_bytes
        assert 0 < half.activation_bytes <= dense.activation_bytes
    assert result.row("dense", "eager", names[0]).speedup == 1
    assert result.row("dense", "eager", "2 x 8").flops == count_flops(models["dense"][0], 2, 8)
    assert seen[-1] == (names[-1], len(models) * len(runtimes) * 2, len(models) * len(runtimes) * 2)
    for name, (model, _) in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        assert not any(parameter.is_inference() for parameter in model.parameters())


def test_onnx_files_are_measured_beside_pytorch_and_removed(models, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = ServingOptions(("eager", "onnx", "int8"), ((1, 4),), TEXTS, num_rounds=1, num_threads=1)
    result = measure_serving(models, options)
    assert {row.runtime for row in result.rows} == {"eager", "onnx", "int8"}
    assert all(row.activation_bytes is None for row in result.rows if row.runtime != "eager")
    assert set(result.agreement) == {"dense, int8", "half, int8"}
    assert "int8 files against PyTorch" in result.markdown()
    assert not list(tmp_path.iterdir())
    measure_serving(models, ServingOptions(("onnx",), ((1, 4),), num_rounds=1), exports=tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0-onnx", "1-onnx"]


@pytest.mark.usefixtures("openvino_unrestricted")
def test_openvino_is_measured_beside_pytorch_and_says_the_same(models, tmp_path):
    pytest.importorskip("openvino"), pytest.importorskip("nncf")
    options = ServingOptions(("eager", "openvino", "openvino-int8"), ((1, 4),), num_rounds=1, num_threads=1)
    result = measure_serving({"half": models["half"]}, options, exports=tmp_path)
    assert [row.runtime for row in result.rows] == ["eager", "openvino", "openvino-int8"]
    assert set(result.agreement) == {"half, openvino-int8"}
    assert result.rows[2].weight_bytes < result.rows[1].weight_bytes
    model, tokenizer = models["half"]
    batch = Workload(4, None, TEXTS).batches(model, tokenizer)[0]
    runner = FileRunner(tmp_path / "0-openvino" / "model.xml", 1)
    with torch.inference_mode():
        assert_near(runner.session.run(None, runner._arrays(batch))[0], copy.deepcopy(model).double()(**batch).logits)


def test_onnx_runner_says_what_the_torch_runner_says(models, tmp_path):
    pytest.importorskip("onnxruntime")
    from shrp_hf.export import export_onnx

    model, tokenizer = models["half"]
    batch = Workload(4, None, TEXTS).batches(model, tokenizer)[0]
    runner = FileRunner(export_onnx(model, tokenizer, tmp_path), 1)
    found = runner.session.run(None, runner._arrays(batch))[0]
    with torch.inference_mode():
        assert_near(found, copy.deepcopy(model).double()(**batch).logits)


def test_sentences_are_sorted_batched_truncated_and_their_flops_counted(models):
    model, tokenizer = models["dense"]
    batches = Workload(2, 8, TEXTS).batches(model, tokenizer)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (2, 8)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert count_flops_of(model, batches) == count_flops(model, 2, 4) + count_flops(model, 2, 8)
    assert model.device.type == "cpu"
    longest = Workload(9, None, TEXTS).batches(model, tokenizer)[0]["input_ids"].shape[1]
    assert longest == min(19, model.config.max_position_embeddings)


def test_roberta_reads_as_many_tokens_as_it_has_positions_behind_the_padding_index(tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaModel(RobertaConfig(vocab_size=20, max_position_embeddings=10, **sizes)).eval()
    (batch,) = Workload(4, None, TEXTS).batches(model, tokenizer)
    assert batch["input_ids"].shape[1] == 10 - model.config.pad_token_id - 1


def test_weights_of_half_precision_take_half_the_bytes(models):
    model = models["dense"][0]
    options = {"shapes": ((1, 4),), "num_rounds": 1}
    single, half = (measure_serving(models, ServingOptions(dtype=d, **options)).rows[0] for d in ("float32", "bfloat16"))
    assert half.weight_bytes * 2 == single.weight_bytes
    assert model.dtype == torch.float32


def test_pixels_go_along_in_the_dtype_of_the_model():
    model = tiny_bert().to(torch.bfloat16)
    assert TorchRunner(model, compiled=False)._moved(torch.zeros(1)).dtype == torch.bfloat16
    assert TorchRunner(model, compiled=False)._moved(torch.zeros(1, dtype=torch.long)).dtype == torch.long


# --- what is said about it ---


def row(model, seconds, flops, runtime="eager", first=4.0, spread=0.0, held=2_000_000):
    calls = (seconds * (1 - spread), seconds, seconds * (1 + spread))
    timing = Timing(model, 8, 128, "cpu", 2, (calls,) * 3)
    ratio = first / seconds
    return ServingRow(model, runtime, "8 x 128", timing, flops, 4_000_000, held, ratio, ratio, 8e9 / flops)


def test_table_and_words_where_a_speedup_falls_short():
    rows = [row("dense", 4.0, 8e9), row("short", 1.0, 1e9), row("ahead", 1.0, 4e9, "onnx", held=None)]
    text = ServingResult("dense", "eager", rows, {}).markdown()
    assert "| short | eager | 1000.00 | 1000.00 | 8.0 | 4.00x | 4.00x | 8.00x | 50% | 4.0 | 2.0 |" in text
    assert "| ahead | onnx | 1000.00 | 1000.00 | 8.0 | 4.00x | 4.00x | 2.00x | 200% | 4.0 | - |" in text
    assert text.count("- short, eager: 4.00x of 8.00x (50%)") == 1
    assert "- ahead" not in text
    assert "Run it again" not in text
    busy = ServingResult("dense", "eager", [*rows, row("b", 1.0, 8e9, spread=0.5)], {}).markdown()
    assert "**The largest spread (quartiles over median) is 100%: something else ran. Run it again.**" in busy


def test_files_hold_what_was_found(tmp_path):
    rows = [row("dense", 4.0, 8e9), row("short", 1.0, 1e9)]
    write_serving(ServingResult("dense", "eager", rows, {"dense": "0.9"}), {"machine": "M", "command": "C"}, tmp_path)
    found = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert found["about"] == {"machine": "M", "command": "C"}
    assert found["rows"][1]["share"] == 0.5
    assert found["rows"][1]["p50_ms"] == 1000
    assert found["rows"][1]["model"] == "short"
    assert "- machine: M" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert (tmp_path / "benchmark.png").stat().st_size > 5000


def test_a_row_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError, match="gone"):
        ServingResult("dense", "eager", [], {}).row("gone", "eager", "8 x 128")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_speed_that_is_none_is_not_drawn(value, tmp_path):
    with pytest.raises(ValueError, match="finite speed-ups above 0"):
        plot_speed({"8 x 128": {"eager": {"dense": value}}}, tmp_path / "x.png", "dense")


# --- refusals, before anything runs ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"runtimes": ("eager", "fast")},
            RUNTIMES_ARE + r"\['eager', 'fast'\]\.$",
        ),
        ({"runtimes": ()}, RUNTIMES_ARE + r"\[\]\.$"),
        ({"runtimes": ("eager", "eager")}, RUNTIMES_ARE + r"\['eager', 'eager'\]\.$"),
        ({"shapes": ()}, r"^Give `shapes`, `texts`, or both: there is nothing to run\.$"),
        ({"shapes": ((0, 4),)}, r"^`shapes` must be \(batch, length\), both at least 1, got \(0, 4\)\.$"),
        ({"batch_size": 0}, r"^`batch_size` must be at least 1, got 0\.$"),
        ({"max_length": 0}, r"^`max_length` must be at least 1, got 0\.$"),
        ({"num_rounds": 0}, r"^`num_rounds` must be at least 1, got 0\.$"),
        ({"num_threads": 0}, r"^`num_threads` must be at least 1, got 0\.$"),
        ({"dtype": "int4"}, r"^`dtype` must be one of float32, bfloat16, float16, got 'int4'\.$"),
        (
            {"runtimes": ("eager", "onnx"), "device": "cuda"},
            r"^`runtimes` \['onnx'\] run on the CPU, and `device` is 'cuda': measure them in a run of their own\.$",
        ),
    ],
)
def test_bad_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ServingOptions(**fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"^`device` is 'cuda', and torch sees no GPU: leave it out to measure on the CPU\.$"):
        ServingOptions(device="cuda")


def test_what_does_not_suit_is_refused(models):
    with pytest.raises(ValueError, match=r"^`models` must hold at least one model, got none\.$"):
        measure_serving({}, ServingOptions())
    with pytest.raises(ValueError, match=r"^`texts` need a text model with its tokenizer, and BertFor.* has none\.$"):
        measure_serving({"dense": (models["dense"][0], None)}, ServingOptions(shapes=(), texts=TEXTS))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_tile amx_int8\n", "AVX2, AVX-512, AVX-512 VNNI, AMX"),
        ("flags\t\t: fpu avx2 amx_tile\n", "AVX2"),
        ("Features\t: fp asimd i8mm\n", "Neon, I8MM"),
        ("model name\t: X\n", "none of those known"),
    ],
)
def test_instruction_sets_are_read_off_the_flags(text, named, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(environment, "Path", lambda name: tmp_path / "cpuinfo")
    assert instruction_sets() == named


def test_versions_of_what_is_not_installed_are_left_out():
    assert set(versions_of("torch", "no-such-package-of-ours")) == {"torch"}


# --- the command and the project's own benchmark ---


def test_command_prints_the_table_and_writes_the_files(folders, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    words = ["--shapes", "1x4", "--texts", tmp_path / "lines.txt", "--rounds", 1, "--threads", 1]
    result = run("benchmark", folders / "dense", folders / "half", *words, "--output", tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    assert "### 1 x 4" in result.output
    assert f"- instruction sets: {instruction_sets()}" in result.output
    assert "- machine: " in result.output
    assert "### 4 sentences, batches of 32" in result.output
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"benchmark.md", "benchmark.json", "benchmark.png"}
    about = json.loads((tmp_path / "new" / "out" / "benchmark.json").read_text(encoding="utf-8"))["about"]
    assert about["threads"] == 1
    assert {"machine", "instruction sets", "date", "torch", "command"} <= about.keys()
    assert about.get("onnxruntime") == versions_of("onnxruntime").get("onnxruntime")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "8,128"], "is no list of shapes like 8x128 separated by commas"),
        (["--texts", "EMPTY"], "holds no text."),
    ],
)
def test_command_refuses(words, message, folders, tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    result = run("benchmark", folders / "dense", *(tmp_path / "empty.txt" if word == "EMPTY" else word for word in words))
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).replace("│", "").split())


def test_the_same_model_twice_is_refused(folders):
    result = run("benchmark", folders / "dense", folders / "dense")
    assert str(result.exception).startswith("`MODELS` must be different models, got [")


def test_a_model_without_its_tokenizer_is_refused(tmp_path):
    to_shrp(tiny_bert()).save_pretrained(tmp_path / "bare")
    result = run("benchmark", tmp_path / "bare", "--shapes", "1x4")
    assert str(result.exception) == (
        f"`{tmp_path / 'bare'}` holds no tokenizer that loads: save the model's own into it by `save_pretrained`."
    )


def test_project_benchmark_checks_its_aims(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(serving_benchmark, "build", lambda name: tiny_bert().eval())
    code = serving_benchmark.main(
        ["--runtimes", "eager", "--shapes", "1x8", "--converted", "11", "--rounds", "1", "--output", str(tmp_path)]
    )
    text = capsys.readouterr().out
    assert "| static 11/12, share of its FLOP ratio in eager, 1 x 8 | >= 0.90x |" in text
    assert "| half the heads, share of its FLOP ratio in eager, 1 x 8 | >= 0.95x |" in text
    assert code == (1 if "**no**" in text else 0)


@pytest.mark.parametrize(
    ("name", "shape", "measured", "is_met"),
    [
        ("static 11/12", (1, 32), 0.75, True),
        ("static 11/12", (1, 33), 0.65, False),
        ("static 11/12", (8, 128), 0.65, False),
        ("half the heads", (1, 32), 0.65, False),
    ],
)
def test_only_a_static_model_at_1_x_32_may_reach_its_aim_in_onnx(name, shape, measured, is_met):
    shares = {"eager": 0.65, "onnx": 0.75, "int8": 0.99}
    result = SimpleNamespace(row=lambda name, runtime, workload: SimpleNamespace(share=shares[runtime], speedup=1.0))
    found = serving_benchmark.targets(result, ServingOptions(tuple(shares), shapes=(shape,)), ["stock", name])[0]
    assert (found.measured, found.is_met) == (measured, is_met)


def test_models_of_another_family_are_measured_in_pytorch():
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)).eval()
    assert measure_serving({"gpt": (model, None)}, ServingOptions(shapes=((1, 4),), num_rounds=1)).rows[0].flops > 0


def test_int8_is_compared_row_by_row(models, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "SST-2").mkdir()
    for split in ("train", "test"):
        rows = [f"the film {'is ' * (i % 9)}{WORDS[i % 5]} {split}{i}\t{i % 2}" for i in range(40)]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]), encoding="utf-8")
    folders = [str(tmp_path / name) for name in models]
    found = tmp_path / "int8.json"
    assert int8_benchmark.main([*folders, "--dataset", "sst2", "--data-dir", str(tmp_path), "--output", str(found)]) == 0
    figures = json.loads(found.read_text(encoding="utf-8"))
    assert [figure["model"] for figure in figures] == folders
    assert all(figure["rows"] == 40 and figure["agreement"] >= 0.9 for figure in figures)
    assert f"| {folders[0]} | {figures[0]['PyTorch']:.4f} (" in capsys.readouterr().out
