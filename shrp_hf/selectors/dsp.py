"""Differentiable Subset Pruning: a callback that learns while training which heads to keep."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from shrp_hf.defaults import MIN_HEADS_PER_LAYER, SEED
from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.models.expert_layer import sum_over_processes
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.scoring import scored_heads

MODES = ("joint", "pipelined")
_SEED_STRIDE = 1_000_003


def relaxed_top_k(scores: torch.Tensor, count: int, temperature: float) -> torch.Tensor:
    """Takes `count` entries without replacement, each by a softmax that lowers what earlier ones took.

    r_1 = scores; p_k = softmax(r_k / temperature); r_(k+1) = r_k + log(1 - p_k); the result is the sum of all p_k (Li,
    Cotterell, Sachan 2021). With Gumbel noise in `scores` its hard limit is a sample of `count` entries.

    Args:
        scores: Any shape; entries of -inf are never taken.
        count: At least 1, at most the number of finite entries.
        temperature: Above 0; towards 0 the result becomes 1 for the `count` highest entries and 0 for the others.

    Returns:
        The shape of `scores`; sums to `count`.
    """
    rest = scores.flatten()
    total = torch.zeros_like(rest)
    tiny = torch.finfo(rest.dtype).tiny
    for _ in range(count):
        log_p = torch.log_softmax(rest / temperature, dim=0)
        total = total + log_p.exp()
        left = -torch.expm1(log_p)  # 1 - p without its rounding error
        # Clamped as well as filled: the gradient of log at 0 would turn the filled entries' zeros into NaN.
        rest = (rest + left.clamp_min(tiny).log()).masked_fill(left == 0, -torch.inf)
    return total.view_as(scores)


class DspCallback(TrainerCallback, ExportableState):
    """Learns with any Trainer which `num_heads` heads to keep; after training `.plan` holds them.

    Every head has an importance w. Each optimizer step draws one soft mask (`relaxed_top_k` of w plus Gumbel noise,
    the same on all processes and for all accumulated batches), multiplies the heads' outputs by it, and moves w by
    its own Adam along the task loss. The temperature falls log-linearly over the whole training. Evaluation during
    training keeps the best heads by w and silences the others. The model itself is not cut: give `.plan` to
    `prune_heads`.

    As in the official code (Li, Cotterell, Sachan 2021), w starts Xavier-uniform and its learning rate falls linearly
    to 0. Different here: one mask serves all batches of an accumulated step; the gradient of w is clipped (at
    `max_grad_norm`) apart from the model's; the cool-down takes the length of the training, not 25,000 steps; and
    `min_heads_per_layer`, which acts on the choice, not on the soft mask.

    A checkpoint carries w, and a resumed training continues as if uninterrupted. `load_best_model_at_end` brings back
    weights but not their w: the plan is always that of the last step.

    Args:
        num_heads: Heads to keep over all ordinary layers; expert layers keep their experts on top.
        mode: "joint": model and w train together; "pipelined": only w learns, the weights stay as they are.
        learning_rate: Of w, at the first step.
        initial_temperature: Of the softmax, at the first step.
        final_temperature: At the last step.
        seed: Of the noise and the first w.
        min_heads_per_layer: Heads that every layer keeps, its best ones; 0 allows layers without heads.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> dsp = DspCallback(num_heads=72)
        >>> trainer = ShrpTrainer(model, args, train_dataset=dataset, callbacks=[dsp])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> pruned = prune_heads(trainer.model, dsp.plan)  # doctest: +SKIP
    """

    def __init__(
        self,
        num_heads: int,
        mode: str = "joint",
        learning_rate: float = 0.5,
        *,
        initial_temperature: float = 1000.0,
        final_temperature: float = 1e-8,
        seed: int = SEED,
        min_heads_per_layer: int = MIN_HEADS_PER_LAYER,
    ) -> None:
        for name, value, least in (("num_heads", num_heads, 1), ("min_heads_per_layer", min_heads_per_layer, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be a whole number from {least}, got {value!r}.")
        if mode not in MODES:
            raise ValueError(f'`mode` must be "joint" or "pipelined", got {mode!r}.')
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be more than 0, got {learning_rate}.")
        if not 0 < final_temperature <= initial_temperature < float("inf"):
            raise ValueError(
                "`final_temperature` must be more than 0 and at most `initial_temperature`, got "
                f"{final_temperature} and {initial_temperature}."
            )
        self.num_heads = num_heads
        self.mode = mode
        self.learning_rate = learning_rate
        self.initial_temperature = initial_temperature
        self.final_temperature = final_temperature
        self.seed = seed
        self.min_heads_per_layer = min_heads_per_layer
        self._plan: KeepPlan | None = None
        self._layout: HeadLayout | None = None
        self._open: tuple[tuple[int, ...], ...] = ()
        self._closed: torch.Tensor | None = None  # (layers, heads), True where there is no choice
        self._importances: torch.Tensor | None = None  # (layers, heads), float64 on the CPU whatever the model's
        self._optimizer: torch.optim.Optimizer | None = None
        self._sample: torch.Tensor | None = None  # (layers, heads), the soft mask as a function of w
        self._soft_mask: torch.Tensor | None = None  # the same as a leaf on the model's device, whose gradient adds up
        self._hard_mask: torch.Tensor | None = None
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []

    @property
    def plan(self) -> KeepPlan:
        """The heads to keep.

        Raises:
            ValueError: Training has not ended.
        """
        if self._plan is None:
            raise ValueError(
                "`plan` is there once training has ended. (`restore_callback_states_from_checkpoint` makes Trainer "
                "put a copy in this callback's place: leave it off, a resumed DspCallback restores itself.)"
            )
        return self._plan

    @property
    def importances(self) -> torch.Tensor:
        """The w of now: shape (layers, heads), float64, higher = keep; NaN where there is no choice.

        Raises:
            ValueError: Training has not begun.
        """
        if self._importances is None:
            raise ValueError("`importances` are there once training has begun: give this callback to a Trainer first.")
        return self._importances.detach().masked_fill(self._closed, torch.nan)

    def temperature(self, step: int, max_steps: int) -> float:
        """Returns the temperature of an optimizer step; it falls by the same factor each step.

        Args:
            step: The step, counted from 0.
            max_steps: Steps of the whole training.
        """
        ratio = self.final_temperature / self.initial_temperature
        return self.initial_temperature * ratio ** (step / max(1, max_steps - 1))

    def release(self) -> None:
        """Takes the masks off the model and gives its parameters `requires_grad` back.

        The end of a training does this; after one that broke off with an exception, call it yourself.
        """
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._frozen, self._layout = [], [], None
        self._sample = self._soft_mask = self._hard_mask = None

    # --- a checkpoint's copy ---

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the arguments, w and the state of its optimizer."""
        names = ("num_heads", "mode", "learning_rate", "initial_temperature", "final_temperature", "seed")
        arguments = {name: getattr(self, name) for name in (*names, "min_heads_per_layer")}
        learned = {}
        if self._importances is not None:
            moments = self._optimizer.state[self._importances]
            learned = {"importances": self._importances, **moments}
        learned = {name: value.tolist() for name, value in learned.items()}
        return {"args": arguments, "attributes": {"_learned": learned}}

    def _restore(self, state: TrainerState) -> None:
        # Trainer restores callbacks only when told to, and then replaces the user's object: so this reads it itself.
        saved = state.stateful_callbacks.get(type(self).__name__)
        learned = saved["attributes"]["_learned"] if isinstance(saved, Mapping) else None
        if not learned:
            raise ValueError(
                f"The checkpoint of step {state.global_step} holds no state of one DspCallback: resume from one that "
                "was written while training with it, or start anew."
            )
        if saved["args"] != self.state()["args"]:
            raise ValueError(
                f"The checkpoint was written by a DspCallback with {saved['args']}, but this one has "
                f"{self.state()['args']}: resume with the same arguments."
            )
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in learned.items()}
        if values["importances"].shape != self._importances.shape:
            raise ValueError(
                f"The checkpoint has importances of shape {tuple(values['importances'].shape)}, but this model has "
                f"{tuple(self._importances.shape)} (layers, heads)."
            )
        with torch.no_grad():
            self._importances.copy_(values.pop("importances"))
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": {0: values} if values else {}, "param_groups": groups})

    # --- training ---

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Finds the heads, starts or restores w, and hooks the masks in.

        Raises:
            ValueError: The model is not supported, `num_heads` or the training arguments do not suit, or the
                checkpoint to resume from has no w.
        """
        self.release()
        model = kwargs["model"]
        self._check_arguments(args)
        self._plan, self._layout = None, head_layout(model)
        self._open = scored_heads(self._layout)
        self._check_count()
        shape = (self._layout.num_layers, self._layout.num_heads)
        self._closed = torch.ones(shape, dtype=torch.bool)
        for row, heads in zip(self._closed, self._open, strict=True):
            row[list(heads)] = False
        w = torch.empty(shape, dtype=torch.float64)
        nn.init.xavier_uniform_(w, generator=self._generator(-1))
        self._importances = w.requires_grad_()
        self._optimizer = torch.optim.Adam([self._importances], lr=self.learning_rate)
        if state.global_step:
            self._restore(state)
        if self.mode == "pipelined" and not self._drops_gradients(args):
            self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        for layer, heads in enumerate(self._open):
            if heads:
                hook = partial(self._mask_heads, layer, torch.tensor(heads, device=model.device))
                self._handles.append(self._layout.output(layer).register_forward_pre_hook(hook))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draws the soft mask of this optimizer step."""
        noise = -torch.empty_like(self._importances).exponential_(generator=self._generator(state.global_step)).log()
        scores = (self._importances + noise).masked_fill(self._closed, -torch.inf)
        self._sample = relaxed_top_k(scores, self.num_heads, self.temperature(state.global_step, state.max_steps))
        self._soft_mask = self._sample.detach().float().to(kwargs["model"].device).requires_grad_()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves w along the gradient that all accumulated batches of all processes gave its mask.

        Raises:
            ValueError: No gradient came, or one that is not finite.
        """
        if self._soft_mask.grad is None:
            raise ValueError(
                "No gradient reached the head mask: run the model in training mode, and keep its loss in the graph."
            )
        gradient = sum_over_processes(self._soft_mask.grad) / args.world_size
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        if scaler is not None:
            gradient = gradient / scaler.get_scale()
        if gradient.isfinite().all():
            self._update(gradient.cpu().double(), args, 1 - state.global_step / state.max_steps)
        elif scaler is None:  # a scaler overflows now and then, and lowers its scale
            raise ValueError(
                f"The gradient of the head mask is not finite at step {state.global_step}: look at the loss, and "
                "lower the `learning_rate` of the training arguments."
            )
        if self.mode == "pipelined" and self._drops_gradients(args):
            for parameter in kwargs["model"].parameters():
                parameter.grad = None  # an optimizer passes by what has no gradient
        self._sample = self._soft_mask = self._hard_mask = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Chooses the heads and leaves the model without hooks."""
        self._plan = self._choose()
        self.release()

    def _update(self, gradient: torch.Tensor, args: TrainingArguments, rate: float) -> None:
        self._optimizer.zero_grad()
        self._sample.backward(gradient)
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_([self._importances], args.max_grad_norm)
        self._optimizer.param_groups[0]["lr"] = self.learning_rate * rate
        self._optimizer.step()

    def _mask_heads(
        self, layer: int, heads: torch.Tensor, module: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        context, *rest = inputs  # (batch, length, heads * head_size)
        mask = self._soft_mask if module.training else None
        if mask is None:
            mask = self._chosen_mask(heads.device)
        row = mask[layer, heads].to(context)
        return (context.unflatten(-1, (len(heads), -1)) * row[:, None]).flatten(-2), *rest

    def _chosen_mask(self, device: torch.device) -> torch.Tensor:
        if self._hard_mask is None:
            mask = torch.zeros(self._closed.shape)
            for row, heads in zip(mask, self._choose().kept, strict=True):
                row[list(heads)] = 1
            self._hard_mask = mask.to(device)
        return self._hard_mask

    def _choose(self) -> KeepPlan:
        importances, ranked = self._importances.tolist(), []
        for layer, heads in enumerate(self._open):
            best_first = sorted((-importances[layer][head], head) for head in heads)
            ranked += [(i >= self.min_heads_per_layer, cost, layer, head) for i, (cost, head) in enumerate(best_first)]
        kept = [set(heads) - set(free) for heads, free in zip(self._layout.kept, self._open, strict=True)]
        for *_, layer, head in sorted(ranked)[: self.num_heads]:
            kept[layer].add(head)
        return KeepPlan(kept=tuple(tuple(heads) for heads in kept), num_heads=self._layout.num_heads)

    def _generator(self, step: int) -> torch.Generator:
        # From the step alone: a resumed run draws what an uninterrupted one would, and so does every process.
        return torch.Generator().manual_seed(self.seed + _SEED_STRIDE * (step + 1))

    def _drops_gradients(self, args: TrainingArguments) -> bool:
        # DDP, wrapped before training begins, waits for every gradient, and a scaler for at least one: so they come.
        return args.world_size > 1 or args.fp16

    def _check_count(self) -> None:
        available = sum(map(len, self._open))
        fewest = sum(min(self.min_heads_per_layer, len(heads)) for heads in self._open)
        if not max(1, fewest) <= self.num_heads <= available:
            raise ValueError(
                f"`num_heads` is {self.num_heads}, but `min_heads_per_layer={self.min_heads_per_layer}` and the "
                f"{available} heads to choose from allow {max(1, fewest)} to {available}."
            )

    def _check_arguments(self, args: TrainingArguments) -> None:
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name, None):
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` splits the projections whose heads DspCallback masks: train under DDP."
                )
        if args.n_gpu > 1:
            raise ValueError(
                f"DataParallel over {args.n_gpu} GPUs cannot share one head mask: start with `accelerate launch` for "
                "one process per GPU, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        if self.mode == "joint":
            return
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (getattr(args, name, None) or {}).get("use_reentrant"):
                raise ValueError(
                    f"`{name}={getattr(args, name)}` loses the gradient of the head mask where no weight trains: set "
                    "`use_reentrant` to False."
                )
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                f"`max_grad_norm={args.max_grad_norm}` leaves the scaler of `fp16` nothing to check where no weight "
                "trains: give a positive one, or use `bf16`."
            )
