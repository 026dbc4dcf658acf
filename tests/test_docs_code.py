"""Every code block of the documentation runs: Python on tiny stand-ins, command lines against the real parsers.

What a page names is there: its models as tiny ones in folders of that name, `model`, `tokenizer`, `train_dataset`,
`eval_dataset` and `batches` as names. A block that goes on where the one above ended says `<!-- continues -->`, one
that cannot run says `<!-- not run: why -->`; the latter are counted here.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer
from typer.testing import CliRunner

from shrp_hf import KeepPlan, cli, prune_heads
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.workflows.compress import Compression
from tests.markdown_code import PAGES, ROOT, Block, blocks_of, check_command, commands_of
from tests.task_kinds import make
from tests.test_compress import flop_time
from tests.tiny import tiny_bert
from tests.toy_family import forgotten_afterwards

LANGUAGES = {"python", "bash", "text", "json"}
MOST_NOT_RUN = 3
WORDS = ["good", "bad", "great", "dull", "the", "film", "is", "very", "a", "story"]
NUM_LAYERS, NUM_CLASSES = 12, 9  # the pages convert 11 layers; the docstring task has 9 classes
SIZES = {"train": 45, "validation": 18, "test": 18}
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}


def rows(count: int, classes: int = 2, seed: int = 0) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)
    texts = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (4,), generator=generator)) + f" {seed} {row}"
        for row in range(count)
    ]
    return {"sentence": texts, "label": [row % classes for row in range(count)]}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Tiny models under the names that the pages use."""
    root = tmp_path_factory.mktemp("stand-ins")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(root / "vocab.txt"), model_max_length=40)
    lines = [f"{text},{('bad', 'good')[row % 2]}" for row, text in enumerate(rows(60)["sentence"])]
    (root / "reviews.csv").write_text("\n".join(["Review,Sentiment", *lines]) + "\n", encoding="utf-8")

    for kind, name, data in (
        ("tokens", "tagger", "names"),
        ("ranking", "cross-encoder", "answers"),
        ("embeddings", "embedder", "search"),
    ):
        (root / "made" / kind).mkdir(parents=True)
        made = make(kind, root / "made" / kind)
        shutil.copytree(made.model, root / "org" / name)
        shutil.copytree(made.options[1], root / data)
    texts = [json.dumps({"text": f"{text} {row}"}) for row, text in enumerate(rows(40)["sentence"])]
    (root / "texts.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    pairs = [f"{text},the film {row},{row % 5}" for row, text in enumerate(rows(20)["sentence"])]
    (root / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]) + "\n", encoding="utf-8")

    def save(model, *names):
        for name in names:
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)

    sizes = {"num_hidden_layers": NUM_LAYERS, "max_position_embeddings": 512}
    save(tiny_bert(num_labels=2, **sizes), "org/bert-base-sst2", "bert-base-uncased", "out/sst2/dense")
    save(tiny_bert(num_labels=NUM_CLASSES, **sizes), "out/demo/dense")
    for folder in ("out/sst2", "out/demo"):
        routed = ShrpBertForSequenceClassification.from_pretrained(root / folder / "dense", expert_layers=NUM_LAYERS - 1)
        for layer in range(1, NUM_LAYERS):
            routed.layers[layer].router.usage += torch.tensor([1, 5, 2, 9])
        save(routed, f"{folder}/routed")
        save(prune_heads(routed, KeepPlan(kept=((0, 1, 2, 3), *[(3,)] * (NUM_LAYERS - 1)), num_heads=4)), f"{folder}/static")
    return root


@pytest.fixture
def page_folder(stand_ins, tmp_path, monkeypatch):
    """A working directory in which a page's blocks run; what would go to the Hub goes to a folder of that name."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    pushed = []

    def push_to_hub(self, repo_id, **kwargs):
        self.save_pretrained(repo_id)
        pushed.append(repo_id)

    for owner in (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase):
        monkeypatch.setattr(owner, "push_to_hub", push_to_hub)
    with forgotten_afterwards():  # a page registers a family
        yield tmp_path


def fresh_names() -> dict:
    """What a block may use without having made it."""
    tokenizer = AutoTokenizer.from_pretrained("org/bert-base-sst2")
    model = AutoModelForSequenceClassification.from_pretrained("org/bert-base-sst2").eval()

    def encode(count: int, seed: int) -> Dataset:
        data = rows(count, seed=seed)
        encoded = tokenizer(data["sentence"], padding="max_length", max_length=12, truncation=True)
        return Dataset.from_dict({**encoded, "labels": data["label"]})

    train = encode(16, 0)
    batches = [{name: torch.tensor(values) for name, values in train[i : i + 8].items()} for i in (0, 8)]
    datasets = {"train_dataset": train, "eval_dataset": encode(8, 1)}
    return {"model": model, "tokenizer": tokenizer, "batches": batches, **datasets, "__name__": "page"}


def run_python(page: str, block: Block, names: dict) -> dict:
    names = names if block.note == "continues" else fresh_names()
    # The empty lines make a traceback name the line of the page.
    exec(compile("\n" * block.line + block.code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", NAMES)
def test_every_block_says_what_it_is(page):
    for block in blocks_of(NAMES[page]):
        assert block.language in LANGUAGES, f"{page}:{block.line}: a fence names one of {sorted(LANGUAGES)}"
        if block.language == "json":
            json.loads(block.code)


def test_blocks_that_do_not_run_are_few():
    left_out = [f"{page}:{b.line} {b.note}" for page in NAMES for b in blocks_of(NAMES[page]) if b.note.startswith("not run")]
    assert len(left_out) == MOST_NOT_RUN, left_out


@pytest.mark.parametrize("page", [page for page in NAMES if any(b.language == "bash" for b in blocks_of(NAMES[page]))])
def test_commands_exist_and_take_their_options(page):
    for block in blocks_of(NAMES[page]):
        if block.language == "bash" and block.is_run:
            for words in commands_of(block.code):
                check_command(words)


@pytest.mark.parametrize("page", [page for page in NAMES if any(b.language == "python" for b in blocks_of(NAMES[page]))])
def test_python_blocks_run(page, page_folder):
    names = {}
    for block in blocks_of(NAMES[page]):
        if block.language == "python" and block.is_run:
            names = run_python(page, block, names)


@pytest.fixture
def data_from_the_hub(monkeypatch):
    """Tiny data sets in the place of those that a command line would fetch or gather."""
    splits = {"train": Dataset.from_dict(rows(60)), "validation": Dataset.from_dict(rows(12, seed=1))}
    monkeypatch.setattr("shrp_hf.tasks.sources.read_hub", lambda *names: splits)

    def docstrings(**kwargs):
        data = {name: rows(count, NUM_CLASSES, seed) for seed, (name, count) in enumerate(SIZES.items())}
        return {name: list(zip(split["sentence"], split["label"], strict=True)) for name, split in data.items()}

    monkeypatch.setattr("shrp_hf.tasks.loading.docstring_rows", docstrings)
    # A stand-in's speed is that of the machine's mood: what a page promises of a speed-up is reached here by FLOPs.
    monkeypatch.setitem(Compression.__init__.__kwdefaults__, "measure", flop_time)
    # Nor has a stand-in learned anything.
    for module, part in (("compress", "run"), ("compare", "run"), ("compare", "preview")):
        monkeypatch.setattr(f"shrp_hf.workflows.{module}.{part}.check_learned", lambda *args: None)
    # The package's attribute of this name is the command.
    monkeypatch.setattr(sys.modules["shrp_hf.cli.train"], "_demo_model", lambda: Path("bert-base-uncased"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in NAMES if "shrp-hf " in NAMES[page].read_text(encoding="utf-8")])
def test_commands_run(page, page_folder, data_from_the_hub):
    for block in blocks_of(NAMES[page]):
        if block.language != "bash" or not block.is_run:
            continue
        for program, *words in commands_of(block.code):
            if program == "shrp-hf":
                output = words[words.index("--output") + 1] if "--output" in words else "nowhere"
                shutil.rmtree(output, ignore_errors=True)  # a stand-in, in the place of what this command makes
                result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
                assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        pytest.param("shrp-hf prune out --dataset sst2 --keep-share 0.5 --output x", "No such option", id="option"),
        pytest.param("shrp-hf prune out --dataset sst2 --keep half --output x", "valid", id="value"),
        pytest.param("shrp-hf shrink out", "No such command", id="command"),
        pytest.param("make tests", "no such target", id="target"),
        pytest.param("python -m experiments.foundation --rounds many", "invalid int value", id="value of a module"),
        pytest.param("python -m experiments.foundation --round 3 --speed", "unknown options", id="option of a module"),
        pytest.param("python examples/prune.py --model x", "No such file", id="script"),
        pytest.param('pip install -e ".[post-hoc]"', "no such extra", id="extra"),
        pytest.param("pytest -m quick", "no such marker", id="marker"),
        pytest.param("rm -rf out", "Nothing here knows the command", id="unknown program"),
    ],
)
def test_wrong_commands_are_noticed(command, complaint, capsys):
    (words,) = commands_of(command)
    with pytest.raises(BaseException, match=".") as error:  # pytest.fail and argparse's exit are no Exceptions
        check_command(words)
    assert complaint in f"{error.value}{capsys.readouterr().err}"


def test_blocks_are_found_with_their_notes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n<!-- continues -->\n```python\nb = a\n```\n\n"
        "- in a list\n\n  <!-- not run: needs a GPU -->\n  ```bash\n  A=1 make x \\\n    y && make z\n  ```\n\n    indented\n",
        encoding="utf-8",
    )
    first, second, third = blocks_of(page)
    assert [(b.language, b.note, b.is_run) for b in (first, second, third)] == [
        ("python", "", True),
        ("python", "continues", True),
        ("bash", "not run: needs a GPU", False),
    ]
    assert commands_of(third.code) == [["make", "x", "y"], ["make", "z"]]
    assert run_python("page", second, {"a": 1})["b"] == 1
