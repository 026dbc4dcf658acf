"""What one pass over calibration batches leaves behind: sums per head and neuron, and the statistics made of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from shrp_hf.files import written_whole
from shrp_hf.models.slicing import OutputMeans
from shrp_hf.plans.keep_plan import KeepPlan

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
        neurons: Importance of the FFN neurons.
        means: Mean output of each head and neuron, which a cut can leave behind.
    """

    importance: bool = False
    salience: bool = False
    entropy: bool = False
    signature_size: int | None = None
    neurons: bool = False
    means: bool = False

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
            neurons=self.neurons or other.neurons,
            means=self.means or other.means,
        )

    def covers(self, other: "StatsRequest") -> bool:
        """Whether a pass for this request also answers `other`."""
        return other.signature_size in (None, self.signature_size) and (self | other) == self

    @property
    def needs_attention_maps(self) -> bool:
        """Whether eager attention is needed."""
        return self.entropy or self.signature_size is not None

    @property
    def needs_neurons(self) -> bool:
        """Whether anything is measured of the neurons."""
        return self.neurons or self.means


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
            rows, B * B) and "signature_counts" (classes,); "neurons" (neurons of all layers,) and "neurons_counts" (1,);
            "head_means" (rows * head size,), "neuron_means" (neurons of all layers,) and "means_counts" (1,), in tokens.
        widths: Per layer the neurons that were measured; empty where none were.
        head_size: Width of one head; 0 where no means were measured.
    """

    request: StatsRequest
    scored: tuple[tuple[int, ...], ...]
    num_heads: int
    sums: dict[str, torch.Tensor]
    widths: tuple[int, ...] = ()
    head_size: int = 0

    @classmethod
    def empty(
        cls,
        request: StatsRequest,
        scored: Sequence[Sequence[int]],
        num_heads: int,
        num_classes: int = 0,
        widths: Sequence[int] = (),
        head_size: int = 0,
    ) -> Self:
        """Statistics of no sample.

        Args:
            request: What will be added up.
            scored: The heads of each layer that are scored.
            num_heads: Heads that a layer had before pruning.
            num_classes: Classes of the task, of which signatures are kept apart.
            widths: Neurons of each layer.
            head_size: Width of one head.
        """
        widths = tuple(widths) if request.needs_neurons else ()
        head_size = head_size if request.means else 0
        shapes = _shapes(request, sum(map(len, scored)), num_classes, sum(widths), head_size).items()
        sums = {name: torch.zeros(*shape, dtype=dtype) for name, (shape, dtype) in shapes}
        return cls(request, tuple(tuple(heads) for heads in scored), num_heads, sums, widths, head_size)

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

    def neuron_importance(self) -> tuple[torch.Tensor, ...]:
        """Importance of the neurons: mean over samples of |sum over tokens of activation x dL/d activation|.

        Returns:
            Per layer shape (neurons,), float64; empty where a layer has none.

        Raises:
            ValueError: This was not measured.
        """
        return (self._sum("neurons") / self._sum("neurons_counts")).split(self.widths)

    def output_means(self) -> OutputMeans:
        """What heads and neurons put out on average over the real tokens, for `prune_heads` and `masked_heads`.

        Raises:
            ValueError: This was not measured.
        """
        count = self._sum("means_counts")
        heads = (self._sum("head_means") / count).view(-1, self.head_size).split([len(heads) for heads in self.scored])
        neurons = (self._sum("neuron_means") / count).split(self.widths)
        return OutputMeans(*(tuple(mean if len(mean) else None for mean in means) for means in (heads, neurons)))

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
        shape: dict[str, Any] = {"request": asdict(self.request), "scored": self.scored, "num_heads": self.num_heads}
        if self.request.needs_neurons:
            shape |= {"widths": self.widths, "head_size": self.head_size}
        else:  # as format 1, which earlier versions read
            del shape["request"]["neurons"], shape["request"]["means"]
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
            request, scored = StatsRequest(**shape["request"]), tuple(map(tuple, shape["scored"]))
            widths, head_size = tuple(shape.get("widths", ())), shape.get("head_size", 0)
            stats = cls(request, scored, shape["num_heads"], sums, widths, head_size)
            classes = len(sums.get("signature_counts", ()))
            expected = _shapes(stats.request, len(stats.rows), classes, sum(widths), head_size)
            KeepPlan(scored, stats.num_heads, *([((),) * len(scored), widths] if widths else []))  # as of a plan
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`{path}` holds no head statistics ({error}): delete it, or name another.") from error
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sums.items()} != expected:
            raise ValueError(f"`{path}` holds sums of other shapes than its request has: delete it, or name another.")
        return stats, {name: text for name, text in texts.items() if name != "head_stats"}


def _shapes(
    request: StatsRequest, rows: int, num_classes: int, num_neurons: int, head_size: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
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
    if request.neurons:
        shapes |= {"neurons": ((num_neurons,), torch.float64), "neurons_counts": ((1,), torch.float64)}
    if request.means:
        shapes |= {"head_means": ((rows * head_size,), torch.float64), "neuron_means": ((num_neurons,), torch.float64)}
        shapes["means_counts"] = (1,), torch.float64
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
