"""What is compared: methods, budgets, seeds, and the jobs that they come down to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from typing import Any

from shrp_hf.defaults import MIN_HEADS_PER_LAYER
from shrp_hf.plans.budget import KNEE_DEGREES
from shrp_hf.selectors import SELECTORS
from shrp_hf.training.recipes import Recipe, find_recipe

DSP_MODES = {"dsp": "joint", "dsp-pipelined": "pipelined"}
METHODS = (*sorted(set(SELECTORS) - {"usage"}), *DSP_MODES)
"""What `selectors` may name: the selectors that score a dense model, and DSP, which learns what to keep."""


@dataclass(frozen=True)
class ModelShape:
    """What of the dense model decides which cells are possible.

    Args:
        num_layers: Layers.
        num_heads: Heads of each.
        has_expert_layers: Whether the family converts to SHRP.
        has_classes: Whether each row has one class, by which CAHP tells heads apart.
    """

    num_layers: int
    num_heads: int
    has_expert_layers: bool = True
    has_classes: bool = True


@dataclass(frozen=True)
class Job:
    """A piece of work that one process does, and the file that says that it is done.

    Args:
        key: Name of the file.
        kind: "dense", "stats", "plan", "convert", "shorten", "control" or "cell"; `dense`, `control` and `cell` are
            rows of the result.
        needs: Keys of the jobs whose results this one reads.
        seed: The seed.
        fields: What else it depends on.
        recipe: How it trains, None where nothing depends on that.
    """

    key: str
    kind: str
    needs: tuple[str, ...]
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None

    @property
    def is_cell(self) -> bool:
        """Whether its result is a row of the comparison."""
        return self.kind in ("dense", "control", "cell")

    @property
    def makes_model(self) -> bool:
        """Whether it leaves a model behind that others read."""
        return self.kind in ("convert", "shorten") or (self.kind == "plan" and self.fields["method"] == "dsp")


@dataclass(frozen=True)
class Grid:
    """The cells of a comparison: selectors x budgets, conversions x experts and truncations, x recoveries x seeds.

    Args:
        selectors: Names in `METHODS`; "random" is added unless `without_random`.
        keep: Shares of the heads that stay.
        heads: Numbers of heads that stay.
        knee_degrees: Degrees of CAHP's knee; the other selectors keep as many heads as CAHP does there, seed by seed.
        expert_layers: Numbers of layers that SHRP converts, counted from the last.
        experts: Experts that stay in each of them.
        truncate: Numbers of first layers that a truncated model keeps. It is trained on as many examples as the
            conversion of its other layers.
        spread: The same of evenly spread layers, the first and the last among them.
        thin: Speed-ups that thin layers (few heads and neurons) are searched for, by the time of a layer on this machine.
        thin_keep: Shares of heads and neurons that thin layers which are all alike keep.
        seeds: Of everything that is drawn.
        recipes: Names of recipes.
        recovery_epochs: Epochs of recovery after the cut; None: the recipe's own.
        experts_per_sequence: Top-k of the routers; None: the recipe's own.
        balance_coefs: Weights of the balance loss; None: the recipe's own.
        expert_selectors: What chooses the experts, names in `EXPERT_SELECTORS`; None: the recipe's own. Top-k and balance
            loss are the routers', and make no difference to the others.
        without_random: Leave random heads out.
        without_control: Leave the dense model out that is trained on for as long as the others recover.
    """

    selectors: Sequence[str] = ()
    keep: Sequence[float] = ()
    heads: Sequence[int] = ()
    knee_degrees: Sequence[int] = ()
    expert_layers: Sequence[int] = ()
    experts: Sequence[int] = (1,)
    truncate: Sequence[int] = ()
    spread: Sequence[int] = ()
    thin: Sequence[float] = ()
    thin_keep: Sequence[float] = ()
    seeds: Sequence[int] = (0,)
    recipes: Sequence[str] = ("default",)
    recovery_epochs: Sequence[float | None] = (None,)
    experts_per_sequence: Sequence[int | None] = (None,)
    balance_coefs: Sequence[float | None] = (None,)
    expert_selectors: Sequence[str | None] = (None,)
    without_random: bool = False
    without_control: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """The selectors, with the control."""
        wants_control = self.selectors and "random" not in self.selectors and not self.without_random
        return (*self.selectors, "random") if wants_control else tuple(self.selectors)

    def check(self, shape: ModelShape, min_heads_per_layer: int = MIN_HEADS_PER_LAYER) -> None:
        """Refuses a grid that cannot be computed.

        Args:
            shape: Of the model.
            min_heads_per_layer: Heads that every layer keeps.

        Raises:
            ValueError: A value is unknown, out of range for the model or named twice, or there is nothing to compare.
            ImportError: CAHP is asked for and its packages are missing.
        """
        for name in self.selectors:
            if name not in METHODS:
                raise ValueError(f"`selectors` must be names of {', '.join(METHODS)}, got {name!r}.")
        for name in self.__dataclass_fields__:
            values = getattr(self, name)
            if isinstance(values, Sequence) and len(set(values)) != len(values):
                twice = next(value for value in values if list(values).count(value) > 1)
                raise ValueError(f"`{name}` names {twice!r} twice, got {list(values)}: leave one out.")
        several = ("recovery_epochs", "experts", "experts_per_sequence", "balance_coefs", "expert_selectors")
        for name in ("seeds", "recipes", *several):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must hold at least one value, got none.")
        has_budget = bool(self.keep or self.heads or self.knee_degrees)
        if bool(self.selectors) != has_budget:
            given, missing = ("`selectors`", "a budget (`keep`, `heads` or `knee_degrees`)")[:: -1 if has_budget else 1]
            raise ValueError(f"{given[0].upper()}{given[1:]} without {missing} compares nothing: give both or neither.")
        if not (self.selectors or self.expert_layers or self.truncate or self.spread or self.thin or self.thin_keep):
            structures = "`expert_layers`, `thin`, `thin_keep`, `truncate` or `spread`"
            raise ValueError(f"Nothing to compare: give `selectors` with a budget, {structures}.")
        self._check_budgets(shape, min_heads_per_layer)
        self._check_thin(shape)
        self._check_layers(shape)
        self._check_training(shape)

    def _check_budgets(self, shape: ModelShape, min_heads_per_layer: int) -> None:
        available = shape.num_layers * shape.num_heads
        fewest = max(1, shape.num_layers * min_heads_per_layer)
        why = f"the model has {available} heads, and `min_heads_per_layer={min_heads_per_layer}` holds {fewest}"
        for share in self.keep:
            if not 0 < share <= 1 or not fewest <= int(share * available + 0.5):
                raise ValueError(f"`keep` must be shares from {fewest / available:.3g} to 1 ({why}), got {share}.")
        for count in self.heads:
            if not fewest <= count <= available:
                raise ValueError(f"`heads` must be between {fewest} and {available} ({why}), got {count}.")
        for degree in self.knee_degrees:
            if degree not in KNEE_DEGREES:
                raise ValueError(f"`knee_degrees` must be between 2 and 6, got {degree}.")
        clustering = [name for name in ("cahp", "cahp-direct") if name in self.selectors]
        if clustering or self.knee_degrees:
            reason = f"`selectors` with {clustering[0]}" if clustering else "`knee_degrees`, which are CAHP's,"
            direct_only = clustering == ["cahp-direct"] and not self.knee_degrees
            packages = ("kmedoids",) if direct_only else ("sklearn", "kmedoids", "kneed")
            missing = [name for name in packages if find_spec(name) is None]
            if missing:
                raise ImportError(f"{reason} needs the package {missing[0]}: pip install 'shrp_hf[posthoc]', or leave it out.")
            if not shape.has_classes:
                raise ValueError(f"{reason} compares classes, but the task has no single class for each row: leave it out.")

    def _check_thin(self, shape: ModelShape) -> None:
        for times in self.thin:
            if not 1 < times < float("inf"):
                raise ValueError(f"`thin` must be speed-ups above 1, such as 4, got {times}.")
        for share in self.thin_keep:
            if not 1 <= int(share * shape.num_heads + 0.5) <= share * shape.num_heads + 0.5 <= shape.num_heads + 0.5:
                raise ValueError(
                    f"`thin_keep` must be shares of which a layer of {shape.num_heads} heads keeps one at least, from "
                    f"{0.5 / shape.num_heads:.3g} to 1, got {share}."
                )

    def _check_layers(self, shape: ModelShape) -> None:
        if self.expert_layers and not shape.has_expert_layers:
            raise ValueError(
                f"`expert_layers` must be left out, got {list(self.expert_layers)}: this family does not convert to SHRP."
            )
        limits = {
            "expert_layers": shape.num_layers,
            "experts": shape.num_heads,
            "truncate": shape.num_layers - 1,
            "spread": shape.num_layers - 1,
            "experts_per_sequence": min(5, shape.num_heads),
        }
        for name, limit in limits.items():
            for count in getattr(self, name):
                if count is not None and not 1 <= count <= limit:
                    size = f"{shape.num_layers} layers of {shape.num_heads} heads"
                    raise ValueError(f"`{name}` must be between 1 and {limit} (the model has {size}), got {count}.")

    def _check_training(self, shape: ModelShape) -> None:
        variants = list(product(self.recipes, self.expert_selectors))
        routes = any(find_recipe(recipe, expert_selector=selector).routes for recipe, selector in variants)  # raises
        for name in ("experts_per_sequence", "balance_coefs"):
            if set(getattr(self, name)) != {None} and not routes:
                raise ValueError(f"`{name}` is about routers, which nothing here has: give `expert_selectors` with usage.")
        for name in ("recovery_epochs", "balance_coefs"):
            for value in getattr(self, name):
                if value is not None and not 0 <= value < float("inf"):
                    raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        for seed in self.seeds:
            if not 0 <= seed < 2**31:
                raise ValueError(f"`seeds` must be whole numbers from 0, got {seed}.")

    def jobs(self) -> dict[str, Job]:
        """Returns every job by key, each behind those it needs; all of one seed before the next."""
        jobs: dict[str, Job] = {}
        for seed in self.seeds:
            for kind in (self._dense, self._controls, self._selected, self._thin, self._converted, self._truncated):
                for job in kind(seed):
                    jobs.setdefault(job.key, job)
        return jobs

    def _dense(self, seed: int) -> Iterator[Job]:
        yield Job(f"dense-seed{seed}", "dense", (), seed, {"method": "dense"})

    def _controls(self, seed: int) -> Iterator[Job]:
        for recipe in () if self.without_control else map(find_recipe, self.recipes):
            for epochs in filter(None, self._recoveries(recipe)):
                yield Job(
                    key=f"control-{recipe.name}-recovery{epochs:g}-seed{seed}",
                    kind="control",
                    needs=(f"dense-seed{seed}",),
                    seed=seed,
                    fields={"method": "control", "recovery_epochs": epochs},
                    recipe=recipe.control,
                )

    def _recoveries(self, recipe: Recipe) -> list[float]:
        return sorted({recipe.recovery_epochs if epochs is None else epochs for epochs in self.recovery_epochs})

    def _recovered(self, base: str, part: Job, recipe: Recipe, fields: Mapping[str, Any]) -> Iterator[Job]:
        """A cell for each recovery of what `part` left behind."""
        for epochs in self._recoveries(recipe):
            # What was never trained is the same cell under every recipe.
            is_trained = bool(epochs) or part.recipe is not None
            words = [base, recipe.name if is_trained else None, f"recovery{epochs:g}", f"seed{part.seed}"]
            yield Job(
                key="-".join(filter(None, words)),
                kind="cell",
                needs=(f"dense-seed{part.seed}", part.key),
                seed=part.seed,
                fields={**fields, "recovery_epochs": epochs},
                recipe=recipe if is_trained else None,
            )

    def _selected(self, seed: int) -> Iterator[Job]:
        dense = f"dense-seed{seed}"
        knees = {f"knee{degree}": ("knee_degree", degree) for degree in self.knee_degrees}
        budgets = {f"keep{share:g}": ("keep", share) for share in self.keep}
        budgets |= {f"heads{count}": ("heads", count) for count in self.heads} | knees
        # CAHP first, because others wait for its counts; it is planned for them even where it is not compared.
        methods = sorted(self.methods, key=lambda name: name != "cahp")
        for label, (budget, value) in budgets.items():
            for method in methods if "cahp" in methods or label not in knees else ("cahp", *methods):
                statistics = STATISTICS.get(method)
                if statistics:
                    yield Job(f"stats-{statistics}-seed{seed}", "stats", (dense,), seed, {"statistics": statistics})
                fields = {"method": method, "budget": budget, "value": value}
                needs = [dense] + [f"stats-{statistics}-seed{seed}"] * bool(statistics)
                if label in knees and method != "cahp":
                    needs.append(f"plan-cahp-{label}-seed{seed}")
                for recipe in map(find_recipe, self.recipes):
                    learns = method in DSP_MODES
                    words = ["plan", method, label, recipe.name if learns else None, f"seed{seed}"]
                    plan = Job(
                        key="-".join(filter(None, words)),
                        kind="plan",
                        needs=tuple(needs),
                        seed=seed,
                        fields=fields,
                        recipe=recipe if learns else None,
                    )
                    yield plan
                    if method in self.methods:
                        yield from self._recovered(f"{method}-{label}", plan, recipe, fields)

    def _variants(self) -> Iterator[Recipe]:
        for name in self.recipes:
            for selector in self.expert_selectors:
                recipe = find_recipe(name, expert_selector=selector)
                for top, coef in product(self.experts_per_sequence, self.balance_coefs) if recipe.routes else [(None, None)]:
                    yield find_recipe(name, expert_selector=selector, experts_per_sequence=top, balance_coef=coef)

    def _converted(self, seed: int) -> Iterator[Job]:
        for count, recipe, experts in product(self.expert_layers, self._variants(), self.experts):
            variant, shape = f"by-{recipe.expert_selector}", f"layers{count}-experts{experts}"
            fields: dict[str, Any] = {"method": "shrp", "budget": "layers", "value": count, "experts": experts}
            if recipe.routes:  # one conversion serves every number of experts
                variant, shape = f"top{recipe.experts_per_sequence}-coef{recipe.balance_coef:g}", f"layers{count}"
            converted = Job(
                key=f"convert-{shape}-{recipe.name}-{variant}-seed{seed}",
                kind="convert",
                needs=(f"dense-seed{seed}",),
                seed=seed,
                fields={"layers": count} if recipe.routes else {"layers": count, "experts": experts},
                recipe=recipe,
            )
            yield converted
            fields["expert_selector"] = recipe.expert_selector
            yield from self._recovered(f"shrp-layers{count}-experts{experts}-{variant}", converted, recipe, fields)

    def _thin(self, seed: int) -> Iterator[Job]:
        dense, stats = f"dense-seed{seed}", f"stats-neurons-seed{seed}"
        budgets = {f"speedup{times:g}": ("speedup", times) for times in self.thin}
        budgets |= {f"keep{share:g}": ("share", share) for share in self.thin_keep}
        for label, (budget, value) in budgets.items():
            yield Job(stats, "stats", (dense,), seed, {"statistics": "neurons"})
            fields = {"method": "thin", "budget": budget, "value": value}
            plan = Job(f"plan-thin-{label}-seed{seed}", "plan", (dense, stats), seed, fields)
            yield plan
            for recipe in map(find_recipe, self.recipes):
                yield from self._recovered(f"thin-{label}", plan, recipe, fields)

    def _truncated(self, seed: int) -> Iterator[Job]:
        wanted = [("truncate", "shorten", count) for count in self.truncate]
        wanted += [("spread", "shorten-spread", count) for count in self.spread]
        for (method, part, count), recipe in product(wanted, map(find_recipe, self.recipes)):
            short = Job(
                key=f"{part}-layers{count}-{recipe.name}-seed{seed}",
                kind="shorten",
                needs=(f"dense-seed{seed}",),
                seed=seed,
                fields={"layers": count, "spread": True} if method == "spread" else {"layers": count},
                recipe=recipe,
            )
            yield short
            fields = {"method": method, "budget": "layers", "value": count}
            yield from self._recovered(f"{method}-layers{count}", short, recipe, fields)


STATISTICS = {"his": "heads", "hies": "heads", "entropy": "heads", "cahp": "signatures", "cahp-direct": "signatures"}
"""Which pass over calibration rows a selector reads; those that are not named need none."""
