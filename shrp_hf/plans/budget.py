"""How many heads to keep: a count, a share, the knee of a curve, or whatever a measured target leaves."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from shrp_hf.defaults import SERVED_SHAPE

COSTS = ("parameters", "flops", "latency")
KNEE_DEGREES = range(2, 7)
TABLE_RUNTIMES = ("eager", "onnx", "int8")


class KneeNotFoundError(ValueError):
    """The curve has no knee.

    Args:
        message: What was looked for.
        curve: The points of the curve, (x, y) each.
    """

    def __init__(self, message: str, curve: Sequence[tuple[float, float]]) -> None:
        points = ", ".join(f"({x:g}, {y:.3g})" for x, y in curve)
        super().__init__(f"{message} The curve: {points}.")
        self.curve = tuple(curve)


@dataclass(frozen=True)
class Serving:
    """How a model is served: what its FLOPs are counted and its time is measured for.

    Args:
        batch_size: Sequences (images) in a call.
        length: Tokens per sequence; an image model has its own.
        runtime: "eager" (PyTorch), or ONNX Runtime: "onnx" (float32) or "int8".
        num_threads: CPU threads within an operator; None: torch's setting.

    Raises:
        ValueError: A number is below 1, or the runtime is not one of these.
    """

    batch_size: int = SERVED_SHAPE[0]
    length: int = SERVED_SHAPE[1]
    runtime: str = "eager"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "num_threads"):
            value = getattr(self, name)
            if not (value is None and name == "num_threads") and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a whole number from 1, got {value!r}.")
        if self.runtime not in TABLE_RUNTIMES:
            raise ValueError(f"`runtime` must be one of {', '.join(TABLE_RUNTIMES)}, got {self.runtime!r}.")


@dataclass(frozen=True)
class Budget:
    """What a selector may keep, of what it may choose from. Made by the class methods below.

    Args:
        kind: Name of the class method.
        target: What is kept: heads, a share of them, or an absolute cost.
        keep: Share of the unpruned model's cost or quality that is kept.
        degree: Polynomial degree of the knee.
        measure: Takes a plan, returns its cost or its quality.
        at: What a table of costs is made for, where there is no `measure`.
        table: A `CostTable` that was made already.
    """

    kind: str
    target: float | None = None
    keep: float | None = None
    degree: int | None = None
    measure: Callable[[Any], float] | None = None
    at: Serving | None = None
    table: Any = None

    @classmethod
    def heads(cls, count: int) -> Self:
        """Keeps `count` heads.

        Args:
            count: Heads of the whole model.

        Raises:
            ValueError: Not a positive whole number.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`count` must be a positive whole number of heads, got {count!r}.")
        return cls("heads", target=count)

    @classmethod
    def fraction(cls, keep: float) -> Self:
        """Keeps the share `keep` of the heads, rounded to the nearest head.

        Args:
            keep: Above 0, at most 1.

        Raises:
            ValueError: Not above 0 and at most 1.
        """
        return cls("fraction", target=_share("keep", keep))

    @classmethod
    def knee(cls, degree: int = 6, evaluate: Callable[[Any], float] | None = None) -> Self:
        """Keeps as many heads as the knee of a curve says (package kneed, concave and increasing, polynomial).

        Without `evaluate` the curve is CAHP's medoid silhouette (arXiv 2606.19150). Its knee hardly depends on the
        data: on uniform random points the degrees 2 to 6 keep about 48, 30, 24, 19 and 17% of 144 heads. The degree
        sets the head count. With `evaluate` the curve is the measured quality of the plans, which does depend on them.

        Args:
            degree: Polynomial degree that smooths the curve, 2 to 6. 6 is the default of CAHP's code.
            evaluate: Takes a plan, returns its quality on a calibration split.

        Raises:
            ValueError: The degree is out of range.
        """
        if degree not in KNEE_DEGREES:
            raise ValueError(f"`degree` must be between 2 and 6, got {degree!r}.")
        return cls("knee", degree=degree, measure=_measure("evaluate", evaluate) if evaluate is not None else None)

    @classmethod
    def parameters(cls, target: int | None = None, *, keep: float | None = None) -> Self:
        """Keeps as many heads as fit into `target` parameters of the whole model, or into the share `keep` of them.

        One head of BERT-base is 196,800 parameters: half of the heads are 13% of the model.

        Args:
            target: Most parameters, embeddings included.
            keep: The same as a share of the whole model, 0 to 1.

        Raises:
            ValueError: Not exactly one of the two is given, or it is out of range.
        """
        return cls("parameters", **_limit(target, keep))

    @classmethod
    def flops(
        cls,
        measure: Callable[[Any], float] | None = None,
        *,
        target: float | None = None,
        keep: float | None = None,
        at: Serving | None = None,
    ) -> Self:
        """Keeps what fits into `target` FLOPs (a multiply-add is 2), or into the share `keep` of all.

        Without `measure` the selector counts what a head and a neuron cost, and chooses both.

        Args:
            measure: Takes a plan, returns the FLOPs of the model cut by it. None: counted.
            target: FLOPs.
            keep: Share of the unpruned model's FLOPs.
            at: Batch and length to count for, where there is no `measure`; None: 8 x 128.

        Raises:
            ValueError: Not exactly one of target and keep is given, it is out of range, or `at` says what `measure` does.
        """
        return cls("flops", **_limit(target, keep), **_source(measure, at, None))

    @classmethod
    def latency(
        cls,
        measure: Callable[[Any], float] | None = None,
        *,
        target: float | None = None,
        keep: float | None = None,
        seconds: float | None = None,
        at: Serving | None = None,
        table: Any = None,
    ) -> Self:
        """Keeps what runs within so much time.

        With `measure`, heads: as many as run within `target` seconds, or the share `keep` of the unpruned model's time.
        Without, heads and neurons, by a table of the time of a layer: within the share `target` (or `keep`) of the
        unpruned model's time, or within `seconds`. The table is measured on this machine, in some tens of seconds, and
        kept for the next time.

        Args:
            measure: Takes a plan, returns the seconds that the model cut by it needs; called once per count tried.
            target: Seconds with `measure`; without, a share above 0 and at most 1.
            keep: Share of the unpruned model's time.
            seconds: Seconds, by the table.
            at: Batch, length, runtime and threads of the table; None: 8 x 128 in PyTorch eager.
            table: A table that was made already, by `shrp_hf.measuring.latency_table`.

        Raises:
            ValueError: Not exactly one of target, keep and seconds is given, it is out of range, or several of measure, at
                and table are.
        """
        if measure is None:
            if [target, keep, seconds].count(None) != 2:
                raise ValueError(
                    f"Give exactly one of `target`, `keep` and `seconds`, got target={target!r}, keep={keep!r} and "
                    f"seconds={seconds!r}."
                )
            if target is not None and not (isinstance(target, int | float) and 0 < target <= 1):
                raise ValueError(
                    f"`target` must be a share of the unpruned model's time, above 0 and at most 1, got {target!r}: for "
                    "seconds give `seconds`."
                )
            target, keep = seconds, keep if target is None else target
        elif seconds is not None:
            raise ValueError("`seconds` is for a table; with `measure` give them as `target`.")
        return cls("latency", **_limit(target, keep), **_source(measure, at, table))

    @classmethod
    def speedup(cls, times: float, *, at: Serving | None = None, table: Any = None) -> Self:
        """Keeps the heads and neurons that make the model `times` as fast: `Budget.latency(target=1 / times)`.

        Args:
            times: At least 1, for example 4.
            at: As in `latency`.
            table: As in `latency`.

        Raises:
            ValueError: `times` is below 1.
        """
        if isinstance(times, bool) or not isinstance(times, int | float) or not 1 <= times < math.inf:
            raise ValueError(f"`times` must be a number from 1, such as 4 for a quarter of the time, got {times!r}.")
        return cls.latency(target=1 / times, at=at, table=table)

    @classmethod
    def quality(cls, evaluate: Callable[[Any], float], keep: float = 0.99) -> Self:
        """Keeps as few heads as hold the share `keep` of the unpruned model's quality.

        Args:
            evaluate: Takes a plan, returns its quality (higher is better) on a calibration split, never on the one
                that is reported; called once per count tried, about log2 of the number of heads.
            keep: Share of the quality.

        Raises:
            ValueError: `keep` is not above 0 and at most 1.
        """
        return cls("quality", keep=_share("keep", keep), measure=_measure("evaluate", evaluate))

    @property
    def is_tabled(self) -> bool:
        """Whether it is spent on heads and neurons by a table of costs."""
        return self.kind in ("flops", "latency") and self.measure is None

    @property
    def is_measured(self) -> bool:
        """Whether plans have to be measured to know the count."""
        return self.kind in (*COSTS, "quality") or (self.kind == "knee" and self.measure is not None)

    def count(self, available: int) -> int:
        """Returns the heads that "heads" or "fraction" keep of `available` ones.

        Args:
            available: Heads that there are.

        Raises:
            ValueError: There are not that many.
        """
        share = self.target or 0
        count = int(share) if self.kind == "heads" else math.floor(share * available + 0.5)
        if not 1 <= count <= available:
            raise ValueError(f"`budget` keeps {count} heads, but must keep 1 to {available}: so many are to choose from.")
        return count

    def search(self, plan_of: Callable[[int], Any], low: int, high: int, num_points: int = 16) -> tuple[int, dict]:
        """Finds the count of a measured budget by bisection; the count returned has been measured and meets it.

        Args:
            plan_of: Returns the plan that keeps so many heads; `high` is the unpruned model.
            low: Fewest heads that may be kept.
            high: All heads.
            num_points: Counts that a measured knee looks at, evenly spaced.

        Returns:
            The count, and what was measured per count.

        Raises:
            ValueError: No count meets the budget, or a measurement is not a finite number (the quality of a plan may be
                NaN, which is too low, that of the unpruned model may not).
            KneeNotFoundError: The measured curve has no knee.
        """
        measured: dict[int, float] = {}

        def value(count: int) -> float:
            if count not in measured:
                measured[count] = float(self.measure(plan_of(count)))
                # The quality of few heads may be undefined (a correlation, where all predictions are one): too few then.
                is_undefined = math.isnan(measured[count]) and self.kind in ("quality", "knee") and count < high
                if not math.isfinite(measured[count]) and not is_undefined:
                    raise ValueError(f"The measurement of a plan that keeps {count} heads is {measured[count]}.")
            return measured[count]

        if self.kind == "knee":
            steps = max(1, min(num_points, high - low + 1) - 1)
            curve = [(c, value(c)) for c in sorted({low + (high - low) * i // steps for i in range(steps + 1)})]
            return round(find_knee([(c, y) for c, y in curve if not math.isnan(y)], self.degree)), measured
        limit = self.target if self.target is not None else self.keep * value(high)
        if self.kind == "quality":
            if limit <= 0:
                raise ValueError(f"`evaluate` gives the unpruned model {value(high)}, but its quality must be positive.")
            return _bisect(lambda count: value(count) >= limit, low, high), measured
        if value(low) > limit:
            raise ValueError(
                f"`budget` allows {self.kind} of {limit:g}, but the fewest heads ({low}) need {value(low):g}: raise "
                "it, or lower `min_heads_per_layer`."
            )
        # The largest count that fits is one below the smallest that does not.
        return (high if value(high) <= limit else _bisect(lambda count: value(count) > limit, low, high) - 1), measured


def find_knee(curve: Sequence[tuple[float, float]], degree: int) -> float:
    """Returns the x of the knee of a concave, increasing curve, smoothed by a polynomial (package kneed).

    Args:
        curve: Points (x, y), x ascending.
        degree: Degree of the polynomial.

    Raises:
        KneeNotFoundError: There is none, the curve is flat, or it has too few points for the degree.
        ImportError: kneed is missing.
    """
    try:
        from kneed import KneeLocator
    except ImportError as error:
        raise ImportError("A knee needs the package kneed: pip install 'shrp_hf[posthoc]'.") from error
    x, y = zip(*curve, strict=True)
    knee = None
    if len(curve) > degree + 1 and max(y) > min(y):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kneed warns where we raise
            options = {"curve": "concave", "direction": "increasing", "interp_method": "polynomial"}
            knee = KneeLocator(x, y, polynomial_degree=degree, **options).knee
    if knee is None:
        raise KneeNotFoundError(
            f"The curve of {len(curve)} points has no knee at `degree={degree}`: try another degree, or give a count "
            "(`Budget.heads`).",
            curve,
        )
    return float(knee)


def _bisect(meets: Callable[[int], bool], low: int, high: int) -> int:
    """Returns a count that meets the condition though the one below does not; `high` is known to meet it."""
    if meets(low):
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a share above 0 and at most 1, got {value!r}.")
    return value


def _limit(target: float | None, keep: float | None) -> dict[str, Any]:
    if (target is None) == (keep is None):
        raise ValueError(f"Give either `target` or `keep`, got target={target!r} and keep={keep!r}.")
    is_number = isinstance(target, int | float) and not isinstance(target, bool)
    if target is not None and not (is_number and 0 < target < math.inf):
        raise ValueError(f"`target` must be a positive number, got {target!r}.")
    return {"target": target, "keep": keep if keep is None else _share("keep", keep)}


def _source(measure: Callable[[Any], float] | None, at: Serving | None, table: Any) -> dict[str, Any]:
    """Where a cost comes from: a measurement of the caller's, a table that there is, or one to make."""
    if [measure, at, table].count(None) < 2:
        raise ValueError(
            f"Give one of `measure`, `at` and `table` at most: each says what the cost is, got measure={measure!r}, at={at!r} "
            f"and table={'a table' if table is not None else None}."
        )
    if at is not None and not isinstance(at, Serving):
        raise ValueError(f"`at` must be a Serving, such as Serving(batch_size=1, length=32), got {at!r}.")
    return {"measure": None if measure is None else _measure("measure", measure), "at": at, "table": table}


def _measure(name: str, measure: object) -> Callable[[Any], float]:
    if not callable(measure):
        raise ValueError(f"`{name}` must be a callable that takes a plan and returns a number, got {measure!r}.")
    return measure
