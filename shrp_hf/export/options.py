"""What an exported file is to be, and the rows that it is judged on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shrp_hf.defaults import MIN_AGREEMENT
from shrp_hf.export.graph import OPSET, OPSETS

Text = str | tuple[str, ...]
PRECISIONS = {"onnx": ("float32", "int8"), "openvino": ("float32", "float16", "int8", "int8-static")}
"""Formats, and what each holds: "int8" has int8 weights and scales activations as they come, "int8-static" by rows."""
GRAPHS = ("fastest", "fused", "portable")
EMBEDDINGS = ("float32", "float16", "int8")
MOST_LOST = 0.003  # of a metric from 0 to 1


@dataclass(frozen=True)
class ExportOptions:
    """What kind of file is written.

    Args:
        format: "onnx", or "openvino" for OpenVINO's own (`model.xml` and `model.bin`).
        precision: "float32"; "int8": int8 weights, activations quantised as they come; of OpenVINO also "float16" (weights)
            and "int8-static": activations quantised too, by scales that NNCF finds on rows of the task.
        graph: Of an ONNX file: "fused" (operators that only ONNX Runtime has), "portable" (standard operators alone, which
            OpenVINO reads too), or "fastest": whichever answers sooner in ONNX Runtime on this machine.
        opset: Version of the standard operators of a portable file, 18 to 23; None takes 20.
        embeddings: How the word embeddings are kept: "float32", "float16", or "int8" with a scale for each row; they are
            turned back row by row as they are read. None: float32 in an ONNX file, else the file's precision.
        min_agreement: Least share of predictions that the file must share with PyTorch where it rounds, 0 to 1.
        force: Write a file although it agrees too little, or loses quality on the held-out rows.

    Raises:
        ValueError: A value is unknown or out of range, or two do not go together.
    """

    format: str = "onnx"
    precision: str = "float32"
    graph: str = "fastest"
    opset: int | None = None
    embeddings: str | None = None
    min_agreement: float = MIN_AGREEMENT
    force: bool = False

    def __post_init__(self) -> None:
        _check_choice("format", self.format, tuple(PRECISIONS))
        if self.precision not in PRECISIONS[self.format]:
            others = [name for name in PRECISIONS if self.precision in PRECISIONS[name]]
            hint = f"; {self.precision} is for `format={others[0]!r}`" if others else ""
            raise ValueError(
                f"`precision` must be one of {', '.join(PRECISIONS[self.format])} in the format {self.format}, got "
                f"{self.precision!r}{hint}."
            )
        _check_choice("graph", self.graph, GRAPHS)
        if self.embeddings is not None:
            _check_choice("embeddings", self.embeddings, EMBEDDINGS)
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"`min_agreement` must be a share from 0 to 1, got {self.min_agreement}.")
        if self.format == "openvino":
            self._check_openvino()
        if self.opset is None:
            return
        if self.graph != "portable":
            raise ValueError(f"`opset` {self.opset} is of a portable ONNX file: give `graph='portable'`, or leave it out.")
        if self.opset not in OPSETS:
            raise ValueError(
                f"`opset` must be {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}: torch writes no other that was tested."
            )

    def _check_openvino(self) -> None:
        if self.graph == "fused" or self.opset is not None:
            raise ValueError(
                "`graph` and `opset` are of ONNX files: OpenVINO's are made from the portable graph. Leave them out."
            )
        if self.embeddings is not None and self.is_int8 and self.embeddings != "int8":
            raise ValueError(
                f"`embeddings` {self.embeddings!r} does not go with `precision={self.precision!r}`: NNCF turns them into int8."
            )

    @property
    def is_int8(self) -> bool:
        """Whether products are computed in int8."""
        return self.precision.startswith("int8")

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded beyond float32."""
        return self.precision == "float32" and self.embeddings in (None, "float32")

    @property
    def portable_opset(self) -> int:
        """The version of the standard operators."""
        return self.opset or OPSET


@dataclass(frozen=True)
class QualityLoss:
    """What a file loses on held-out rows, on which the model itself is judged too.

    Args:
        metric: Name of the metric, higher is better.
        model: The model's.
        file: The file's.
        interval: 95% interval of what is lost, paired over the rows.
        rows: How many there were.
    """

    metric: str
    model: float
    file: float
    interval: tuple[float, float]
    rows: int

    @property
    def is_real(self) -> bool:
        """Whether more than 0.3 points are lost, and not by the choice of rows."""
        return self.model - self.file > MOST_LOST and self.interval[0] > 0


Judge = Callable[[np.ndarray, np.ndarray], QualityLoss]
"""Compares logits of the model and of the file, (rows, labels) each, over the rows of `ExportRows.texts`."""


@dataclass(frozen=True)
class ExportRows:
    """What a file is compared, judged and calibrated on.

    Args:
        texts: Sentences, or pairs of them, to compare on; None takes two dozen that are built in.
        judge: Judges quality on the texts; None where there are no labels.
        calibration: Sentences, or pairs, that static int8 finds its scales on: not those of `texts`, lest it flatters itself.

    Raises:
        ValueError: A list is empty, or mixes sentences and pairs.
    """

    texts: Sequence[Text] | None = None
    judge: Judge | None = None
    calibration: Sequence[Text] | None = None

    def __post_init__(self) -> None:
        for name in ("texts", "calibration"):
            if (texts := getattr(self, name)) is not None:
                object.__setattr__(self, name, _checked(name, texts))


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")


def _checked(name: str, texts: Sequence[Text]) -> list[Text]:
    if isinstance(texts, str | Path) or not len(texts):
        raise ValueError(f"`{name}` must be a list of sentences, at least one, got {texts!r}.")
    found: list[Text] = [text if isinstance(text, str) else tuple(text) for text in texts]
    kinds = {1 if isinstance(text, str) else len(text) for text in found}
    if kinds not in ({1}, {2}):
        raise ValueError(f"`{name}` must all be sentences, or all pairs of sentences, got items of {sorted(kinds)} parts.")
    return found
