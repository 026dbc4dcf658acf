"""The files of a SentenceTransformer around its encoder: read into the encoder's config, and written from there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from shrp_hf.files import written_whole
from shrp_hf.models.outputs import POOLING_MODES

_KINDS = ("Transformer", "Pooling", "Normalize")
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SIMILARITIES = (None, "cosine", "dot")
_TYPE = "sentence_transformers.models.{}"  # which every version reads
POOLING_FOLDER, NORMALIZE_FOLDER = "1_Pooling", "2_Normalize"


def read_sentence_folder(name: str) -> dict[str, Any] | None:
    """Reads what a SentenceTransformer does with its encoder's tokens, and its prompts.

    Args:
        name: Hub id or directory.

    Returns:
        `modes`, `normalize`, `similarity` (None: cosine), `prompts`, `default_prompt_name` and `max_length`; None
        where the folder holds an encoder alone.

    Raises:
        ValueError: It has a module, a pooling or a similarity that is not known here, or its encoder lies elsewhere.
    """
    modules = _read(name, "modules.json")
    if modules is None:
        return None
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in [list(_KINDS), list(_KINDS[:2])]:
        raise ValueError(
            f"`{name}`, modules.json: its modules are {', '.join(kinds)}, and known are Transformer and Pooling, perhaps with "
            "Normalize: what another module does to the vectors would be lost."
        )
    if modules[0]["path"]:
        raise ValueError(
            f"`{name}`, modules.json: its encoder lies in {modules[0]['path']!r}: save it anew by a current "
            "sentence-transformers, `SentenceTransformer(folder).save(other)`, which puts it beside modules.json."
        )
    pooling = _read(name, f"{modules[1]['path']}/config.json") or {}
    stated, legacy = pooling.get("pooling_mode"), tuple(mode for key, mode in _LEGACY.items() if pooling.get(key))
    modes = (stated,) if isinstance(stated, str) else tuple(stated or legacy or ("mean",))
    unknown = sorted({*modes} - {*POOLING_MODES})
    if unknown:
        raise ValueError(f"`{name}`, {modules[1]['path']}: pooling {unknown[0]!r} is not one of {', '.join(POOLING_MODES)}.")
    words, own = _read(name, "sentence_bert_config.json") or {}, _read(name, "config_sentence_transformers.json") or {}
    if words.get("do_lower_case"):
        raise ValueError(f"`{name}`, sentence_bert_config.json: `do_lower_case` lies outside of the tokenizer: set it there.")
    if not pooling.get("include_prompt", True):
        raise ValueError(f"`{name}`, {modules[1]['path']}: it leaves prompts out of its pooling, which is not known here.")
    similarity = own.get("similarity_fn_name")
    if similarity not in _SIMILARITIES:
        raise ValueError(f"`{name}` compares by {similarity!r}, and known are cosine and dot: leave `similarity_fn_name` out.")
    return {
        "modes": list(modes),
        "normalize": len(kinds) > 2,
        "similarity": similarity,
        "prompts": own.get("prompts") or {},
        "default_prompt_name": own.get("default_prompt_name"),
        "max_length": words.get("max_seq_length"),
    }


def plain_embedding() -> dict[str, Any]:
    """What sentence-transformers makes of an encoder alone: the mean of its tokens."""
    return {
        "modes": ["mean"],
        "normalize": False,
        "similarity": None,
        "prompts": {},
        "default_prompt_name": None,
        "max_length": None,
    }


def write_sentence_folder(folder: Path, embedding: Mapping[str, Any], width: int) -> None:
    """Writes the files that make a SentenceTransformer of a directory with an encoder.

    Args:
        folder: The directory.
        embedding: As `read_sentence_folder` returns it.
        width: Hidden size of the encoder.
    """
    kinds = _KINDS if embedding["normalize"] else _KINDS[:2]
    paths = ("", POOLING_FOLDER, NORMALIZE_FOLDER)
    modules = [{"idx": i, "name": str(i), "path": paths[i], "type": _TYPE.format(kind)} for i, kind in enumerate(kinds)]
    pooling = {"word_embedding_dimension": width, "include_prompt": True}
    pooling |= {key: mode in embedding["modes"] for key, mode in _LEGACY.items()}
    own = {name: embedding[name] for name in ("prompts", "default_prompt_name")}
    files: dict[str, Any] = {
        f"{POOLING_FOLDER}/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": embedding["max_length"], "do_lower_case": False},
        "config_sentence_transformers.json": own | {"similarity_fn_name": embedding["similarity"] or "cosine"},
        "modules.json": modules,
    }
    for name in paths[: len(kinds)]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        with written_whole(folder / name) as partial:
            partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read(name: str, file: str) -> Any:
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "gated_repo", "connection_errors")}
    path = cached_file(name, file, **quiet)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{name}`, {file} is no JSON: {error}") from error
