"""A task that needs no download: from which installed library is this docstring?"""

import ast
import gc
import hashlib
import importlib.util
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shrp_hf.defaults import SEED

LIBRARIES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "torch": "torch",
    "transformers": "transformers",
    "scikit-learn": "sklearn",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "sympy": "sympy",
    "networkx": "networkx",
}
"""Class name to import name."""

_FEWEST_WORDS, _MOST_WORDS = 6, 40
# The large libraries hold far more than is used; these bounds keep the walk at seconds and one file from dominating.
_TEXTS_PER_LIBRARY, _TEXTS_PER_FILE, _HELD_OUT_PER_FILE = 1400, 60, 15
_TRAIN_PER_CLASS, _TEST_PER_CLASS = 1000, 200
# Tests, and copies of other projects, which would carry a wrong label.
_SKIPPED_FOLDERS = frozenset(
    "test tests testing extern external externals vendor vendored third_party _external _lib _vendor _vendored".split()
)
_SKIPPED_STEMS = ("test_", "testing", "conftest")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_STATEMENTS = (ast.stmt, ast.excepthandler)

Rows = list[tuple[str, int]]


def docstring_rows(
    libraries: Mapping[str, str] = LIBRARIES,
    *,
    seed: int = SEED,
    max_train: int | None = None,
    max_validation: int = 1000,
) -> dict[str, Rows]:
    """Gathers the first paragraphs (6 to 40 words) of the libraries' docstrings; nothing is imported or run.

    All docstrings of a file are in one split, a text that several libraries share is in none, and every split holds
    the same number of texts per class. The reported rows depend on the installed versions, not on `seed`.

    Args:
        libraries: Class name to import name.
        seed: Seed that divides the other files into training and held-out ones.
        max_train: Most training rows over all classes; None takes up to 1,000 per class.
        max_validation: Most held-out rows over all classes.

    Returns:
        Lists of (text, class index) for "train", "validation" and "test", the classes taking turns.

    Raises:
        ImportError: A library is not installed.
        ValueError: A library holds too few docstrings to fill three splits, or a limit is below one row per class.
    """
    for name, limit in (("max_train", max_train), ("max_validation", max_validation)):
        if limit is not None and limit < len(libraries):
            raise ValueError(f"`{name}` must allow one row for each of {len(libraries)} classes, got {limit}.")
    folders = {name: _folder(module) for name, module in libraries.items()}
    found = {name: _texts_by_file(name, folder) for name, folder in folders.items()}
    owners = Counter(text.lower() for files in found.values() for texts in files.values() for text in texts)
    unique = {
        name: {file: own for file, texts in files.items() if (own := [t for t in texts if owners[t.lower()] == 1])}
        for name, files in found.items()
    }
    fewest = min(sum(map(len, files.values())) for files in unique.values())
    sizes = {
        "test": min(_TEST_PER_CLASS, fewest // 5),
        "validation": min(max_validation // len(libraries), fewest // 10),
    }
    limit = _TRAIN_PER_CLASS if max_train is None else max_train // len(libraries)
    divided = [_divide(files, sizes, seed) for files in unique.values()]
    sizes["train"] = min(limit, *(len(splits["train"]) for splits in divided))
    if not all(sizes.values()):
        counts = {name: sum(map(len, files.values())) for name, files in unique.items()}
        raise ValueError(f"`libraries` must each hold docstrings in several files to fill three splits, got {counts}.")
    return {
        split: [(splits[split][row], label) for row in range(size) for label, splits in enumerate(divided)]
        for split, size in sizes.items()
    }


def _folder(module: str) -> Path:
    # Looking for a top-level module does not import it.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The docstring task reads the installed package {module!r}, which is missing: pip install 'shrp_hf[demo]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _texts_by_file(name: str, folder: Path) -> dict[str, list[str]]:
    """Reads files in an order that looks random and is the same everywhere, until there are enough texts."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    files: dict[str, list[str]] = {}
    seen: set[str] = set()
    for file in sorted(paths, key=lambda file: _digest(f"{name}/{file}")):
        *parents, stem = file.split("/")
        if _SKIPPED_FOLDERS.intersection(parents) or stem.startswith(_SKIPPED_STEMS):
            continue
        texts: list[str] = []
        for text in _paragraphs(paths[file]):
            if text.lower() not in seen and len(texts) < _TEXTS_PER_FILE:
                seen.add(text.lower())
                texts.append(text)
        if texts:
            files[file] = texts
        if len(seen) >= _TEXTS_PER_LIBRARY:
            break
    return files


@contextmanager
def _collector_paused() -> Iterator[None]:
    # Looking for cycles, which syntax trees have none of, takes longer than parsing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(), _collector_paused():
            # Python warns about other people's escape sequences while parsing.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        # Templates and files for another Python version lie in some packages.
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        # Expressions hold no docstrings, and going through them would double the time.
        waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, _STATEMENTS))
        if isinstance(node, _DOCUMENTED):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if _FEWEST_WORDS <= len(text.split()) <= _MOST_WORDS:
                yield text


def _divide(files: dict[str, list[str]], sizes: Mapping[str, int], seed: int) -> dict[str, list[str]]:
    """Gives whole files to the reported split, then (by seed) to the held-out one, the rest to training."""
    # The files come in hash order, so the reported ones are always the same.
    waiting = list(files)
    texts: dict[str, list[str]] = {"test": [], "validation": [], "train": []}
    for split, size in sizes.items():
        while waiting and len(texts[split]) < size:
            texts[split].extend(files[waiting.pop(0)][:_HELD_OUT_PER_FILE])
        random.Random(seed).shuffle(waiting)
    for file in waiting:
        texts["train"].extend(files[file])
    for split, several in texts.items():
        random.Random(0 if split == "test" else seed).shuffle(several)
    return texts
