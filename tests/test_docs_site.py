"""The documentation site: it builds without a warning, fetches nothing, and leaves no public name or command out."""

import contextlib
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, PreTrainedModel
from typer.main import get_command

import shrp_hf
from shrp_hf import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
NAMED = re.findall(r"^::: (shrp_hf[\w.]*)$", "\n".join(p.read_text(encoding="utf-8") for p in REFERENCE), re.MULTILINE)


def test_every_public_name_is_in_the_reference_once():
    assert len(set(NAMED)) == len(NAMED)
    assert {f"shrp_hf.{name}" for name in shrp_hf.__all__} - {"shrp_hf.__version__"} <= set(NAMED)


def test_every_page_is_in_the_navigation():
    navigation = (DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(path.relative_to(DOCS)) for path in DOCS.glob("**/*.md")}
    copied = {"index.md", "examples.md", "changelog.md", "contributing.md", "security.md"}
    made = copied | {"reference/command-line.md"}  # by docs/site/hooks.py
    assert pages <= set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) <= pages | made


def resolve(name):
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            found = importlib.import_module(".".join(parts[:end]))
            return functools.reduce(getattr, parts[end:], found)
    raise AssertionError(name)


def documented():
    """Every function of the reference, and every public method that overrides nobody else's: name, function, docstring."""
    for name in NAMED:
        found = resolve(name)
        if not inspect.isclass(found):
            yield name, found, inspect.getdoc(found)
            continue
        bases = [base for base in found.__mro__ if not base.__module__.startswith("shrp_hf")]
        theirs = {member for base in (*bases, PreTrainedConfig, PreTrainedModel) for member in dir(base)}
        for member, value in vars(found).items():
            method = getattr(value, "__func__", value)
            if inspect.isfunction(method) and method.__module__.startswith("shrp_hf") and method.__name__ == member:
                is_own = member not in theirs - {"push_to_hub", "from_pretrained"}
                if not member.startswith("_") and is_own and "As in `" not in (method.__doc__ or ""):
                    yield f"{name}.{member}", method, inspect.getdoc(method)


@pytest.mark.parametrize(("function", "text"), [pytest.param(f, text, id=name) for name, f, text in documented()])
def test_public_docstring_speaks_of_every_argument_and_error(function, text):
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert [name for name in named if not re.search(rf"\b{name}\b", text)] == []
    assert len(named) < 2 or "Args:" in text or all(f"`{name}`" in text for name in named)
    if re.search(r"^\s+raise \w", inspect.getsource(inspect.unwrap(function)), re.MULTILINE):
        assert "Raises:" in text


@pytest.mark.slow
def test_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    config = str(DOCS / "site" / "mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr

    pages = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.glob("**/*.html")}
    for page, text in pages.items():
        fetched = r'<(?:script|img|iframe)[^>]* src="https?:|<link[^>]* rel="stylesheet"[^>]* href="https?:'
        assert not re.findall(fetched, text), page
    reference = "".join(text for page, text in pages.items() if page.startswith("reference/"))
    for name in NAMED:
        assert f'id="{name}"' in reference, name
    for name in get_command(cli.app).commands:
        assert f"shrp-hf {name}" in pages["reference/command-line.html"]


def test_tests_that_the_pages_name_are_there():
    named = {
        name for path in (ROOT / "docs").rglob("*.md") for name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", path.read_text())
    }
    assert len(named) > 20
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []
