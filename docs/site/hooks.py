"""Pages of the site that are made from what is elsewhere, so that they cannot go stale."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from shrp_hf.cli.app import EXIT_CODES

ROOT = Path(__file__).parents[2]
COPIED = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the front page (the README), the pages that lie outside docs/, and the command line's own help."""
    for page, source in COPIED.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, content=_from_the_root(ROOT / source)))
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Points links to those pages, as they have to be in the repository, to where the pages are on the site."""
    for page, source in COPIED.items():
        markdown = markdown.replace(f"](../../{source}", f"](../{page}").replace(f"](../{source}", f"]({page}")
    return markdown


def command_line() -> str:
    """Returns the page of all commands, as `typer` writes it from the application."""
    command = [sys.executable, "-m", "typer", "shrp_hf.cli", "utils", "docs", "--name", "shrp-hf"]
    page = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    return page.replace("# `shrp-hf`", "# Command line", 1) + f"\n## Exit codes\n\n| code | meaning |\n|---:|---|\n{codes}\n"


def _from_the_root(path: Path) -> str:
    """Returns a page of the repository with its links as they have to be from the root of the site."""
    markdown = re.sub(r"\]\((?:\.\./)?docs/", "](", path.read_text(encoding="utf-8"))
    for page, source in COPIED.items():
        markdown = markdown.replace(f"]({source}", f"]({page}")
    return markdown
