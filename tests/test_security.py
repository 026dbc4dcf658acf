"""Loading runs the package's own code and nothing else, reads no pickle, writes nothing, and asks no network by itself."""

import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

from shrp_hf import KeepPlan, ShrpBertForSequenceClassification, cli
from shrp_hf.pruning import prune_heads
from tests.tiny import same_state, tiny_bert, tiny_routed

ROOT = Path(__file__).parents[1]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADVICE = (
    "would be unpickled, which can run code: shrp_hf reads safetensors only. Convert it once, where you trust it, by "
    "`{stock}.from_pretrained('{folder}').save_pretrained(folder)`, and load that folder."
)


def static():
    return prune_heads(tiny_routed(2), KeepPlan(((1, 2), (2,), (0, 3)), 4))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def refused(load, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load()


# --- what loading does, by the interpreter's own account ---

# Afterwards `found` holds what was done, in order: (event, what). Reading files is left out.
WATCH = """
import json, os, sys
found, watching = [], False

def watch(event, arguments):
    global watching
    if not watching:
        return
    watching = False
    if event == "open":
        path, mode, flags = arguments
        if str(path).endswith((".bin", ".pt", ".pkl")):
            found.append(("opened", str(path)))
        writes = set(str(mode or "")) & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and path != os.devnull:
            found.append(("wrote", os.path.abspath(str(path))))
    elif event == "exec":
        # Of code without a file (dataclasses and named tuples make such) it counts who runs it.
        file = arguments[0].co_filename
        caller = sys._getframe(1).f_code.co_filename
        found.append(("ran", os.path.abspath(file) if os.path.exists(file) else caller))
    elif event.startswith(("socket.", "subprocess.", "pickle.", "urllib.", "http.", "ftplib.", "smtplib.", "pty.")):
        found.append((event, str(arguments)))
    elif event.startswith(("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill")):
        found.append((event, str(arguments)))
    elif event in ("os.remove", "os.rename", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"):
        found.append((event, str(arguments)))
    watching = True

sys.addaudithook(watch)
"""

LOADS = """
import torch, transformers
sys.modules["shrp_hf"] = None  # not installed, however the tests are run
watching = True
model = transformers.AutoModelForSequenceClassification.from_pretrained("model", trust_remote_code=True)
model(torch.ones(2, 5, dtype=torch.long))
watching = False
assert type(model).__name__ == "ShrpBertForSequenceClassification"
"""

DEPENDENCIES = """
import tempfile
tempfile.gettempdir()
watching = True
import datasets, torch
watching = False
"""

IMPORTS = """
import tempfile
import datasets, torch
tempfile.gettempdir()  # tries, once, where it can write
watching = True
import shrp_hf
from shrp_hf.cli import app
from typer.testing import CliRunner
for command in [None, *app.registered_commands]:
    words = ["--help"] if command is None else [command.name or command.callback.__name__.replace("_", "-"), "--help"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0 and "Usage" in answer.output, (words, answer.output)
watching = False
"""


def done_by(code, folder, **environment):
    """What a fresh interpreter does under `code`: event -> what, without the code of Python and of installed packages."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    run = subprocess.run(
        [sys.executable, "-c", f"{WATCH}{code}\nprint('\\n' + json.dumps(found))"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    done = {}
    for event, what in json.loads(run.stdout.splitlines()[-1]):
        if not (event == "ran" and what.startswith((*installed, "<frozen", "<string>"))):
            done.setdefault(event, set()).add(what)
    return done


DOES_HARM = """
import pickle, socket, subprocess
watching = True
open("written", "w").close()
pickle.loads(b"cos\\nsystem\\n.")
socket.getaddrinfo("127.0.0.1", 80)
subprocess.run(["true"])
os.system("true")
os.remove("written")
exec("1")
"""


def test_what_does_harm_is_seen(tmp_path):
    expected = {"wrote", "pickle.find_class", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.remove"}
    assert expected <= done_by(DOES_HARM, tmp_path).keys()


def test_loading_a_shipped_model_runs_its_own_code_and_nothing_else(tmp_path):
    folder, modules = tmp_path / "model", tmp_path / "modules"
    static().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (folder / "setup.py").write_text("raise SystemExit")
    done = done_by(LOADS, tmp_path, HF_MODULES_CACHE=str(modules))
    assert done.keys() == {"ran", "wrote"}
    assert all(Path(what).is_relative_to(modules) for what in done["ran"] | done["wrote"])
    ran = [Path(what) for what in done["ran"] if Path(what).name != "__init__.py"]
    assert {path.name for path in ran} == {path.name for path in folder.glob("*.py")} - {"setup.py"}
    for path in ran:
        assert path.read_bytes() == (ROOT / "shrp_hf" / "models" / path.name).read_bytes()
    for path in modules.rglob("__init__.py"):
        assert path.read_bytes() == b""


def test_importing_and_asking_for_help_touch_no_network_and_no_file(tmp_path):
    done = done_by(IMPORTS, tmp_path)
    assert done.keys() == {"ran"}
    assert all(Path(what).is_relative_to(ROOT / "shrp_hf") for what in done["ran"])


def test_dependencies_that_look_around_as_they_are_imported_stay_on_this_machine(tmp_path):
    """Datasets 4.0 imports urllib3, which binds a local socket to see whether there is IPv6; torch for CUDA asks ldconfig."""
    done = done_by(DEPENDENCIES, tmp_path)
    assert done.keys() <= {"socket.__new__", "socket.bind", "subprocess.Popen"}
    assert all("::1" in what for what in done.get("socket.bind", ()))
    assert all("ldconfig" in what for what in done.get("subprocess.Popen", ()))


# --- pickles ---


@pytest.fixture
def never_unpickled(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", fail)


def instead(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def sharded_instead(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def in_the_index(name):
    def rewrite(folder):
        names = list(load_file(folder / WEIGHTS))
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / INDEX).write_text(json.dumps(index))
        (folder / WEIGHTS).unlink()

    return rewrite


def in_the_config(folder):
    (folder / "adapter_model.bin").write_bytes(b"")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))


@pytest.mark.parametrize("build", [static, tiny_bert])
@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        pytest.param(instead, f"`{{folder}}` has no `{WEIGHTS}`, and a pickle {ADVICE}", id="instead"),
        pytest.param(sharded_instead, f"`{{folder}}` has no `{WEIGHTS}`, and a pickle {ADVICE}", id="sharded"),
        pytest.param(
            in_the_index("a.bin"), f"`{INDEX}` of `{{folder}}` names the file 'a.bin', which {ADVICE}", id="in the index"
        ),
        pytest.param(
            in_the_index("../a.safetensors"),
            f"`{INDEX}` of `{{folder}}` names the file '../a.safetensors', which lies elsewhere: download it again.",
            id="elsewhere",
        ),
        pytest.param(
            in_the_config,
            "`transformers_weights='adapter_model.bin'` is no safetensors file: shrp_hf reads no other.",
            id="in the config",
        ),
    ],
)
@pytest.mark.usefixtures("never_unpickled")
def test_pickles_are_refused(rewrite, message, build, tmp_path):
    build().save_pretrained(tmp_path)
    rewrite(tmp_path)
    message = message.format(stock="BertForSequenceClassification", folder=tmp_path)
    refused(lambda: ShrpBertForSequenceClassification.from_pretrained(tmp_path), message)


@pytest.mark.parametrize("option", ["use_safetensors", "weights_only"])
@pytest.mark.usefixtures("never_unpickled")
def test_options_that_ask_for_pickles_are_refused(option, tmp_path):
    static().save_pretrained(tmp_path)
    advice = ADVICE.format(stock="BertForSequenceClassification", folder=tmp_path)
    for door in (ShrpBertForSequenceClassification, AutoModelForSequenceClassification):
        refused(lambda door=door: door.from_pretrained(tmp_path, **{option: False}), f"`{option}=False` {advice}")
    ShrpBertForSequenceClassification.from_pretrained(tmp_path, **{option: True})


@pytest.mark.usefixtures("never_unpickled")
def test_file_that_is_a_pickle_is_refused(tmp_path):
    static().save_pretrained(tmp_path)
    instead(tmp_path)
    path, config = tmp_path / "pytorch_model.bin", AutoConfig.from_pretrained(tmp_path)
    message = f"`{path}` {ADVICE.format(stock='BertForSequenceClassification', folder=tmp_path)}"
    refused(lambda: ShrpBertForSequenceClassification.from_pretrained(path, config=config), message)


def test_whatever_names_a_pickle_it_is_refused_in_the_end():
    """The last door, through which also the weights of adapters come."""
    model, folder = static(), "downloads"
    files = [f"{folder}/adapter.safetensors", f"{folder}/adapter_model.bin"]
    message = f"`{folder}/adapter_model.bin` {ADVICE.format(stock='BertForSequenceClassification', folder=folder)}"
    refused(lambda: model._load_pretrained_model(model, None, files, None), message)


@pytest.mark.usefixtures("never_unpickled")
def test_pickle_beside_safetensors_is_not_read(tmp_path):
    model = static()
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.usefixtures("never_unpickled")
def test_commands_refuse_pickles_of_stock_models(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    instead(tmp_path)
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)])
    advice = ADVICE.format(stock="AutoModel", folder=tmp_path)
    assert str(result.exception) == f"`{tmp_path}` has no `{WEIGHTS}`, and a pickle {advice}"


@pytest.mark.usefixtures("never_unpickled")
def test_folder_without_any_weights_is_no_pickle(tmp_path):
    static().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(OSError, match=f"no file named {WEIGHTS} found"):
        ShrpBertForSequenceClassification.from_pretrained(tmp_path)


# --- configs that name code ---

EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig as Evil
"""


@pytest.mark.parametrize(
    "reference", ["evil.Evil", "../evil.Evil", "..evil.Evil", "{parent}/evil.Evil", "org/repo--evil.Evil"], ids=str
)
def test_code_that_a_config_names_stays_untouched(reference, tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "ran"
    model = static()
    model.save_pretrained(folder)
    for place in (folder, tmp_path):
        (place / "evil.py").write_text(EVIL.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    auto_map = dict.fromkeys(names, reference.format(parent=tmp_path))
    config |= {"auto_map": auto_map, "_name_or_path": str(tmp_path), "custom_pipelines": {"evil": {"impl": "evil.Evil"}}}
    (folder / "config.json").write_text(json.dumps(config))
    for door in (ShrpBertForSequenceClassification, AutoModelForSequenceClassification):
        loaded = door.from_pretrained(folder)
        assert same_state(loaded, model)
    AutoModel.from_pretrained(folder)
    assert not marker.exists()
    loaded.save_pretrained(tmp_path / "again", with_code=False)  # the names are not passed on
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    loaded.save_pretrained(tmp_path / "coded")
    written = json.loads((tmp_path / "coded" / "config.json").read_text())["auto_map"]
    assert written == dict(ShrpBertForSequenceClassification.auto_classes)
