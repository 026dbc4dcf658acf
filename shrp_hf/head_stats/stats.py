"""What one pass over calibration batches leaves behind: sums per head, and the statistics made of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from shrp_hf.files import written_whole
from shrp_hf.plan import KeepPlan

GRANULARITIES = ("sample", "token", "batch")
FIXED_POINT = 2**20
MAX_CLASS_SAMPLES = 2**23


@dataclass(frozen=True)
class StatsRequest:
    """What a pass is to measure; requests of several selectors are joined with ``|``, so one pass serves them all.

    Args:
        importance: Gradients of the loss by head masks over all batches.
        salience: The same over the first quarter of the batches only (CAHP).
        entropy: Attention entropy.
        signature_size: Side B of the resized attention maps (CAHP), None for none.
    """

    importance: bool = False
    salience: bool = False
    entropy: bool = False
    signature_size: int | None = None

    def __post_init__(self) -> None:
        if self.signature_size is not None and (not isinstance(self.signature_size, int) or self.signature_size < 2):
            raise ValueError(f"`signature_size` must be a whole number from 2, got {self.signature_size!r}.")

    def __or__(self, other: "StatsRequest") -> "StatsRequest":
        sizes = {self.signature_size, other.signature_size} - {None}
        if len(sizes) > 1:
            raise ValueError(f"One pass makes signatures of one `signature_size`, got {sorted(sizes)}: score twice.")
        return StatsRequest(
            importance=self.importance or other.importance,
            salience=self.salience or other.salience,
            entropy=self.entropy or other.entropy,
            signature_size=sizes.pop() if sizes else None,
        )

    def covers(self, other: "StatsRequest") -> bool:
        """Whether a pass for this request also answers `other`."""
        return other.signature_size in (None, self.signature_size) and (self | other) == self

    @property
    def needs_attention_maps(self) -> bool:
        """Whether eager attention is needed."""
        return self.entropy or self.signature_size is not None


@dataclass(frozen=True)
class HeadStats:
    """Sums over the samples of one pass, and the scores made of them.

    All are sums, so those of several processes, or of a pass that was interrupted, add up. Signatures are summed in
    fixed point (steps of 2^-20; the paper's variance floor of 1e-6 is a deviation of 2^-10): integer sums are exact
    whatever the order, and t-SNE, which is chaotic, sees the same bits on one process and on many.

    Args:
        request: What was measured.
        scored: Per layer the original indices of the heads that were scored. A *row* is one of them, in this order.
        num_heads: Heads per layer of the unpruned model.
        sums: Name to tensor. "importance" (3, rows) and "importance_counts" (3,): by granularity; the same for
            "salience"; "entropy" (rows,) and "entropy_counts" (1,); "signature" and "signature_squares" (classes,
            rows, B * B) and "signature_counts" (classes,).
    """

    request: StatsRequest
    scored: tuple[tuple[int, ...], ...]
    num_heads: int
    sums: dict[str, torch.Tensor]

    @classmethod
    def empty(cls, request: StatsRequest, scored: Sequence[Sequence[int]], num_heads: int, num_classes: int = 0) -> Self:
        """Statistics of no sample.

        Args:
            request: What will be added up.
            scored: The heads of each layer that are scored.
            num_heads: Heads that a layer had before pruning.
            num_classes: Classes of the task, of which signatures are kept apart.
        """
        shapes = _shapes(request, sum(map(len, scored)), num_classes).items()
        sums = {name: torch.zeros(*shape, dtype=dtype) for name, (shape, dtype) in shapes}
        return cls(request, tuple(tuple(heads) for heads in scored), num_heads, sums)

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """(layer, original head index) of every row."""
        return tuple((layer, head) for layer, heads in enumerate(self.scored) for head in heads)

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """Spreads values (rows,) over (layers, heads); NaN where no head was scored."""
        grid = torch.full((len(self.scored), self.num_heads), torch.nan, dtype=torch.float64)
        layers, heads = zip(*self.rows, strict=True)
        grid[list(layers), list(heads)] = values.to(torch.float64)
        return grid

    def importance(self, granularity: str = "sample", *, first_quarter: bool = False) -> torch.Tensor:
        """Head importance E|dL/dm| (HIS, arXiv 2510.13832), shape (layers, heads).

        Args:
            granularity: What the absolute value is taken over: the gradient of a "sample" (the paper), of a "token"
                (the code of Michel et al. 2019) or of a whole "batch" (the code of CAHP; depends on the batch size).
                "token" is the mean over real tokens in every layer. Michel's code divides by the batch size, in the last
                layer by the samples: its raw scores rank heads of different layers otherwise, its default, normalised in
                each layer (`HisSelector.per_layer_normalisation`), ranks them alike.
            first_quarter: Over the first quarter of the batches only.

        Raises:
            ValueError: Unknown granularity, or this was not measured.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
        name, index = "salience" if first_quarter else "importance", GRANULARITIES.index(granularity)
        return self.grid(self._sum(name)[index] / self._sum(f"{name}_counts")[index])

    def entropy(self) -> torch.Tensor:
        """Attention entropy AE (HIES, arXiv 2510.13832), 0 to 1, mean over samples, shape (layers, heads).

        Raises:
            ValueError: This was not measured.
        """
        return self.grid(self._sum("entropy") / self._sum("entropy_counts"))

    def class_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (n - 1) of the signatures per class that occurs, each (classes, rows, B * B), float64.

        Raises:
            ValueError: Signatures were not measured, fewer than two classes occur, or one has a single sample.
        """
        counts = self._sum("signature_counts")
        found = counts.nonzero().flatten()
        if len(found) < 2:
            raise ValueError(
                f"The calibration data holds samples of class {found.tolist()} only, but classes are compared with "
                "each other: give batches with at least two classes."
            )
        if (counts[found] < 2).any():
            raise ValueError(
                f"The calibration data holds one sample of class {found[counts[found] < 2].tolist()}, but a variance "
                "needs two: give more batches."
            )
        n = counts[found].to(torch.float64)[:, None, None]
        mean = self._sum("signature")[found].to(torch.float64) / n
        squares = self._sum("signature_squares")[found].to(torch.float64)
        variance = (squares - n * mean**2) / (n - 1) / FIXED_POINT**2
        return mean / FIXED_POINT, variance.clamp_min(0)

    def _sum(self, name: str) -> torch.Tensor:
        if name not in self.sums:
            what = name.split("_")[0]
            raise ValueError(f"`{what}` was not measured in this pass: ask for it in the `StatsRequest`.")
        return self.sums[name]

    def save(self, path: str | Path, extra: Mapping[str, str] | None = None) -> None:
        """Writes everything to a safetensors file, to a temporary name, then moved.

        Args:
            path: The file.
            extra: Texts to keep in it, by name; `load_with_texts` returns them.
        """
        shape = {"request": asdict(self.request), "scored": self.scored, "num_heads": self.num_heads}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.sums.items()}
        texts = {"head_stats": json.dumps(shape), **(extra or {})}
        with written_whole(path) as partial:
            # Not `save_file`, which would write under a name of its own that a kill leaves behind.
            partial.write_bytes(save(tensors, metadata=texts | {"sha256": _checksum(tensors, texts)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: The file holds something else, or is damaged.
        """
        return cls.load_with_texts(path)[0]

    @classmethod
    def load_with_texts(cls, path: str | Path) -> tuple[Self, dict[str, str]]:
        """Reads what `save` wrote, and the texts beside it.

        Args:
            path: The file.

        Raises:
            ValueError: As in `load`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                texts = dict(file.metadata() or {})
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            checksum, described = texts.pop("sha256"), texts["head_stats"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"`{path}` holds no head statistics ({error}): delete it, or name another.") from error
        if _checksum(sums, texts) != checksum:  # one flipped bit would choose other heads, and nobody would know
            raise ValueError(f"`{path}` is damaged, its checksum is another: delete it, or name another.")
        try:
            shape = json.loads(described)
            stats = cls(StatsRequest(**shape["request"]), tuple(map(tuple, shape["scored"])), shape["num_heads"], sums)
            expected = _shapes(stats.request, len(stats.rows), len(sums.get("signature_counts", ())))
            KeepPlan(stats.scored, stats.num_heads)  # as of a plan: indices of heads that there are
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`{path}` holds no head statistics ({error}): delete it, or name another.") from error
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sums.items()} != expected:
            raise ValueError(f"`{path}` holds sums of other shapes than its request has: delete it, or name another.")
        return stats, {name: text for name, text in texts.items() if name != "head_stats"}


def _shapes(request: StatsRequest, rows: int, num_classes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and type of every sum; see `HeadStats`."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in ("importance", "salience"):
        if getattr(request, name):
            shapes[name] = (len(GRANULARITIES), rows), torch.float64
            shapes[f"{name}_counts"] = (len(GRANULARITIES),), torch.float64
    if request.entropy:
        shapes |= {"entropy": ((rows,), torch.float64), "entropy_counts": ((1,), torch.float64)}
    if request.signature_size:
        signature = (num_classes, rows, request.signature_size**2), torch.int64
        shapes |= {"signature": signature, "signature_squares": signature, "signature_counts": ((num_classes,), torch.int64)}
    return shapes


def hash_tensor(digest: "hashlib._Hash", name: str, tensor: torch.Tensor) -> None:
    """Adds name, type, shape and values of a tensor to a hash."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checksum(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()
