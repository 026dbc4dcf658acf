"""What a teacher says about rows, computed once and kept on disk: a student's epoch then costs a student's epoch."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from shrp_hf.files import written_whole
from shrp_hf.models.outputs import EMBEDDING, JUDGED, embedding_of, task_head, vectors_of

ROW_COLUMN = "teacher_row"
"""The column that tells which row of the stored outputs a row of a training set has."""
_PER_TOKEN = "token_logits"
_ANSWERS = ("logits", _PER_TOKEN, EMBEDDING)
"""Names of the files that may hold what a teacher says: of each row, of each token, or a vector of each row."""
_NO_INPUTS = ("label", "labels", JUDGED, ROW_COLUMN)
_BATCH_SIZE = 64
_BATCHES_PER_WRITE = 16


class TeacherOutputs:
    """Logits (or vectors) and hidden states of a teacher for the rows of one data set, read from memory-mapped files.

    Called with a batch, it answers as the teacher would, so `ShrpTrainer` takes it in the teacher's place. The files lie in
    a folder named by a digest of the teacher's weights, the rows' tokens and what is stored; a computation that was
    interrupted is taken up, and several processes may do the same one.

    Args:
        folder: From `compute`.
        rows: The rows that the outputs are of.
    """

    def __init__(self, folder: Path, rows: Dataset) -> None:
        self.folder = folder
        self._rows = _digest_of_rows(rows)
        self._lengths = _lengths(rows)
        self._offsets = np.cumsum(self._lengths) - self._lengths
        self._name = next(name for name in _ANSWERS if (folder / f"{name}.npy").exists())
        self._answers = np.load(folder / f"{self._name}.npy", mmap_mode="r")
        hidden = folder / "hidden.npy"
        self._hidden = np.load(hidden, mmap_mode="r") if hidden.exists() else None

    @classmethod
    def compute(
        cls,
        teacher: PreTrainedModel,
        rows: Dataset,
        collator: Callable[[list[dict]], dict[str, torch.Tensor]],
        folder: str | Path,
        *,
        hidden_states: bool = True,
        dtype: torch.dtype | None = torch.float16,
    ) -> "TeacherOutputs":
        """Runs the teacher over all rows that are not stored yet.

        Args:
            teacher: A classifier of sequences or tokens, or an embedding model; left in evaluation mode, on its device.
            rows: Tokenised rows; a label is not looked at.
            collator: Pads a list of rows to a batch, on the right: padding on the left moves BERT's positions.
            folder: Directory for the files of all teachers and rows.
            hidden_states: Store the hidden states too: (layers + 1) x hidden size numbers for each token.
            dtype: What they are stored in; None: in the teacher's own precision.

        Raises:
            ValueError: The teacher predicts something else, or the batch is padded on the left, where what the teacher says
                depends on the other rows of a batch.
            OSError: The files cannot be written.
        """
        answer = _answer_of(teacher)
        if answer is None or "input_ids" not in rows.column_names:
            raise ValueError(
                f"`teacher` {type(teacher).__name__} cannot be stored: only classifiers of texts and of their tokens, and "
                "embedding models can. Give the trainer the teacher itself."
            )
        config, num_tokens = teacher.config, int(_lengths(rows).sum())
        dtype = teacher.dtype if dtype is None else dtype
        key = hashlib.sha256(f"{_digest_of(teacher)} {_digest_of_rows(rows)} {hidden_states} {dtype}".encode()).hexdigest()
        target = Path(folder) / key[:24]
        target.mkdir(parents=True, exist_ok=True)
        embedding = embedding_of(teacher)
        width = config.num_labels if embedding is None else config.hidden_size * len(embedding["modes"])
        shapes: dict[str, tuple[int, ...]] = {answer: (num_tokens if answer == _PER_TOKEN else len(rows), width)}
        if hidden_states:
            shapes["hidden"] = (num_tokens, config.num_hidden_layers + 1, config.hidden_size)
        kinds = {answer: torch.promote_types(teacher.dtype, torch.float32), "hidden": dtype}
        arrays = {name: _opened(target / f"{name}.npy", shape, kinds[name]) for name, shape in shapes.items()}
        _fill(arrays, target / "progress.json", teacher.eval(), rows, collator)
        return cls(target, rows)

    def numbered(self, rows: Any) -> Dataset:
        """Returns `rows` with the column that names each row.

        Raises:
            ValueError: They are not the rows that the outputs are of.
        """
        if not isinstance(rows, Dataset) or _digest_of_rows(rows) != self._rows:
            raise ValueError("`train_dataset` must hold the rows that the teacher's outputs were computed for, in that order.")
        return rows.add_column(ROW_COLUMN, list(range(len(rows))))

    def __call__(
        self, *, attention_mask: torch.Tensor | None = None, output_hidden_states: bool = False, **inputs: Any
    ) -> ModelOutput:
        """Looks up a batch.

        Args:
            attention_mask: Shape (batch, length), 1 for real tokens; None: all are.
            output_hidden_states: Whether hidden states are wanted.
            **inputs: `teacher_row`, shape (batch,), and `input_ids`, of which the shape is read; no others.

        Returns:
            `logits` (batch, labels), of a token classifier (batch, length, labels), of an embedding model
            `sentence_embedding` (batch, width); if wanted, `hidden_states`, one (batch, length, hidden) a layer, embeddings
            first.

        Raises:
            ValueError: Hidden states were not stored, or the batch is of other rows.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(inputs["input_ids"])
        index = inputs[ROW_COLUMN].tolist()
        if self._name == _PER_TOKEN:
            answer = {"logits": self._of_tokens(self._answers, index, attention_mask)}
        else:
            answer = {self._name: torch.from_numpy(self._answers[index]).to(attention_mask.device)}
        if not output_hidden_states:
            return ModelOutput(**answer)
        if self._hidden is None:
            raise ValueError("The teacher's hidden states are not stored: compute them with `hidden_states=True`.")
        states = self._of_tokens(self._hidden, index, attention_mask)  # (batch, length, layers + 1, hidden)
        return ModelOutput(**answer, hidden_states=states.unbind(dim=2))

    def _of_tokens(self, stored: np.ndarray, index: list[int], attention_mask: torch.Tensor) -> torch.Tensor:
        """Puts what is stored of the tokens of some rows, (tokens, ...), to their places in a batch, (batch, length, ...)."""
        if attention_mask.sum(dim=1).tolist() != self._lengths[index].tolist():
            raise ValueError("The batch has other lengths than the rows that the teacher's outputs were computed for.")
        parts = [stored[self._offsets[row] : self._offsets[row] + self._lengths[row]] for row in index]
        tokens = torch.from_numpy(np.concatenate(parts)).to(attention_mask.device)
        placed = tokens.new_zeros(*attention_mask.shape, *tokens.shape[1:])
        placed[attention_mask.bool()] = tokens
        return placed


def _answer_of(teacher: PreTrainedModel) -> str | None:
    """Name of the file for what a teacher says; None for one that cannot be stored."""
    if embedding_of(teacher) is not None:
        return EMBEDDING
    heads = {"SequenceClassification": "logits", "ImageClassification": "logits", "TokenClassification": _PER_TOKEN}
    return heads.get(task_head(teacher))


def _fill(arrays: dict[str, Any], progress: Path, teacher: PreTrainedModel, rows: Dataset, collator: Callable) -> None:
    """Writes the outputs of the rows that `progress` does not count; it counts only what is on the disk."""
    lengths = _lengths(rows)
    offsets = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    done = json.loads(progress.read_text(encoding="utf-8"))["rows"] if progress.exists() else 0
    names = [name for name in rows.column_names if name not in _NO_INPUTS]
    plain = rows.select_columns(names)
    for number, start in enumerate(range(done, len(order), _BATCH_SIZE), start=1):
        index = order[start : start + _BATCH_SIZE].tolist()
        batch = {name: value.to(teacher.device) for name, value in collator([plain[row] for row in index]).items()}
        mask = batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        if not mask[:, 0].all():
            raise ValueError("`collator` pads on the left: pad on the right, or give the trainer the teacher itself.")
        with torch.inference_mode():
            output = teacher(**batch, output_hidden_states="hidden" in arrays)
        places = np.concatenate([np.arange(offsets[row], offsets[row] + lengths[row]) for row in index])
        if _PER_TOKEN in arrays:
            arrays[_PER_TOKEN][places] = _numpy(output.logits[mask.bool()], arrays[_PER_TOKEN].dtype)
        elif EMBEDDING in arrays:
            arrays[EMBEDDING][index] = _numpy(vectors_of(teacher, output, mask), arrays[EMBEDDING].dtype)
        else:
            arrays["logits"][index] = _numpy(output.logits, arrays["logits"].dtype)
        if "hidden" in arrays:
            states = torch.stack(output.hidden_states, dim=2)[mask.bool()]
            arrays["hidden"][places] = _numpy(states, arrays["hidden"].dtype)
        if number % _BATCHES_PER_WRITE == 0 or start + _BATCH_SIZE >= len(order):
            for array in arrays.values():
                array.flush()
            with written_whole(progress) as partial:
                partial.write_text(json.dumps({"rows": min(start + _BATCH_SIZE, len(order))}), encoding="utf-8")


def _opened(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> np.memmap:
    """Opens an array for writing; of several processes that make it, one succeeds, and all write to that."""
    if not path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=shape).flush()
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    return np.lib.format.open_memmap(path, mode="r+")


def _numpy(values: torch.Tensor, kind: np.dtype) -> np.ndarray:
    return values.to(torch.promote_types(values.dtype, torch.float32)).cpu().numpy().astype(kind)


def _lengths(rows: Dataset) -> np.ndarray:
    """Real tokens of each row, which may be padded already."""
    if "attention_mask" in rows.column_names:
        return np.array([sum(mask) for mask in rows["attention_mask"]], dtype=np.int64)
    return np.array([len(ids) for ids in rows["input_ids"]], dtype=np.int64)


def _digest_of(teacher: PreTrainedModel) -> str:
    digest = hashlib.sha256(json.dumps(teacher.config.to_dict(), sort_keys=True, default=str).encode())
    for name, value in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of_rows(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for name in sorted(set(rows.column_names) - {*_NO_INPUTS}):
        digest.update(name.encode())
        for part in _parts(rows, name):
            digest.update(part)
    return digest.hexdigest()


def _parts(rows: Dataset, name: str) -> Iterator[bytes]:
    for values in rows[name]:
        yield len(values).to_bytes(8, "little")
        yield np.asarray(values, dtype=np.int64).tobytes()
