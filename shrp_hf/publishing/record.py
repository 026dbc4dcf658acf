"""What really ran: the record that lies beside a model, and from which its card is written."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig, PreTrainedModel

from shrp_hf.card_parts import auto_class_of, license_of
from shrp_hf.defaults import CALIBRATION_SAMPLES, SERVED_SHAPE
from shrp_hf.measuring import ModelReport, ParameterCount, accuracy_interval
from shrp_hf.measuring.environment import command_line, environment
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.publishing.report import write_text
from shrp_hf.tasks.task import Task
from shrp_hf.training.recipes import Recipe

RECORD_NAME = "shrp_record.json"
RECORD_VERSION = 1
_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class _Checked:
    """A frozen dataclass whose fields have the types that they declare."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            try:
                type_validator(entry.name, getattr(self, entry.name), entry.type)
            except TypeError as error:
                raise ValueError(f"`{type(self).__name__}.{entry.name}` has the wrong type: {error}") from error


@dataclass(frozen=True)
class Score(_Checked):
    """One metric on the reported rows.

    Args:
        metric: Its name.
        value: Its value, accuracy from 0 to 1; None for a correlation that is undefined.
        total: Rows that it was computed over.
        correct: Correct predictions, for an accuracy.
        interval: 95% interval, (low, high); None where none was computed.

    Raises:
        ValueError: The count contradicts the value, or the interval does not hold it.
    """

    metric: str
    value: float | None
    total: int
    correct: int | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correct is not None and (self.total < 1 or abs(self.correct / self.total - self.value) > 1e-6):
            raise ValueError(f"`{self.metric}={self.value}` is not {self.correct} of {self.total}.")
        if self.interval is not None and not self.interval[0] <= self.value <= self.interval[1]:
            raise ValueError(f"`interval` of {self.metric} must hold its value {self.value}, got {self.interval}.")

    @classmethod
    def of(cls, metric: str, value: float, total: int) -> Self:
        """Adds what follows from the number of rows: the Wilson interval of an accuracy, Fisher's of a correlation.

        Spearman's has the variance of Bonett and Wright (2000). Other metrics get no interval.
        """
        if metric == "accuracy":
            correct = round(value * total)
            return cls(metric, float(value), total, correct, accuracy_interval(correct, total))
        if math.isnan(value):
            return cls(metric, None, total)
        if metric not in ("pearson", "spearmanr") or total <= 3 or abs(value) >= 1:
            return cls(metric, float(value), total)
        spread = _Z_95 * math.sqrt((1 + value**2 / 2 if metric == "spearmanr" else 1) / (total - 3))
        low, high = (math.tanh(math.atanh(value) + sign * spread) for sign in (-1, 1))
        return cls(metric, float(value), total, interval=(low, high))


@dataclass(frozen=True)
class Speed(_Checked):
    """Measured time of a forward pass, and its throughput against the first model of the same run.

    Args:
        device: Where it ran.
        num_threads: CPU threads within an operator.
        p50_ms: Median latency of a batch.
        p95_ms: Its 95th percentile.
        sequences_per_second: Throughput at the median.
        num_rounds: Rounds in which the models took turns.
        ratio: Throughput against the first model.
    """

    device: str
    num_threads: int
    p50_ms: float
    p95_ms: float
    sequences_per_second: float
    num_rounds: int
    ratio: float


@dataclass(frozen=True)
class Measured(_Checked):
    """One model of a comparison.

    Args:
        name: Its name there.
        parameters: In three conventions.
        scores: Metrics, the headline first; empty where nothing was evaluated.
        flops: Of a forward pass at `RunRecord.shape`, a multiply-add being 2.
        speed: At the same shape; None where no time was taken.
    """

    name: str
    parameters: ParameterCount
    scores: tuple[Score, ...] = ()
    flops: int | None = None
    speed: Speed | None = None

    @classmethod
    def of(cls, row: ModelReport, first: ModelReport, scores: Sequence[Score]) -> Self:
        """Takes over a row of a report whose ratios are against `first`."""
        timing, speed = row.timing, None
        if timing is not None:
            speed = Speed(
                device=timing.device,
                num_threads=timing.num_threads,
                p50_ms=1e3 * timing.p50,
                p95_ms=1e3 * timing.p95,
                sequences_per_second=timing.sequences_per_second,
                num_rounds=len(timing.seconds),
                ratio=timing.ratio_to(first.timing),
            )
        return cls(row.name, row.parameters, tuple(scores), row.flops, speed)


@dataclass(frozen=True)
class Rows(_Checked):
    """What a model was trained on, or its heads were chosen on.

    Args:
        count: How many rows.
        source: Where they come from, for example "training rows of sst2".
    """

    count: int
    source: str


def expert_choice(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Returns `method` and `calibration` of a record: how the experts of a SHRP model were chosen, and on which rows.

    Args:
        recipe: How the model was made.
        task: Its task.
    """
    if recipe.routes:
        return {"method": "shrp", "calibration": Rows(len(task.validation), "rows held out of the training set")}
    needs_rows = recipe.expert_selector not in ("magnitude", "random")
    scored = Rows(min(CALIBRATION_SAMPLES, len(task.train)), f"training rows of {task.name}")
    return {"method": "shrp-without-routers", "calibration": scored if needs_rows else None}


@dataclass(frozen=True)
class RunRecord(_Checked):
    """How a model was made and what was measured; its card claims nothing else.

    Args:
        method: "shrp", "shrp-without-routers", "thin", "first-layers", "spread-layers", or the selector's name.
        base_model: Hub id, or "directory NAME", of what it was made from.
        auto_class: Auto class that opens it.
        kept: Heads (of an expert layer: experts) that stayed.
        expert_layers: Layers that are expert layers.
        measured: The models that were compared, in one run: what ratios are against first, this model last.
        options: Every option of the run, ready for JSON.
        seeds: Seeds of the runs that the scores come from.
        task: Name of the task; None for embeddings and the like.
        reported: Where the reported rows come from.
        license: License of the base model, where its card names one.
        training: The rows that it was trained on; None when nothing was trained.
        calibration: The rows on which heads were chosen.
        shape: Sequences and tokens of the forward pass whose FLOPs and time were taken.
        command: Command line that did it.
        environment: Machine, versions and date, as `shrp_hf.measuring.environment.environment` returns them.
        version: Version of this format.

    Raises:
        ValueError: A field has the wrong type, the model was not measured, or the record is of a newer version.
    """

    method: str
    base_model: str
    auto_class: str
    kept: KeepPlan
    expert_layers: tuple[int, ...]
    measured: tuple[Measured, ...]
    options: dict[str, Any]
    seeds: tuple[int, ...]
    task: str | None = None
    reported: str | None = None
    license: str | None = None
    training: Rows | None = None
    calibration: Rows | None = None
    shape: tuple[int, int] = SERVED_SHAPE
    command: str = field(default_factory=command_line)
    environment: dict[str, str] = field(default_factory=environment)
    version: int = RECORD_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version > RECORD_VERSION:
            raise ValueError(f"`version` is {self.version}, but this code reads up to {RECORD_VERSION}: update shrp_hf.")
        if not self.measured:
            raise ValueError("`measured` must hold at least the model itself, got none.")
        if self.task is None and any(measured.scores for measured in self.measured):
            raise ValueError("`task` must name what the scores were measured on, got None.")
        outside = [layer for layer in self.expert_layers if not 0 <= layer < self.kept.num_layers]
        if outside:
            raise ValueError(f"`expert_layers` names {outside}, but the layers are 0 to {self.kept.num_layers - 1}.")

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        rows: Sequence[ModelReport],
        scores: Mapping[str, Mapping[str, float]],
        task: Task,
        **fields: Any,
    ) -> Self:
        """Builds the record of a Shrp model from a comparison on a task.

        Args:
            model: The model; the last row is its own.
            rows: From `measure_models`.
            scores: Name of a row -> metrics on the reported rows.
            task: The task.
            **fields: The fields that do not follow: `method`, `base_model`, `options`, `seeds`, ...
        """
        measured = [
            Measured.of(row, rows[0], [Score.of(name, value, task.num_reported) for name, value in scores[row.name].items()])
            for row in rows
        ]
        timing = rows[0].timing
        if timing is not None:
            fields.setdefault("shape", (timing.batch_size, timing.length))
        return cls(
            auto_class=auto_class_of(model),
            kept=kept_heads(model.config),
            expert_layers=tuple(model.config.expert_layers),
            measured=tuple(measured),
            task=task.name,
            reported=task.reported,
            **fields,
        )

    @property
    def model(self) -> Measured:
        """What was measured of this model."""
        return self.measured[-1]

    @property
    def baseline(self) -> Measured | None:
        """What ratios are against; None when this model was measured alone."""
        return self.measured[0] if len(self.measured) > 1 else None

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns the record as JSON text and, given a path, also writes it there (to a temporary name, then moved)."""
        text = json.dumps(asdict(self), indent=2)
        if path is not None:
            write_text(Path(path), text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Reads a record from JSON text or, given a `Path`, from that file.

        Args:
            source: The text, or where it is.

        Raises:
            ValueError: The text is not a record.
        """
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        try:
            values = json.loads(text)
            values |= {
                "kept": KeepPlan(**values["kept"]),
                "measured": tuple(_measured(entry) for entry in values["measured"]),
            }
            values |= {name: values[name] and Rows(**values[name]) for name in ("training", "calibration")}
            values |= {name: tuple(values[name]) for name in ("expert_layers", "seeds", "shape")}
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"Not a run record: {error!r}. A record is JSON as `RunRecord.to_json` writes it.") from error


def kept_heads(config: PreTrainedConfig) -> KeepPlan:
    """Returns the heads (of an expert layer: experts) that a stock or Shrp model of this config has."""
    layers, heads = range(config.num_hidden_layers), config.num_attention_heads
    if not hasattr(config, "heads_of"):
        return KeepPlan.full(len(layers), heads)
    return KeepPlan(tuple(tuple(config.heads_of(layer)) for layer in layers), heads)


def origin(model_name: str) -> dict[str, Any]:
    """Returns `base_model` and `license` of a record of what was made from this model."""
    return {"base_model": source_name(model_name), "license": license_of(model_name)}


def source_name(model_name: str) -> str:
    """Returns what a record calls a base model: a Hub id as it is, a directory by its last two names."""
    path = Path(model_name)
    return f"directory {'/'.join(path.resolve().parts[-2:])}" if path.is_dir() else model_name


def _measured(entry: dict[str, Any]) -> Measured:
    scores = [Score(**{**score, "interval": score["interval"] and tuple(score["interval"])}) for score in entry["scores"]]
    speed = entry["speed"] and Speed(**entry["speed"])
    parameters = ParameterCount(**entry["parameters"])
    return Measured(**{**entry, "parameters": parameters, "scores": tuple(scores), "speed": speed})
