"""What ShrpTrainer logs of routing: losses, usage and entropy since the last log, and a warning where it collapsed."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch

from shrp_hf.models.expert_layer import sum_over_processes

logger = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.9


class RoutingLog:
    """Gathers what routed batches say, and turns it into one entry of the training log.

    Args:
        usage: What `model.usage()` counted so far; only what comes after it is logged.
    """

    def __init__(self, usage: Mapping[int, Sequence[int]]) -> None:
        self.usage = usage
        self._losses: list[torch.Tensor] = []
        self._entropies: dict[int, list[torch.Tensor]] = {}
        self._reported: set[tuple[str, int]] = set()

    def __bool__(self) -> bool:
        return bool(self._losses)

    def add(
        self, task: torch.Tensor, balance: torch.Tensor, layers: Sequence[int], router_logits: Sequence[torch.Tensor]
    ) -> None:
        """Takes in a batch: its two losses (scalars) and, per routed layer, the router's logits (batch, experts)."""
        self._losses.append(torch.stack([task.detach().float(), balance.detach().float()]))
        for layer, logits in zip(layers, router_logits, strict=True):
            log_p = logits.detach().float().log_softmax(dim=-1)
            entropy = -(log_p.exp() * log_p).sum(dim=-1).mean() / math.log(max(2, logits.shape[-1]))  # a single expert: 0
            self._entropies.setdefault(layer, []).append(entropy)

    def entry(self, stage: str, usage: Mapping[int, Sequence[int]], world_size: int) -> dict[str, float]:
        """Returns the means over all processes since the last entry, and begins the next.

        Args:
            stage: "balance" or "specialise".
            usage: `model.usage()` as it is now.
            world_size: Number of processes.
        """
        losses = torch.stack(self._losses).mean(dim=0)
        entropies = torch.stack([torch.stack(values).mean() for values in self._entropies.values()])
        mean = (sum_over_processes(torch.cat([losses, entropies])) / world_size).tolist()
        logs = {"stage": {"balance": 1, "specialise": 2}[stage], "task_loss": mean[0], "balance_loss": mean[1]}
        for layer, entropy in zip(self._entropies, mean[2:], strict=True):
            before = self.usage.get(layer, [0] * len(usage[layer]))
            counts = [max(0, now - then) for now, then in zip(usage[layer], before, strict=True)]
            share = max(counts) / max(1, sum(counts))
            logs[f"usage_max/layer_{layer}"] = round(share, 4)
            logs[f"routing_entropy/layer_{layer}"] = round(entropy, 4)
            self._report_collapse(stage, layer, counts, share)
        self._losses, self._entropies, self.usage = [], {}, usage
        return logs

    def _report_collapse(self, stage: str, layer: int, counts: list[int], share: float) -> None:
        too_few = len(counts) < 2 or sum(counts) < 2 * len(counts)  # experts to choose from, sequences to judge by
        if share < COLLAPSE_SHARE or too_few or (stage, layer) in self._reported:
            return
        self._reported.add((stage, layer))
        expert = counts.index(max(counts))
        if stage == "balance":
            logger.warning(
                "Routing of layer %d collapsed: expert %d takes %.0f%% of the sequences in stage balance. Raise "
                "`balance_coef`, lower the learning rate, or give `balance_epochs_per_layer` more.",
                layer, expert, 100 * share,
            )  # fmt: skip
        else:
            logger.warning(
                "Expert %d of layer %d takes %.0f%% of the sequences in stage specialise: keeping one expert loses little "
                "there. If several are to stay, raise `balance_coef` or shorten stage specialise.",
                expert, layer, 100 * share,
            )  # fmt: skip
