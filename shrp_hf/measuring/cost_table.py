"""What a layer costs by its heads and neurons: parameters, FLOPs, or seconds that were measured."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from shrp_hf.files import written_whole

_VERSION = 1


@dataclass(frozen=True)
class CostTable:
    """Cost of a model, part by part.

    Attention and FFN of a layer run one after the other, so an ordinary layer of h heads and n neurons costs
    `layer + attention(h) + ffn(n)`. Between the counts that are listed it is interpolated linearly.

    Args:
        unit: "parameters", "FLOPs" or "seconds".
        fixed: Embeddings, pooler, task head, and whatever else no plan changes.
        layer: An ordinary layer without heads and neurons: residuals and LayerNorms.
        heads: Head counts, ascending, from 0 to those of an unpruned layer.
        attention: What so many heads add, one number each; 0 for 0.
        neurons: FFN widths, ascending, from 0 to the unpruned one.
        ffn: What so many neurons add; 0 for 0.
        experts: Number of experts -> cost of a whole expert layer of so many (SHRP, static); None: they are in `fixed`.
        about: Where, with what and for which model it was measured.

    Raises:
        ValueError: The lists do not fit each other, or a number is negative or not finite.
    """

    unit: str
    fixed: float
    layer: float
    heads: tuple[int, ...]
    attention: tuple[float, ...]
    neurons: tuple[int, ...]
    ffn: tuple[float, ...]
    experts: Mapping[int, float] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for counts, costs in (("heads", "attention"), ("neurons", "ffn")):
            listed, priced = getattr(self, counts), getattr(self, costs)
            if len(listed) != len(priced) or listed[:1] != (0,) or sorted(set(listed)) != list(listed):
                raise ValueError(f"`{counts}` must ascend from 0, a number in `{costs}` for each, got {listed} and {priced}.")
        numbers = [self.fixed, self.layer, *self.attention, *self.ffn, *(self.experts or {}).values()]
        if not np.isfinite(numbers).all() or min(numbers) < 0:
            raise ValueError(f"`{self.unit}` of a part must be finite and at least 0, got {numbers}.")

    def attention_of(self, heads: int) -> float:
        """Returns what the attention of a layer costs with so many heads.

        Raises:
            ValueError: That is more than an unpruned layer has.
        """
        return _interpolated("heads", heads, self.heads, self.attention)

    def ffn_of(self, neurons: int) -> float:
        """Returns what the FFN of a layer costs with so many neurons.

        Raises:
            ValueError: That is more than an unpruned layer has.
        """
        return _interpolated("neurons", neurons, self.neurons, self.ffn)

    def experts_of(self, experts: int) -> float:
        """Returns what an expert layer of so many experts costs, beyond what is in `fixed`.

        Raises:
            ValueError: The table holds none of so many.
        """
        if self.experts is None:
            return 0.0
        if experts not in self.experts:
            raise ValueError(
                f"The table holds no expert layer of {experts} experts, but of {sorted(self.experts)}: measure it anew for "
                "this model."
            )
        return self.experts[experts]

    def total(self, layers: Iterable[tuple[int, int]], experts: Iterable[int] = ()) -> float:
        """Returns the cost of a whole model.

        Args:
            layers: (heads, neurons) of each ordinary layer.
            experts: Number of experts of each expert layer.
        """
        ordinary = sum(self.layer + self.attention_of(heads) + self.ffn_of(neurons) for heads, neurons in layers)
        return self.fixed + ordinary + sum(map(self.experts_of, experts))

    def to_json(self, path: str | Path) -> None:
        """Writes the table to a file, to a temporary name, then moved.

        Args:
            path: The file.
        """
        with written_whole(path) as partial:
            partial.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads a table as it is, also one that another machine measured.

        Args:
            path: A file that `to_json` wrote.

        Raises:
            ValueError: The file holds no such table.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if fields.pop("version") != _VERSION:
                raise ValueError("another version wrote it")
            if fields["experts"] is not None:
                fields["experts"] = {int(count): cost for count, cost in fields["experts"].items()}
            lists = {name: tuple(fields[name]) for name in ("heads", "attention", "neurons", "ffn")}
            return cls(**{**fields, **lists})
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`{path}` holds no table of costs ({error}): delete it, or name another.") from error


def _interpolated(what: str, count: int, counts: tuple[int, ...], costs: tuple[float, ...]) -> float:
    if not 0 <= count <= counts[-1]:
        raise ValueError(f"The table prices 0 to {counts[-1]} {what}, got {count}: it is of another model.")
    return float(np.interp(count, counts, costs))
