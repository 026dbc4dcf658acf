"""A pass that survives interruption: its sums in a file, with a fingerprint of the model and the data."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shrp_hf.scoring.stats import HeadStats, hash_tensor

# What a config says about its file rather than about the model.
_VOLATILE = ("_name_or_path", "dtype", "transformers_version", "architectures", "problem_type")


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hashes the class, the config and every weight of a model."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in _VOLATILE}
    digest = hashlib.sha256(f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()


class Progress:
    """The file behind a pass: what was summed over the first batches, so that only the others are run.

    Args:
        path: The file, or None for a pass that leaves none.
        model: The model, for its fingerprint.
        empty: Statistics of no batch, for what is measured.
        salience_batches: Batches of the first quarter.

    Raises:
        ValueError: The file belongs to another model or to another request.
    """

    def __init__(self, path: str | Path | None, model: PreTrainedModel, empty: HeadStats, salience_batches: int) -> None:
        self.path = None if path is None else Path(path)
        self.stats, self.num_done, self._data_seen = empty, 0, ""
        if self.path is None:
            return
        self._data = hashlib.sha256()
        self._identity = {"model": model_fingerprint(model), "salience_batches": str(salience_batches)}
        if not self.path.exists():
            return
        self.stats, extra = HeadStats.load_with_texts(self.path)
        if self.stats.request != empty.request or extra.get("salience_batches") != str(salience_batches):
            raise self._refusal("was made for other measurements or another number of batches")
        found = (self.stats.scored, self.stats.widths, self.stats.head_size)
        if extra.get("model") != self._identity["model"] or found != (empty.scored, empty.widths, empty.head_size):
            raise self._refusal("belongs to another model")
        self.num_done, self._data_seen = int(extra["num_done"]), extra["data"]

    def is_done(self, index: int, batch: Mapping[str, torch.Tensor]) -> bool:
        """Whether batch `index` is in the sums already.

        Raises:
            ValueError: The batches are not those that the file was made with.
        """
        if self.path is None:
            return False
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                hash_tensor(self._data, name, value)
        if index + 1 == self.num_done and self._data.hexdigest() != self._data_seen:
            raise self._refusal("was made with other batches (shuffled, perhaps)")
        return index < self.num_done

    def save(self, num_batches: int) -> None:
        """Writes the sums over the first `num_batches` batches.

        Raises:
            ValueError: The file holds more batches than were given.
        """
        if self.path is None or num_batches == self.num_done:
            return
        if num_batches < self.num_done:
            raise self._refusal(f"covers {self.num_done} batches, but only {num_batches} were given")
        self.stats.save(self.path, self._identity | {"num_done": str(num_batches), "data": self._data.hexdigest()})
        self.num_done = num_batches

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"`cache` {str(self.path)!r} {reason}. Delete the file, or name another.")
