"""Replicas that train alone, talk now and then, and are merged once at the end.

Source: Zhu et al. 2025, "On the Surprising Effectiveness of a Single Global Merging in Decentralized
Learning", arXiv 2507.06542; authors' code (Raiden-Zhu/ICLR-2026-Grokking-in-Decentralized-Learning, MIT) for
the defaults. Each of N nodes makes k local steps, then a round of gossip theta_i <- sum_j W_ij theta_j with a
sparse doubly stochastic W, and after the last step theta = (1/N) sum_i theta_i with statistics of batch norms
taken anew.

Differs from the paper:
- A round's pairs are a random matching of the nodes, of which each pair talks with probability `comm_prob`:
  both then hold their mean, so that the mean over all nodes stays. The code draws a neighbor for each node.
- The code's reference run has both, gossip by chance and a dense window late; here a run has one of them.
- Statistics of batch norms can also be pooled, or averaged, where no data are at hand.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.batch_norm import MEAN, VARIANCE, batch_norms
from ..core.checks import check, check_choice
from ._base import Neutral, Run, register_callback
from ._local_updates import LocalUpdatesCallback, finite, mean_of_pair, mean_over_processes
from ._recalibration import recalibrate

__all__ = ["LocalTrainCallback", "gossip_pairs", "mixing_matrix"]

SCHEDULES = ("none", "constant", "late_window")
WINDOW = (0.9, 0.05)


def gossip_pairs(nodes: int, round_number: int, probability: float, seed: int = 0) -> list[tuple[int, int]]:
    """Return the pairs of nodes that talk in a round: a part of a random matching, no node twice.

    Args:
        nodes: Number of nodes.
        round_number: The round; the same arguments give the same pairs on every node.
        probability: Chance of each pair of the matching.
        seed: Of the draws.
    """
    draw = random.Random(f"{seed}:{round_number}")
    order = draw.sample(range(nodes), nodes)
    matching = list(zip(order[::2], order[1::2], strict=False))  # of an odd number one is left out
    return [pair for pair in matching if draw.random() < probability]


def mixing_matrix(nodes: int, pairs: list[tuple[int, int]]) -> Tensor:
    """Return the matrix W of a round, (nodes, nodes): 1/2 within a pair, 1 for a node that stays alone."""
    matrix = torch.eye(nodes, dtype=torch.float64)
    for a, b in pairs:
        matrix[[a, a, b, b], [a, b, a, b]] = 0.5
    return matrix


@register_callback(
    "local_train",
    summary="replicas that train alone, gossip by a schedule, and are merged once at the end",
    paper="arXiv:2507.06542",
    supports={"local_updates"},
    neutral=Neutral(settings={"local_steps": 3}, arguments={}),
    test_kwargs={"local_steps": 2, "comm_prob": 0.5, "reset_inner": True, "final_merge": True},
    bad_kwargs=(
        {"local_steps": 0},
        {"comm_schedule": "often"},
        {"comm_prob": 1.5},
        {"comm_schedule": "none", "comm_prob": 0.5},
        {"late_window": [0.5, 0.1]},
        {"comm_schedule": "late_window", "late_window": [0.9]},
        {"comm_schedule": "late_window", "late_window": [1.0, 0.1]},
        {"comm_schedule": "late_window", "late_window": [0.5, 0.0]},
        {"bn": "batch"},
        {"bn_batches": 0},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class LocalTrainCallback(LocalUpdatesCallback):
    """Train apart on each process, talk in pairs now and then, and leave the mean of all in the model.

    The merge is made after the last update, before the last evaluation and the last save. Until then each
    process evaluates its own weights on its share of the rows, and checkpoints hold those of the first
    process, with each one's own beside them. On one process a run is that without the callback, to the bit.

    In a checkpoint, for each process: its weights, its statistics of batch norms and its optimizer's state.
    Resuming needs as many processes.

    Args:
        local_steps: Optimizer steps of a round, after which processes may talk, at least 1.
        comm_schedule: "constant": each pair talks with probability `comm_prob` after every round;
            "late_window": all take their mean after each round that ends within `late_window`; "none".
        comm_prob: Chance of a pair to talk in a round, in [0, 1].
        late_window: Start and length of the window as shares of the run; None for [0.9, 0.05].
        final_merge: Whether the mean of all replicas takes their place at the end; without it the model is
            the first process's.
        bn: Running statistics of batch norms after the merge: "recalibrate" takes them anew from the training
            data, "pool" those of the mixture of the replicas' inputs, "average" the mean of the variances.
        bn_batches: Batches of the evaluation's size on each process that "recalibrate" sees.
        seed: Of the pairs; the same on all processes.
        allow_different_init: Whether replicas may start from different weights, whose mean is no model. DDP
            has given all of them the first process's when a run begins, whatever was loaded: this is about
            what has changed weights or buffers since.
    """

    local_steps: int = 100
    comm_schedule: str = "constant"
    comm_prob: float = 0.2
    late_window: list[float] | None = None
    final_merge: bool = True
    bn: str = "recalibrate"
    bn_batches: int = 100
    seed: int = 0
    allow_different_init: bool = False

    def validate(self) -> None:
        """Check the settings."""
        super().validate()
        check_choice("comm_schedule", self.comm_schedule, SCHEDULES)
        check(0.0 <= self.comm_prob <= 1.0, "comm_prob", self.comm_prob, "in [0, 1]")
        chosen = f"left out for comm_schedule={self.comm_schedule!r}"
        constant = self.comm_schedule == "constant"
        check(constant or self.comm_prob == 0.2, "comm_prob", self.comm_prob, chosen)
        if self.late_window is not None:
            window = self.late_window = list(self.late_window)
            check(self.comm_schedule == "late_window", "late_window", window, chosen)
            rule = "a start in [0, 1) and a length in (0, 1]"
            check(len(window) == 2, "late_window", window, rule)
            check(0.0 <= window[0] < 1.0 and 0.0 < window[1] <= 1.0, "late_window", window, rule)
        check_choice("bn", self.bn, ("recalibrate", "pool", "average"))
        check(self.bn_batches >= 1, "bn_batches", self.bn_batches, "at least 1")

    def needs_anchor(self) -> bool:
        """Return False: replicas do not look back."""
        return False

    def stays_apart(self) -> bool:
        """Return True: most rounds end without a word."""
        return True

    # The run --------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self.exchanges = 0  # pairs that have talked; a dense round counts as all nodes' pairs
        self._merged = False
        self._model: Any = None

    def begin(self, run: Run) -> None:
        """Look whether the run can be merged in the end.

        Raises:
            ValueError: Replicas start from different weights, no round ends in the window, the model is
                sharded, or the best checkpoint would be loaded in the merge's place.
        """
        fresh = not (self.rounds or self.in_round)
        super().begin(run)
        self._model = run.model
        steps = run.state.max_steps
        if self.comm_schedule == "late_window":
            ends = [*range(self.local_steps, steps + 1, self.local_steps)]
            rule = f"one that some round of {self.local_steps} steps ends in"
            found = any(self._in_window(end / steps) for end in ends)
            check(found, "late_window", list(self._window), rule, where=f"{steps} steps")
        if not dist.is_distributed():
            return
        if self.final_merge:
            best = bool(run.args.load_best_model_at_end)
            rule = "False with final_merge: it would load one replica's weights"
            check(not best, "load_best_model_at_end", best, rule)
        if fresh and not self.allow_different_init:
            alike = len(set(dist.gather_objects(fingerprint(run.model)))) == 1
            rule = "True where replicas start from different weights, whose mean is no model"
            check(alike, "allow_different_init", False, rule)

    def undo(self) -> None:
        """Let the model go."""
        super().undo()
        self._model = None

    @property
    def _window(self) -> tuple[float, float]:
        start, length = self.late_window or WINDOW
        return start, length

    def _in_window(self, share: float) -> bool:
        start, length = self._window
        return start <= share <= start + length + 1e-9

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Talk after the round's last update, and merge after the run's."""
        self._merged = False
        super().on_step_end(args, state, control, **kwargs)

    def finish(self, run: Run) -> None:
        """Merge, where nothing said before that an update was the last."""
        if self.final_merge and not self._merged and dist.is_distributed():
            self._merge()

    # Exchanges ------------------------------------------------------------------------------------

    def exchange(self, whole: bool, share: float, last: bool) -> None:
        """Merge at the run's end; else talk as the schedule says."""
        if not dist.is_distributed():
            return
        nodes = dist.world_size()
        if last and self.final_merge:
            self._merge()
        elif not whole or self.comm_schedule == "none":
            return
        elif self.comm_schedule == "constant":
            pairs = gossip_pairs(nodes, self.rounds, self.comm_prob, self.seed)
            self.exchanges += len(pairs)
            for pair in pairs:
                if dist.rank() in pair:
                    self._talk(pair[1 - pair.index(dist.rank())])
        elif self._in_window(share):
            self.exchanges += nodes * (nodes - 1) // 2
            self._take(mean_over_processes(self._carried()))

    def _carried(self) -> dict[str, Tensor]:
        """Return copies of what moves with the model, fp32: weights, and statistics of batch norms."""
        found = {name: b for name, b in self.statistics().items() if b.is_floating_point()}
        return self.current() | {name: b.to(torch.float32, copy=True) for name, b in found.items()}

    def _talk(self, partner: int) -> None:
        self._take(mean_of_pair(self._carried(), partner))

    def _take(self, values: Mapping[str, Tensor]) -> None:
        # A mean that is not finite is seen by all that it is of: they go on alone.
        if not finite(values):
            self.failures += 1
            return
        with torch.no_grad():
            for name, target in (self._trained | self.statistics()).items():
                if name in values:
                    target.copy_(values[name])

    def _merge(self) -> None:
        """Put the mean of all replicas in their place (a collective)."""
        norms = batch_norms(self._model)
        values = self._carried()
        spreads = [f"{name}.{VARIANCE}" for name in norms] if self.bn == "pool" else []
        means = {name: name.removesuffix(VARIANCE) + MEAN for name in spreads}
        for name, mean in means.items():
            values[name] += values[mean] ** 2
        values = mean_over_processes(values)
        for name, mean in means.items():
            values[name] = (values[name] - values[mean] ** 2).clamp_(min=0.0)
        if not finite(values):
            raise ValueError(
                f"{self.info.name}: the mean of the replicas is not finite: one of them has diverged; a "
                "lower learning_rate may help"
            )
        self._take(values)
        for name, buffer in self._model.named_buffers():
            if name not in values:
                dist.broadcast_(buffer)
        if self.bn == "recalibrate" and norms:
            recalibrate(self.trainer, self._model, self.bn_batches)
        self._merged = True

    # State ----------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Return the rounds that have ended, and the pairs that have talked."""
        return {"rounds": float(self.rounds), "exchanges": float(self.exchanges)}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts too."""
        return {**super().state_dict(), "exchanges": self.exchanges, "merged": self._merged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.exchanges, self._merged = state["exchanges"], state["merged"]


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the bits of a model's parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
