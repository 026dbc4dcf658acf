"""What a selector decides: the heads (or experts) that each layer keeps."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shrp_hf.files import written_whole

_FIELDS = {"kept", "num_heads"}


@dataclass(frozen=True)
class KeepPlan:
    """The heads that stay, named by their index in the unpruned model.

    Args:
        kept: One tuple of original indices per layer: heads of an ordinary layer, experts of an expert layer. Stored
            sorted. An empty tuple is a layer that loses all its heads.
        num_heads: Heads per layer of the unpruned model.

    Raises:
        ValueError: An index is out of range or named twice, or there is no layer.

    Example:
        >>> KeepPlan(kept=((0, 2), (1,)), num_heads=4).num_kept
        3
    """

    kept: tuple[tuple[int, ...], ...]
    num_heads: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_heads, int) or isinstance(self.num_heads, bool) or self.num_heads < 1:
            raise ValueError(f"`num_heads` must be a positive whole number, got {self.num_heads!r}.")
        if not isinstance(self.kept, Sequence) or isinstance(self.kept, str) or not self.kept:
            raise ValueError(f"`kept` must hold one tuple of head indices per layer, got {self.kept!r}.")
        object.__setattr__(self, "kept", tuple(self._checked(layer, heads) for layer, heads in enumerate(self.kept)))

    def _checked(self, layer: int, heads: Iterable[int]) -> tuple[int, ...]:
        if isinstance(heads, str) or not isinstance(heads, Iterable):
            raise ValueError(f"`kept[{layer}]` must be a tuple of head indices, got {heads!r}.")
        heads = tuple(heads)
        for head in heads:
            if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < self.num_heads:
                raise ValueError(
                    f"`kept[{layer}]` names head {head!r}, but heads are whole numbers from 0 to {self.num_heads - 1}."
                )
        if len(set(heads)) != len(heads):
            raise ValueError(f"`kept[{layer}]` names a head twice: {heads}.")
        return tuple(sorted(heads))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.kept)

    @property
    def num_kept(self) -> int:
        """Number of heads that stay, over all layers."""
        return sum(len(heads) for heads in self.kept)

    @classmethod
    def full(cls, num_layers: int, num_heads: int) -> Self:
        """The plan that keeps everything.

        Args:
            num_layers: Layers of the model.
            num_heads: Heads that each of them has.
        """
        return cls(kept=(tuple(range(num_heads)),) * num_layers, num_heads=num_heads)

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns the plan as JSON text.

        Args:
            path: Also write it there, to a temporary name, then moved; None writes nothing.
        """
        text = json.dumps({"kept": [list(heads) for heads in self.kept], "num_heads": self.num_heads})
        if path is not None:
            with written_whole(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Reads a plan from JSON text or, given a `Path` or the name of a ``.json`` file, from that file.

        Args:
            source: The text, or where it is.

        Raises:
            ValueError: The text is not a plan.
        """
        is_file = isinstance(source, Path) or source.endswith(".json")
        try:
            fields = json.loads(Path(source).read_text(encoding="utf-8") if is_file else str(source))
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
            raise ValueError(f"Not a keep plan: {error}. A plan is JSON as `KeepPlan.to_json` writes it.") from error
        if not isinstance(fields, dict) or set(fields) != _FIELDS:
            raise ValueError('Not a keep plan: expected the fields "kept" and "num_heads", as `KeepPlan.to_json` writes.')
        return cls(kept=fields["kept"], num_heads=fields["num_heads"])
