"""What a selector decides: the heads (or experts), and the FFN neurons, that each layer keeps."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeGuard, cast

from shrp_hf.files import written_whole

_FIELDS = {"kept", "num_heads"}
_NEURON_FIELDS = {"neurons", "num_neurons"}


@dataclass(frozen=True)
class KeepPlan:
    """The heads that stay, named by their index in the unpruned model, and the neurons that stay, by theirs in this one.

    A model knows which of its heads are left, but of its neurons only how many: so these are counted among those that the
    model has when the plan is made, and a plan is refused by a model of other widths.

    Args:
        kept: One tuple of original indices per layer: heads of an ordinary layer, experts of an expert layer. Stored
            sorted. An empty tuple is a layer that loses all its heads.
        num_heads: Heads per layer of the unpruned model.
        neurons: One tuple of indices per layer, among the neurons that its FFN has now; an empty tuple is a layer that
            loses its FFN, and the entry of an expert layer. None: all stay.
        num_neurons: Neurons that each layer has now, one number for all or one per layer. Stored as one per layer.

    Raises:
        ValueError: An index is out of range or named twice, there is no layer, or of `neurons` and `num_neurons` one is
            missing.

    Example:
        >>> KeepPlan(kept=((0, 2), (1,)), num_heads=4).num_kept
        3
        >>> KeepPlan(kept=((0, 2), (1,)), num_heads=4, neurons=((0, 5), ()), num_neurons=8).num_kept_neurons
        2
    """

    kept: tuple[tuple[int, ...], ...]
    num_heads: int
    neurons: tuple[tuple[int, ...], ...] | None = None
    num_neurons: tuple[int, ...] | int | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.num_heads) or self.num_heads < 1:
            raise ValueError(f"`num_heads` must be a positive whole number, got {self.num_heads!r}.")
        if not isinstance(self.kept, Sequence) or isinstance(self.kept, str) or not self.kept:
            raise ValueError(f"`kept` must hold one tuple of head indices per layer, got {self.kept!r}.")
        kept = tuple(_checked("kept", layer, heads, self.num_heads) for layer, heads in enumerate(self.kept))
        object.__setattr__(self, "kept", kept)
        if self.neurons is None and self.num_neurons is None:
            return
        if self.neurons is None or self.num_neurons is None:
            raise ValueError(
                f"`neurons` and `num_neurons` go together: give which stay, and how many each layer has now, got "
                f"neurons={self.neurons!r} and num_neurons={self.num_neurons!r}."
            )
        counts = self._checked_counts()
        if not isinstance(self.neurons, Sequence) or isinstance(self.neurons, str) or len(self.neurons) != len(kept):
            raise ValueError(f"`neurons` must hold one tuple of indices for each of {len(kept)} layers, got {self.neurons!r}.")
        found = zip(self.neurons, counts, strict=True)
        neurons = tuple(_checked("neurons", layer, kept, count) for layer, (kept, count) in enumerate(found))
        object.__setattr__(self, "neurons", neurons)
        object.__setattr__(self, "num_neurons", counts)

    def _checked_counts(self) -> tuple[int, ...]:
        given: Any = self.num_neurons
        counts = (given,) * len(self.kept) if _is_count(given) else given
        is_listed = isinstance(counts, Sequence) and not isinstance(counts, str) and len(counts) == len(self.kept)
        if not is_listed or any(not _is_count(count) or count < 0 for count in counts):
            raise ValueError(
                f"`num_neurons` must be a whole number from 0, or one for each of {len(self.kept)} layers, got "
                f"{self.num_neurons!r}."
            )
        return tuple(counts)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.kept)

    @property
    def num_kept(self) -> int:
        """Number of heads that stay, over all layers."""
        return sum(len(heads) for heads in self.kept)

    @property
    def num_kept_neurons(self) -> int | None:
        """Number of neurons that stay, over all layers; None where the plan is about heads only."""
        return None if self.neurons is None else sum(len(kept) for kept in self.neurons)

    def with_neurons(self, neurons: Sequence[Sequence[int]] | None, num_neurons: Sequence[int] | int | None) -> Self:
        """Returns a plan that keeps the heads of this one and these neurons.

        Args:
            neurons: As in `KeepPlan`.
            num_neurons: As in `KeepPlan`.
        """
        return type(self)(self.kept, self.num_heads, neurons, num_neurons)  # type: ignore[arg-type]  # checked there

    def then(self, other: "KeepPlan") -> Self:
        """Returns the plan that cuts at once what this one and then `other`, a plan for what this one leaves, cut.

        Args:
            other: The second plan.

        Raises:
            ValueError: It is for another model than this plan leaves.
        """
        if (other.num_layers, other.num_heads) != (self.num_layers, self.num_heads):
            raise ValueError(
                f"`other` is for {other.num_layers} layers of {other.num_heads} heads, but this plan is for {self.num_layers} "
                f"layers of {self.num_heads}."
            )
        for layer, (then, now) in enumerate(zip(other.kept, self.kept, strict=True)):
            if not set(then) <= set(now):
                raise ValueError(f"`other` keeps heads {list(then)} of layer {layer}, but this plan leaves {list(now)}.")
        if other.neurons is None:
            return replace(self, kept=other.kept)
        if self.neurons is None:
            return replace(self, kept=other.kept, neurons=other.neurons, num_neurons=other.num_neurons)
        composed = []
        counts = cast(tuple[int, ...], other.num_neurons)
        for layer, (then, now) in enumerate(zip(other.neurons, self.neurons, strict=True)):
            if then and counts[layer] != len(now):
                raise ValueError(f"`other` counts {counts[layer]} neurons in layer {layer}, but this plan leaves {len(now)}.")
            composed.append(tuple(now[index] for index in then))
        return replace(self, kept=other.kept, neurons=tuple(composed))

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
        fields: dict[str, Any] = {"kept": self.kept, "num_heads": self.num_heads}
        if self.neurons is not None:  # without them it is a file of format 1, which earlier versions read
            fields |= {"neurons": self.neurons, "num_neurons": self.num_neurons}
        text = json.dumps(fields)
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
        if not isinstance(fields, dict) or set(fields) not in (_FIELDS, _FIELDS | _NEURON_FIELDS):
            raise ValueError('Not a keep plan: expected the fields "kept" and "num_heads", as `KeepPlan.to_json` writes.')
        return cls(**fields)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(name: str, layer: int, indices: Iterable[int], count: int) -> tuple[int, ...]:
    """Returns the heads ("kept") or neurons of a layer, sorted."""
    kind = "head" if name == "kept" else "neuron"
    if isinstance(indices, str) or not isinstance(indices, Iterable):
        raise ValueError(f"`{name}[{layer}]` must be a tuple of {kind} indices, got {indices!r}.")
    indices = tuple(indices)
    for index in indices:
        if not _is_count(index) or not 0 <= index < count:
            raise ValueError(f"`{name}[{layer}]` names {kind} {index!r}, but {kind}s are whole numbers from 0 to {count - 1}.")
    if len(set(indices)) != len(indices):
        repeated = next(index for index in indices if indices.count(index) > 1)
        shown = indices if len(indices) <= 32 else f"{repeated}, among {len(indices)}"
        raise ValueError(f"`{name}[{layer}]` names a {kind} twice: {shown}.")
    return tuple(sorted(indices))
