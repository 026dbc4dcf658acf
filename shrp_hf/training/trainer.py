"""ShrpTrainer: progressive conversion, routing losses, usage, distillation."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from shrp_hf.card_parts import insert_loading_section, license_of
from shrp_hf.checkpoints import warn_of_half_precision
from shrp_hf.files import writing_to
from shrp_hf.models.expert_layer import Expander, Router, sum_over_processes
from shrp_hf.models.modeling_shrp import ShrpModelMixin
from shrp_hf.models.outputs import embedding_of
from shrp_hf.models.saving import copy_code
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import to_shrp
from shrp_hf.selectors.usage import plan_by_usage
from shrp_hf.training.arguments import ShrpTrainingArguments, check_lesson, check_processes, rate_factor
from shrp_hf.training.distillation import hidden_states_loss, outputs_loss, own_teacher, recorded_values, value_relations_loss
from shrp_hf.training.dropout import dropout_rates
from shrp_hf.training.finite import FiniteTrainer
from shrp_hf.training.routing_log import RoutingLog
from shrp_hf.training.sampling import EpochSampler, data_seed, hold_out
from shrp_hf.training.stages import StageCallback, StageSchedule
from shrp_hf.training.teacher_outputs import ROW_COLUMN, TeacherOutputs

logger = logging.getLogger(__name__)


class ShrpTrainer(FiniteTrainer):
    """`Trainer` that converts layers to expert layers while it trains, then lets them specialise.

    With `ShrpTrainingArguments` that name layers, a stock BERT model is converted (it lives in `trainer.model`) and a
    slice of the training set is set aside for `usage_plan`. With plain `TrainingArguments` nothing is converted. Layers
    that are expert layers already are only trained, also with a slice set aside.

    Args:
        model: A stock or Shrp model.
        args: `ShrpTrainingArguments`, or plain `TrainingArguments`.
        data_collator: As in Trainer.
        train_dataset: As in Trainer.
        eval_dataset: As in Trainer; never used to choose experts.
        processing_class: As in Trainer.
        model_init: As in Trainer.
        teacher: A model with the same labels that the student follows: its logits, hidden states and value
            relations, each with its weight in the arguments. For the last two it has as many layers or more, and for
            hidden states the same width. It is frozen; where it shares weights with the model, a copy of it is. Or what
            such a model said about the rows of `train_dataset`, without value relations.
        **kwargs: As in Trainer.

    Raises:
        ValueError: Layers are out of range, the model has no expert layers, or the set-up does not allow pending layers.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable | None = None,
        *,
        teacher: PreTrainedModel | TeacherOutputs | None = None,
        **kwargs: Any,
    ) -> None:
        args = ShrpTrainingArguments("trainer_output") if args is None else args
        self._layers_to_convert: list[int] = []
        self._schedule: StageSchedule | None = None
        self._usage_dataset: Dataset | None = None
        check_lesson(args, teacher)
        if isinstance(teacher, TeacherOutputs):
            train_dataset = teacher.numbered(train_dataset)
        elif teacher is not None:
            teacher = own_teacher(teacher, model)
        self._trial_in_force: Any = None
        self._told_of_own_loss = False
        check_processes(args)
        if model is not None:
            model = self._with_expert_layers(model, args)
        if model_init is not None:
            init = model_init
            # Trainer looks at how many parameters it takes: none, or the trial.
            model_init = wraps(init)(lambda *trial: self._with_expert_layers(init(*trial), args))
        if train_dataset is not None and (bool(getattr(args, "num_requested_layers", False)) or _is_routed(model)):
            train_dataset, self._usage_dataset = hold_out(train_dataset, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            **kwargs,
        )
        warn_of_half_precision(self.model)
        # Stock heads take `**kwargs` and ignore `num_items_in_batch`, which inflates their gradients under accumulation.
        if not getattr(self.model, "accepts_loss_kwargs", False):
            self.model_accepts_loss_kwargs = False
        if self._layers_to_convert:
            self._check_parallelism()
        if isinstance(teacher, nn.Module):  # of a model that `model_init` made, nothing is known before
            teacher = own_teacher(teacher, self.model).to(self.args.device).eval().requires_grad_(False)
        self.teacher = teacher
        self._routing = RoutingLog({})
        self.add_callback(StageCallback(self))

    # --- conversion ---

    def _with_expert_layers(self, model: Any, args: TrainingArguments) -> Any:
        self._layers_to_convert = []
        if not isinstance(args, ShrpTrainingArguments) or not args.num_requested_layers:
            return model
        model = to_shrp(model)
        config = model.config
        layers = args.layers_to_convert(config.num_hidden_layers)
        self._layers_to_convert = [layer for layer in layers if layer not in config.expert_layers]
        new = [layer for layer in self._layers_to_convert if layer not in config.pending_layers]
        if new:
            config.experts_per_sequence = args.experts_per_sequence
            config.router_pooling = args.router_pooling
            set_seed(args.seed)  # the routers are drawn here, before Trainer seeds
            model.convert_layers_(new, pending=True)
        args.settle_stages_(len(self._layers_to_convert))
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in Trainer; in a hyperparameter search the trial's values are set first, for they may name the layers."""
        if trial is not None:
            self._hp_search_setup(trial)
        return super().call_model_init(trial)

    def _hp_search_setup(self, trial: Any) -> None:
        if trial is not None and trial is self._trial_in_force:
            return  # Trainer sets it up after the model
        is_ours = isinstance(self.args, ShrpTrainingArguments) and trial is not None
        if is_ours:
            self.args.forget_length_()
        super()._hp_search_setup(trial)
        self._trial_in_force = trial
        if is_ours:
            self.args.settle_stages_()
            if self.args.num_requested_layers and self._usage_dataset is None and self.train_dataset is not None:
                self.train_dataset, self._usage_dataset = hold_out(self.train_dataset, self.args)

    def _check_parallelism(self) -> None:
        if self.is_fsdp_enabled:
            raise ValueError(
                "`fsdp` cannot be used while layers are pending, because what runs changes under way. Convert under DDP, "
                "or at once with `from_pretrained(..., expert_layers=n)`."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"DataParallel over {self.args.n_gpu} GPUs cannot count usage: start with `accelerate launch` for one "
                "process per GPU, or show one GPU with CUDA_VISIBLE_DEVICES."
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = EpochSampler(sampler, data_seed(self.args), lambda: int(self.state.epoch or 0))
        return sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer; routers and expanders have a learning rate of their own where one is given."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = getattr(self.args, "expander_learning_rate", None)
        if is_new and rate is not None:
            fresh = {id(p) for m in self.model.modules() if isinstance(m, Router | Expander) for p in m.parameters()}
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if id(p) in fresh]
                if chosen:
                    group["params"] = [p for p in group["params"] if id(p) not in fresh]
                    optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """A constant (or `balance_lr_scheduler_type`) rate in stage "balance", then the usual decay in "specialise"."""
        if self.lr_scheduler is not None or not self._layers_to_convert:
            return super().create_scheduler(num_training_steps, optimizer)
        factor = rate_factor(self.args, self.args.schedule(self._layers_to_convert, num_training_steps))
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; once every layer is converted, the dense halves are dropped."""
        if self._layers_to_convert and self.model_init is None:
            self.args.settle_stages_(len(self._layers_to_convert))  # somebody may have set an argument since
        output = super().train(*args, **kwargs)
        model = self._shrp_model()
        if model is not None and model.config.pending_layers:
            waiting = sorted(set(model.config.pending_layers) - set(model.config.expert_layers))
            if waiting:
                logger.warning("Training ended before layers %s were converted; they stay pending.", waiting)
            else:
                model.finish_conversion_()
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        rates = {kind: getattr(self.args, f"{kind}_dropout", None) for kind in ("hidden", "attention", "classifier")}
        with dropout_rates(self.accelerator.unwrap_model(self.model), **rates):
            return super()._inner_training_loop(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self.teacher, TeacherOutputs) and ROW_COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW_COLUMN]

    def _save_checkpoint(self, *args: Any) -> None:
        with writing_to(self.args.output_dir):
            super()._save_checkpoint(*args)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and (Path(checkpoint_folder) / "config.json").exists():
            copy_code(Path(checkpoint_folder), Path(self.args.output_dir))  # Trainer takes config and weights alone
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer; the card of a Shrp model also says how it opens, and takes over the license of its base model."""
        model = self.accelerator.unwrap_model(self.model)
        is_shrp = isinstance(model, ShrpModelMixin)
        if is_shrp and len(args) < 2 and kwargs.get("license") is None:
            kwargs["license"] = license_of(model.config.name_or_path or "")
        super().create_model_card(*args, **kwargs)
        if is_shrp and self.is_world_process_zero():
            insert_loading_section(Path(self.args.output_dir, "README.md"), model, self.hub_model_id or "PATH_OR_REPO")

    def _shrp_model(self) -> PreTrainedModel | None:
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        return model if isinstance(model, ShrpModelMixin) else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Looks at the last stage only: before it, the least converted model would win."""
        if self._schedule is not None and self.state.global_step <= self._schedule.balance_steps:
            return False
        return super()._determine_best_metric(metrics, trial)

    # --- losses ---

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; says so once if a subclass computes the loss without ours."""
        self._computed_loss = False
        loss = super().training_step(*args, **kwargs)
        is_at_stake = self.teacher is not None or _is_routed(self._shrp_model())
        if is_at_stake and not self._computed_loss and not self._told_of_own_loss:
            self._told_of_own_loss = True
            logger.warning(
                "`%s.compute_loss` does not call ShrpTrainer's: the balance loss of routed layers (unless it is in the "
                "model's own loss), the teacher's terms and the routing logs are left out. Begin it with "
                "`super().compute_loss(...)`, or give the loss as `compute_loss_func`.",
                type(self).__name__,
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The task loss, plus in training the weighted balance loss and the teacher's terms."""
        self._computed_loss = True
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)  # label smoothing and own losses take the labels out
        inputs = {name: value for name, value in inputs.items() if name != ROW_COLUMN}
        wants_hidden = self.teacher is not None and self._weight("distillation_hidden_states") > 0
        if wants_hidden:
            inputs = {**inputs, "output_hidden_states": True}
        encoder = self.accelerator.unwrap_model(model)
        with self._recorded(encoder) as values:
            if self.teacher is not None and self.compute_loss_func is None and embedding_of(encoder) is not None:
                outputs = model(**inputs)  # the teacher's vectors need no labels
                loss = outputs["last_hidden_state"].new_zeros(())
            else:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        extra = torch.zeros_like(loss)
        balance, task = outputs.get("balance_loss"), outputs.get("task_loss")
        if balance is not None and task is None:
            # The labels were kept from the model (label smoothing, an own loss): its balance loss is not in the loss.
            extra = extra + self._shrp_model().config.router_aux_loss_coef * balance
        if self.teacher is not None:
            extra = extra + self._teacher_loss(given, outputs, wants_hidden, values)
        if self.compute_loss_func is not None:
            extra = extra / self.current_gradient_accumulation_steps  # Trainer divides only losses that it scaled itself
        task = loss if task is None else task
        if balance is not None:
            self._routing.add(task, balance, self._shrp_model().config.expert_layers, outputs.get("router_logits"))
        task_weight = self._weight("task_weight")  # 1 must leave an infinite loss infinite
        loss = loss + extra if task_weight == 1 else loss + (task_weight - 1) * task + extra
        return (loss, outputs) if return_outputs else loss

    def _weight(self, name: str) -> float:
        return getattr(self.args, name, getattr(ShrpTrainingArguments, name))

    def _recorded(self, model: nn.Module) -> AbstractContextManager[list[torch.Tensor]]:
        wants_values = self.teacher is not None and self._weight("distillation_value_relations") > 0
        return recorded_values(model) if wants_values else nullcontext([])

    def _teacher_loss(
        self, inputs: dict[str, Any], outputs: Any, wants_hidden: bool, values: list[torch.Tensor]
    ) -> torch.Tensor:
        mask, student = inputs.get("attention_mask"), self.accelerator.unwrap_model(self.model)
        unlabelled = {name: value for name, value in inputs.items() if name not in self.label_names}
        with torch.no_grad(), self._recorded(self.teacher) as taught_values:
            taught = self.teacher(**unlabelled, output_hidden_states=wants_hidden)
        loss = outputs_loss(student, inputs, outputs, taught, self._weight("distillation_temperature"))
        loss = self._weight("distillation_logits") * loss
        if wants_hidden:
            hidden = hidden_states_loss(outputs.hidden_states, taught.hidden_states, mask)
            loss = loss + self._weight("distillation_hidden_states") * hidden
        if values:
            relations = value_relations_loss(values, taught_values, mask)
            loss = loss + self._weight("distillation_value_relations") * relations
        return loss

    # --- logging ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; training logs also carry stage, task and balance loss and, per routed layer, usage and entropy."""
        if "loss" in logs and self._routing:
            stage = "specialise" if self._schedule is None else self._schedule.stage(self.state.global_step - 1)
            logs = {**logs, **self._routing.entry(stage, self._shrp_model().usage(), self.args.world_size)}
        super().log(logs, start_time)

    # --- usage ---

    def usage_plan(self, dataset: Any = None, keep: int = 1, scope: str = "layer") -> KeepPlan:
        """Counts how often each expert is used, and keeps the most used.

        Args:
            dataset: What to count on. None: the slice of the training set that was held out for it, never `eval_dataset`.
            keep: Experts per expert layer.
            scope: "layer", or "model" for the same number in all wherever they are used most.

        Returns:
            A plan for `trainer.model.prune_heads`; the counts are also in the model (`model.usage()`).

        Raises:
            ValueError: Nothing was held out, or see `plan_by_usage`.
        """
        model = self._shrp_model()
        if model is None or not model.config.routed or not model.config.expert_layers:
            raise ValueError("The model has no routed expert layers: convert some with `num_expert_layers`.")
        if dataset is None and self._usage_dataset is None:
            raise ValueError(
                "`usage_plan()` counts on a slice held out of `train_dataset`, but there is none (no training set, or one "
                "without a length): give `usage_plan(dataset)` data that is not what you report on."
            )
        counts = self.count_usage(self._usage_dataset if dataset is None else dataset)
        return plan_by_usage(model, counts, keep, scope)

    def count_usage(self, dataset: Any) -> dict[int, list[int]]:
        """Counts each sequence of `dataset` once, over all processes, and stores the counts in the model.

        Args:
            dataset: Rows with a length, of which each process takes its share.

        Returns:
            Layer index -> number of sequences per expert (with Top-k, each sequence counts for k experts).

        Raises:
            ValueError: `dataset` has no length.
        """
        if not hasattr(dataset, "__len__"):
            raise ValueError(f"`dataset` must have a length to be counted once, got {type(dataset).__name__}.")
        model = self._shrp_model()
        rank, world = self.args.process_index, self.args.world_size
        # Trainer's own loaders repeat sequences until the processes have equal shares, which would count them twice.
        share = Subset(dataset, range(rank, len(dataset), world))
        loader = DataLoader(
            share,
            batch_size=self.args.eval_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="usage"),
        )
        total = torch.zeros(len(model.config.expert_layers), model.config.num_attention_heads, device=self.args.device)
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs in loader:
                inputs = {k: v for k, v in self._prepare_inputs(inputs).items() if k not in (*self.label_names, ROW_COLUMN)}
                for row, logits in zip(total, model(**inputs).router_logits, strict=True):
                    chosen = logits.topk(model.config.experts_per_sequence, dim=-1).indices.flatten()
                    row += torch.bincount(chosen, minlength=len(row))
        model.train(was_training)
        total = sum_over_processes(total).to(torch.int64)
        for layer, counts in zip(model.config.expert_layers, total, strict=True):
            model.layers[layer].router.usage.copy_(counts)
        return model.usage()


def _is_routed(model: Any) -> bool:
    return isinstance(model, ShrpModelMixin) and model.config.is_routed
