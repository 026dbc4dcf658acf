"""Trains the models of `screen_model` by one recipe, from precomputed teacher outputs, on a GPU as CUDA graphs."""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from experiments.screen_model import Dropout, Encoder

LENGTHS = (16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Recipe:
    """How a student is trained. What is left out of `RECIPE` changes is as in `shrp_hf.training.recipes.Recipe`."""

    epochs: float = 5.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    new_learning_rate: float = 2e-3
    schedule: str = "linear"
    warmup: float = 20.0
    weight_decay: float = 0.0
    dropout: Dropout = Dropout()
    task: float = 1.0
    logits: float = 1.0
    temperature: float = 2.0
    hidden_states: float = 1.0
    value_relations: float = 0.0
    followed: str = "all"
    warm: bool = True
    stepwise: bool = False
    early_stopping: bool = False
    augmentation: str = ""


@dataclass
class Rows:
    """Tokenised rows of a split on the device, padded.

    Args:
        ids: Shape (rows, length).
        types: Token types, the same shape.
        lengths: Shape (rows,).
        labels: Shape (rows,); below -99 where a row has none.
    """

    ids: torch.Tensor
    types: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: torch.Tensor | slice) -> "Rows":
        return Rows(self.ids[index], self.types[index], self.lengths[index], self.labels[index])

    def batch(self, index: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Ids, types, mask and labels of the rows `index`, cut to `length`."""
        mask = torch.arange(length, device=index.device) < self.lengths[index][:, None]
        ids, types = self.ids[index, :length].long(), self.types[index, :length].long()
        return {"ids": ids, "types": types, "mask": mask, "labels": self.labels[index]}

    def batches(self, size: int) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """All rows in batches of like length, with their indices."""
        order = self.lengths.argsort()
        return [(index, self.batch(index, int(self.lengths[index].max()))) for index in order.split(size)]


def joined(first: Rows, second: Rows) -> Rows:
    """The rows of both."""
    return Rows(*(torch.cat([getattr(first, n), getattr(second, n)]) for n in ("ids", "types", "lengths", "labels")))


@dataclass
class Taught:
    """What the teacher says about rows: logits (rows, labels); hidden states (all real tokens, layers + 1, width), packed."""

    logits: torch.Tensor
    hidden: torch.Tensor
    offsets: torch.Tensor


@torch.no_grad()
def teach(teacher: Encoder, rows: Rows) -> Taught:
    """Runs the teacher once over all rows, without dropout."""
    teacher.eval()
    device = rows.ids.device
    offsets = rows.lengths.cumsum(0) - rows.lengths
    width, layers = teacher.word.weight.shape[1], len(teacher.layers) + 1
    kind = torch.float16 if device.type == "cuda" else torch.float32
    hidden = torch.empty(int(rows.lengths.sum()), layers, width, dtype=kind, device=device)
    logits = torch.empty(len(rows), teacher.classifier.out_features, device=device)
    for index, batch in rows.batches(128):
        out, states, _ = teacher(batch["ids"], batch["types"], batch["mask"], Dropout())
        logits[index] = out
        places = offsets[index][:, None] + torch.arange(batch["ids"].shape[1], device=device)
        hidden[places[batch["mask"]]] = torch.stack(states, dim=2)[batch["mask"]].to(kind)
    return Taught(logits, hidden, offsets)


def task_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each row; 0 where it has no label."""
    known = labels > -99
    if logits.shape[1] == 1:
        return (logits[:, 0] - labels).square() * known
    return functional.cross_entropy(logits, labels.long().clamp(min=0), reduction="none") * known


def _relations(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = values @ values.transpose(1, 2) / math.sqrt(values.shape[-1])
    return scores.masked_fill(~mask[:, None, :], torch.finfo(scores.dtype).min).log_softmax(dim=-1)


class Lesson:
    """The loss of a student on a batch, as `ShrpTrainer` has it, the teacher's outputs looked up.

    Args:
        rows: What is trained on.
        taught: What the teacher says about them.
        teacher: Its value projections.
        recipe: Weights of the terms.
    """

    def __init__(self, rows: Rows, taught: Taught, teacher: Encoder, recipe: Recipe) -> None:
        self.rows, self.taught, self.teacher, self.recipe = rows, taught, teacher, recipe

    def loss(self, student: Encoder, index: torch.Tensor, length: int) -> torch.Tensor:
        """The loss on the rows `index`, cut to `length` tokens."""
        recipe, batch = self.recipe, self.rows.batch(index, length)
        mask = batch["mask"]
        logits, hidden, values = student(batch["ids"], batch["types"], mask, recipe.dropout)
        known = (batch["labels"] > -99).sum().clamp(min=1)
        loss = recipe.task * task_losses(logits, batch["labels"]).sum() / known
        if recipe.logits:
            loss = loss + recipe.logits * self._logits(logits, self.taught.logits[index])
        if recipe.hidden_states or recipe.value_relations:
            places = self.taught.offsets[index][:, None] + torch.arange(length, device=index.device)
            wanted = self.taught.hidden[places.clamp(max=len(self.taught.hidden) - 1)].float()
            weights = mask / mask.sum()
            if recipe.hidden_states:
                loss = loss + recipe.hidden_states * self._hidden(hidden, wanted, weights)
            if recipe.value_relations:
                loss = loss + recipe.value_relations * self._relations(values, wanted, mask, weights)
        return loss

    def _logits(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] == 1:
            return functional.mse_loss(logits, wanted)
        t = self.recipe.temperature
        log_p, log_q = (logits / t).log_softmax(dim=-1), (wanted / t).log_softmax(dim=-1)
        return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * t**2

    def _hidden(self, hidden: list[torch.Tensor], wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        layers = {
            "all": range(1, len(hidden)),
            "embeddings too": range(len(hidden)),
            "last": [len(hidden) - 1],
            "every second": range(2, len(hidden), 2),
        }[self.recipe.followed]
        # As `shrp_hf.training.distillation.taught_by`: evenly spaced where the student has fewer layers.
        theirs = [-(-i * (wanted.shape[2] - 1) // (len(hidden) - 1)) for i in layers]
        ours, wanted = torch.stack([hidden[i] for i in layers], dim=2), torch.stack([wanted[:, :, i] for i in theirs], dim=2)
        errors = (ours - wanted).square().mean(dim=(2, 3))
        return (errors * weights).sum()

    def _relations(
        self, values: list[torch.Tensor], wanted: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        losses = []
        for i, value in enumerate(values):
            layer = self.teacher.layers[i]
            with torch.no_grad():
                log_q = _relations(functional.linear(wanted[:, :, i], layer.value.weight, layer.value.bias), mask)
            log_p = _relations(value, mask)
            losses.append(((log_q.exp() * (log_q - log_p)).sum(dim=-1) * weights).sum())
        return torch.stack(losses).mean()


def factor(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of a step as a share of the highest."""
    warmup = recipe.warmup * total if recipe.warmup < 1 else recipe.warmup
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"linear": 1 - done, "constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[recipe.schedule]


def epoch_order(rows: Rows, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of an epoch, shape (steps, batch size): batches of like length, from 50 batches at a time, in random order."""
    order = torch.randperm(len(rows), generator=generator)
    lengths = rows.lengths.cpu()
    parts = [part[lengths[part].argsort(descending=True)] for part in order.split(50 * batch_size)]
    batches = torch.cat(parts)[: len(rows) // batch_size * batch_size].view(-1, batch_size)
    return batches[torch.randperm(len(batches), generator=generator)]


class Steps:
    """One optimizer step on a batch; on a GPU, captured as a CUDA graph for each length."""

    def __init__(self, student: Encoder, lesson: Lesson, recipe: Recipe, total: int) -> None:
        self.student, self.lesson, self.recipe = student, lesson, recipe
        self.device = student.word.weight.device
        self.on_gpu = self.device.type == "cuda"
        self.index = torch.zeros(recipe.batch_size, dtype=torch.long, device=self.device)
        # Warming up a graph runs past the last step, and is undone.
        factors = [factor(recipe, step, total) for step in range(total)] + [0.0] * 4
        self.factors = torch.tensor(factors, device=self.device)
        self.done = torch.zeros(1, dtype=torch.long, device=self.device)
        new = [p for n, p in student.named_parameters() if "expander" in n]
        is_new = {id(p) for p in new}
        old = [p for p in student.parameters() if id(p) not in is_new]
        self.peaks = [recipe.learning_rate, recipe.new_learning_rate]
        groups = [{"params": old}] + [{"params": new}] * bool(new)
        for group in groups:
            group["lr"] = torch.zeros((), device=self.device) if self.on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=recipe.weight_decay, capturable=self.on_gpu, fused=self.on_gpu or None
        )
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        # One stream for all: the allocator keeps what is free for each stream apart.
        self.pool, self.stream = (torch.cuda.graph_pool_handle(), torch.cuda.Stream()) if self.on_gpu else (None, None)

    def step(self, index: torch.Tensor, length: int) -> None:
        """Does a step on the rows `index`."""
        self.index.copy_(index)
        length = min(next((bucket for bucket in LENGTHS if bucket >= length), length), self.lesson.rows.ids.shape[1])
        if not self.on_gpu:
            self._step(length)
            return
        key = (self.student.num_waiting, length)
        if key not in self.graphs:
            self.graphs[key] = self._captured(length)
        self.graphs[key].replay()

    def _step(self, length: int) -> None:
        for parameter in self.student.parameters():
            parameter.grad = None
        loss = self.lesson.loss(self.student, self.index, length)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.student.parameters() if p.grad is not None], 1.0)
        share = self.factors[self.done]
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=False):
            if self.on_gpu:
                group["lr"].copy_((share * peak).squeeze(0))
            else:
                group["lr"] = float(share) * peak
        self.optimizer.step()
        self.done += 1

    def _captured(self, length: int) -> torch.cuda.CUDAGraph:
        """Captures a step; what warming up changes is set back."""
        if not self.graphs or self.student.before:
            kept = [p.detach().clone() for p in self.student.parameters()]
            done = self.done.clone()
            states = {p: {k: v.clone() for k, v in s.items()} for p, s in self.optimizer.state.items()}
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    self._step(length)
            torch.cuda.current_stream().wait_stream(self.stream)
            with torch.no_grad():
                for parameter, value in zip(self.student.parameters(), kept, strict=True):
                    parameter.copy_(value)
                    for name, tensor in self.optimizer.state.get(parameter, {}).items():
                        before = states.get(parameter, {}).get(name)
                        tensor.zero_() if before is None else tensor.copy_(before)
                self.done.copy_(done)
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        gc.disable()  # what is freed during a capture would end it
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self._step(length)
            graph.capture_end()
        gc.enable()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph


def train(
    student: Encoder, lesson: Lesson, recipe: Recipe, seed: int, evaluate: Callable[[], Mapping[str, float]]
) -> dict[str, float]:
    """Trains `student` in place by `recipe`; returns what `evaluate` says in the end, or at the best epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = lesson.rows
    per_epoch = len(rows) // recipe.batch_size
    total = max(1, round(recipe.epochs * per_epoch))
    steps, best, done = Steps(student, lesson, recipe, total), None, 0
    lengths = rows.lengths.cpu()
    waits = student.num_waiting
    student.train()
    while done < total:
        order = epoch_order(rows, recipe.batch_size, generator)[: total - done]
        longest = lengths[order].amax(dim=1).tolist()
        for index, length in zip(order.to(steps.device), longest, strict=True):
            if waits:  # the last layer first; all of them after half of the steps
                student.num_waiting = max(0, waits - 1 - int(done / (total / 2) * waits))
            steps.step(index, length)
            done += 1
        if recipe.early_stopping or done >= total:
            student.eval()
            found = dict(evaluate())
            student.train()
            if best is None or found["held_out"] > best["held_out"] or not recipe.early_stopping:
                best = found
    return {**best, "steps": total}
