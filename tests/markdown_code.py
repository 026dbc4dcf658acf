"""The code blocks of the documentation, and what it takes to run them or to check a command line without running it."""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from typer.main import get_command

from shrp_hf import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "examples" / "README.md", *ROOT.glob("docs/**/*.md")])
NOTE = re.compile(r"<!-- (continues|not run: .+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins in, and the comment above it that is meant for tests."""

    language: str
    code: str
    line: int
    note: str = ""

    @property
    def is_run(self) -> bool:
        return self.language in ("python", "bash") and not self.note.startswith("not run")


def blocks_of(path: Path) -> list[Block]:
    """All fenced and indented code of a page, in order."""
    found, note = [], ""
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            found.append(Block(token.info, token.content, token.map[0] + 1, note))
        match = NOTE.fullmatch(token.content.strip()) if token.type == "html_block" else None
        note = match[1] if match else ""
    return found


def commands_of(code: str) -> list[list[str]]:
    """The words of every command of a bash block; settings in front of it are left out."""
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    while any(line and re.fullmatch(r"[A-Z_]+=.*", line[0]) for line in words):
        words = [line[1:] if line and re.fullmatch(r"[A-Z_]+=.*", line[0]) else line for line in words]
    return [line for line in words if line]


def check_command(words: list[str]) -> None:
    """Fails unless the command exists and takes these options."""
    program, *rest = (word.removeprefix(".venv/bin/") for word in words)
    if program == "shrp-hf":
        _check_shrp_hf(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(filter(lambda word: "=" not in word, rest)) <= set(targets), f"no such target: {words}"
    elif program == "python":
        _check_python(rest)
    elif program == "torchrun" or (program, rest[0]) == ("accelerate", "launch"):
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        _check_python(rest[script:])
    elif (program, rest[0]) == ("pip", "install"):
        _check_pip(rest[1:])
    elif program == "pytest":
        _check_pytest(rest)
    else:
        pytest.fail(f"Nothing here knows the command {words}: teach tests/markdown_code.py, or mark its block.")


def _check_shrp_hf(words: list[str]) -> None:
    group = get_command(cli.app)
    for command in group.commands.values():
        command.callback = lambda **options: None
    group.main(words, standalone_mode=False)  # raises what click has to say about unknown options and wrong values


class _ParsedError(Exception):
    pass


def _check_python(words: list[str]) -> None:
    """Runs a module or script as far as the end of its `argparse`, which so judges the options."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args, **kwargs):
        _, unknown = parse(parser, *args, **kwargs)
        assert not unknown, f"unknown options {unknown}"
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        patch.syspath_prepend(str(ROOT))
        path = find_spec(words[1]).origin if words[0] == "-m" else str(ROOT / words[0])
        with pytest.raises(_ParsedError):
            runpy.run_path(path, run_name="__main__")


def extras() -> set[str]:
    """The extras that setup.cfg offers."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(setup["options.extras_require"])


def _check_pip(words: list[str]) -> None:
    for word in words:
        if "[" in word:
            assert set(re.search(r"\[(.+)\]", word)[1].split(",")) <= extras(), f"no such extra: {word}"
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file(), f"no such file: {word}"


def _check_pytest(words: list[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    markers = {marker.partition(":")[0] for marker in settings["tool"]["pytest"]["ini_options"]["markers"]}
    for previous, word in zip(["", *words], words, strict=False):
        if previous == "-m":
            assert set(word.split()) - {"or", "and", "not"} <= markers, f"no such marker: {word}"
        elif word.startswith("tests"):
            assert (ROOT / word.partition("::")[0]).exists(), f"no such file: {word}"
