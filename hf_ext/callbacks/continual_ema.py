"""Continual EMA: an average of the trained weights, paced by gradients, for one task after another.

Source: Qiao et al. 2025, "Large Continual Instruction Assistant", arXiv 2410.10868, and its code. For each
trainable tensor, with w_t its value after update t, w*_t the average, g_t the gradient of update t and |.|
the sum of magnitudes: alpha_t = 2 (1 + |g_t|) / (|w_t - w*_{t-1}| |g_t - g_{t-1}|), or 0.01 where that is not
in (0, 1); w*_t = (1 - alpha_t) w*_{t-1} + alpha_t w_t. At the end of a task the average takes the weights'
place.

Differs from the paper:
- The paper derives a weight of the old average, (L' + 1) / ((w_t - w*_{t-1}) L''); its code has the form
  above as the weight of the new weights. This follows the code; `role="old"` is the paper's reading.
- The average starts from the weights before the first update, the former task's; the code's `init="after"`
  takes those after it.
- An update with gradients or weights that are not finite leaves the average as it was.
- `scope="global"` sums over all tensors for one coefficient; `coefficient` may be a constant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.checks import check, check_choice
from ..core.devices import stacked
from ._averaged_weights import AVERAGE, LARGE, AveragedWeightsCallback, copied, local
from ._base import Neutral, Run, register_callback
from ._gradients import steps_in_backward
from ._task_router import TfidfRouter

__all__ = ["ContinualEMACallback", "TfidfRouter", "ema_coefficient"]

GRADIENT = "gradient."
COMPARED_EVERY = 1000  # updates
_BLOCK = 1 << 18  # elements; large temporaries cost a CPU more than what is computed with them
_SMALL = 1 << 14  # elements up to which a call costs a CPU more than what it computes
_TOGETHER = 1 << 26  # elements whose differences an accelerator holds at once


def ema_coefficient(
    distance: float, gradient: float, change: float, *, factor: float = 2.0, role: str = "new"
) -> float | None:
    """Return the weight of the new weights in the average, or None where the form gives none in (0, 1).

    Args:
        distance: |w_t - w*_{t-1}|, sum of magnitudes.
        gradient: |g_t|.
        change: |g_t - g_{t-1}|.
        factor: Number in front, above 0.
        role: "new" where the form is the weight of the new weights, "old" where it is that of the average.
    """
    below = distance * change
    value = factor * (1.0 + gradient) / below if below > 0.0 else math.inf
    if not 0.0 < value < 1.0:
        return None
    return value if role == "new" else 1.0 - value


@register_callback(
    "continual_ema",
    summary="average of the weights along a task, paced by gradients, against forgetting former tasks",
    paper="arXiv:2410.10868",
    neutral=Neutral(settings={"replace_weights": False}, arguments={}),
    test_kwargs={"fallback": 0.2},
    bad_kwargs=(
        {"coefficient": "fast"},
        {"coefficient": 0.0},
        {"coefficient": 1.0},
        {"fallback": 0.0},
        {"fallback": 1.0},
        {"factor": 0.0},
        {"role": "old", "factor": 3.0},
        {"scope": "layer"},
        {"role": "both"},
        {"init": "never"},
        {"params": "("},
        {"best_from": "ema"},
        {"use_for_eval": False, "best_from": "average"},
        {"replace_weights": False, "best_from": "average"},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class ContinualEMACallback(AveragedWeightsCallback):
    """Average the trained weights along a task, and leave the average in the model when the task is done.

    Training itself is not changed: the average never feeds back, and checkpoints hold the raw weights, from
    which a run resumes. Evaluations during the run are of the average, which needs `hf_ext.attach`. After an
    exception the model has the raw weights. For the next task make a new trainer from the saved model.

    In a checkpoint: the average and the last gradient of each trained tensor, fp32. The same two buffers are
    the cost in memory.

    Args:
        coefficient: "auto", or a constant weight of the new weights, in (0, 1).
        fallback: Weight where "auto" gives none in (0, 1); itself in (0, 1).
        factor: Number in front of the coefficient, above 0; for role "new".
        scope: "tensor" for a coefficient of each tensor, or "global" for one of all.
        role: "new" as in the authors' code, or "old" as in the paper's text; experimental.
        init: "before" to start from the weights before the first update, or "after" from those after it.
        params: Pattern that is searched for in the names of the tensors to average; None for all that train.
        use_for_eval: Whether evaluations during the run are of the average.
        replace_weights: Whether the average is in the model after the run.
        best_from: With `load_best_model_at_end`: "average" for the average of the checkpoint whose evaluation
            was the best, or "raw" for what the Trainer loads, which needs both settings above to be False.
    """

    coefficient: str | float = "auto"
    fallback: float = 0.01
    factor: float = 2.0
    scope: str = "tensor"
    role: str = "new"
    init: str = "before"

    def validate(self) -> None:
        """Check the settings."""
        constant = self.coefficient
        proper = constant == "auto" if isinstance(constant, str) else 0.0 < constant < 1.0
        check(proper, "coefficient", constant, "'auto', or a number in (0, 1)")
        check(0.0 < self.fallback < 1.0, "fallback", self.fallback, "in (0, 1)")
        check(self.factor > 0.0, "factor", self.factor, "above 0")
        check_choice("scope", self.scope, ("tensor", "global"))
        check_choice("role", self.role, ("new", "old"))
        check(self.role == "new" or self.factor == 2.0, "factor", self.factor, "left out for role='old'")
        check_choice("init", self.init, ("before", "after"))
        super().validate()

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self._gradient: dict[str, Tensor] = {}
        self._room = torch.empty(_BLOCK, dtype=torch.float32, device="cpu")
        self._rooms: dict[torch.Size, Tensor] = {}  # the same, in the shapes that have been asked for
        self._updates = 0
        self._adaptive, self._decided = 0, 0
        self._alpha = 0.0

    # The run --------------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        """Start the average, or take the checkpoint's.

        Raises:
            ValueError: Weights or gradients cannot be seen here, no tensor is averaged, the best checkpoint
                would be loaded at the end, or the checkpoint is of other tensors.
        """
        super().begin(run)
        rule = "one that steps after the backward pass: an average needs the gradient of each update"
        check(not steps_in_backward(run.optimizer_name), "optim", run.optimizer_name, rule)
        found = self._trained()
        size = sum(8 * local(parameter).numel() for parameter in found.values())
        if size >= LARGE and not self._saved:
            warnings.warn(
                f"continual_ema keeps two fp32 copies of each trained tensor: {size / 2**30:.1f} GiB",
                stacklevel=2,
            )
        if self._saved is not None:
            self.take_average(self._saved)
            self._gradient = self.scattered(GRADIENT, self._saved)
            self._saved = None
        elif self.init == "before":
            self._average = {name: copied(parameter) for name, parameter in found.items()}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the average, unless the update was skipped (an overflow in fp16)."""
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        found = self._stepped(kwargs["optimizer"])
        new = [name for name in found if name not in self._average]
        for name in new:  # the first update with init="after", or a tensor that was made trainable
            self._average[name] = copied(found[name])
        moved = {name: p for name, p in found.items() if p.grad is not None}
        if not moved:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            rule = "one that leaves gradients in their place: none has been there yet"
            check(self._updates > 0, "optim", type(optimizer).__name__, rule)
            return
        by_mesh: dict[Any, list[str]] = {}
        for name, parameter in moved.items():
            by_mesh.setdefault(_mesh(parameter), []).append(name)
        gradients = {name: _grad(parameter) for name, parameter in moved.items()}
        if list(by_mesh) != [None]:
            moved = {name: local(parameter) for name, parameter in moved.items()}
            gradients = {name: local(gradient) for name, gradient in gradients.items()}
        sums = self._sums(by_mesh, moved, gradients)
        # A sum that is not finite would spread to all that follows.
        if not all(math.isfinite(distance + size) for distance, size, _ in sums.values()):
            for name in new:
                del self._average[name]
            return
        weights = self._weights({name: sums[name] for name in moved if name not in new})
        for name, weight in weights.items():
            self._average[name].lerp_(_fp32(moved[name]), weight)
        if self.coefficient == "auto":
            self._keep(gradients)
        self._updates += 1
        if self._updates % COMPARED_EVERY == 0:
            self._compare(found)

    def _keep(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if name in self._gradient:
                self._gradient[name].copy_(gradient)
            else:
                self._gradient[name] = copied(gradient)

    def _sums(
        self,
        by_mesh: Mapping[Any, list[str]],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> dict[str, tuple[float, float, float]]:
        """Return for each tensor distance, gradient and change; without a former gradient change is nan.

        Args:
            by_mesh: Names by the mesh that their tensors are sharded over.
            weights: This process's parts.
            gradients: Likewise.
        """
        found: dict[str, tuple[float, float, float]] = {}
        for key in sorted(by_mesh, key=repr):  # one order on every process: each may hold a collective
            names = by_mesh[key]
            table = self._table([weights[name] for name in names], [gradients[name] for name in names], names)
            if key is not None:
                mesh, sharded = key
                for dim in sharded:
                    torch_dist.all_reduce(table, group=mesh.get_group(dim))
            found.update(zip(names, map(tuple, table.tolist()), strict=True))
        return {name: found[name] for name in weights}

    def _table(self, weights: list[Tensor], gradients: list[Tensor], names: list[str]) -> Tensor:
        """Return (tensors, 3) distance, gradient and change, fp32."""
        distances = self._l1(weights, [self._average[name] for name in names])
        changes = [torch.full_like(distances[0], math.nan)] * len(names)
        again = [index for index, name in enumerate(names) if name in self._gradient]
        before = [self._gradient[names[index]] for index in again]
        for index, change in zip(again, self._l1([gradients[i] for i in again], before), strict=True):
            changes[index] = change
        columns = (distances, self._l1(gradients), changes)
        return torch.stack([stacked(column) for column in columns], dim=1)

    def _l1(self, xs: list[Tensor], ys: list[Tensor] | None = None) -> list[Tensor]:
        """Return sum |x| of each tensor, or sum |x - y| of each pair with y fp32; (), fp32."""
        sums: dict[int, Tensor] = {}
        parts: list[list[int]] = []  # of tensors that one call takes
        room = 0
        for index, x in enumerate(xs):
            size = x.numel()
            if size > _SMALL and x.is_cpu:
                sums[index] = self._in_blocks(x, None if ys is None else ys[index])
                continue
            if not parts or size > room:
                parts.append([])
                room = _TOGETHER
            room -= size
            parts[-1].append(index)
        for part in parts:
            tensors = [_fp32(xs[index]) for index in part]
            if ys is not None:
                tensors = torch._foreach_sub(tensors, [ys[index] for index in part])  # pyright: ignore[reportPrivateImportUsage]
            norms = torch._foreach_norm(tensors, 1)  # pyright: ignore[reportPrivateImportUsage]
            sums.update(zip(part, norms, strict=True))
        return [sums[index] for index in range(len(xs))]

    def _in_blocks(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return sum |x|, or sum |x - y|, without a temporary of their size."""
        if x.numel() <= _BLOCK:
            return self._sum(_fp32(x), y)
        x, y = x.reshape(-1), None if y is None else y.reshape(-1)
        total = torch.zeros((), dtype=torch.float32)
        for start in range(0, x.numel(), _BLOCK):
            end = start + _BLOCK
            total += self._sum(_fp32(x[start:end]), None if y is None else y[start:end])
        return total

    def _sum(self, x: Tensor, y: Tensor | None) -> Tensor:
        room = self._rooms.get(x.shape)
        if room is None:
            room = self._rooms[x.shape] = self._room[: x.numel()].view(x.shape)
        if y is None:
            return torch.abs(x, out=room).sum()
        return torch.sub(x, y, out=room).abs_().sum()

    def _weights(self, sums: Mapping[str, tuple[float, float, float]]) -> dict[str, float]:
        """Return the weight of the new weights by tensor, and count how many of them were adaptive."""
        if isinstance(self.coefficient, float):
            self._alpha = self.coefficient
            return dict.fromkeys(sums, self.coefficient)
        if self.scope == "global" and sums:
            total = [sum(column) for column in zip(*sums.values(), strict=True)]
            sums = dict.fromkeys(sums, (total[0], total[1], total[2]))
        weights = {}
        for name, (distance, gradient, change) in sums.items():
            value = ema_coefficient(distance, gradient, change, factor=self._front, role=self.role)
            self._adaptive += value is not None
            self._decided += 1
            weights[name] = self.fallback if value is None else value
        if weights:
            self._alpha = sum(weights.values()) / len(weights)
        return weights

    @property
    def _front(self) -> float:
        return self.factor if self.role == "new" else 1.0

    def _compare(self, found: Mapping[str, Tensor]) -> None:
        """Check that processes which hold the same weights have the same average (a collective)."""
        if not dist.is_distributed() or any(_mesh(parameter) is not None for parameter in found.values()):
            return
        total = torch.stack([self._average[name].sum().cpu() for name in found])
        if not dist.same_on_all_ranks(total):
            raise RuntimeError(
                f"continual_ema: the averages of the processes differ after {self._updates} updates"
            )

    def undo(self) -> None:
        """Let the buffers go."""
        super().undo()
        self._gradient = {}

    def scalars(self) -> dict[str, float]:
        """Return the mean weight in the last update, and the share of weights so far that were adaptive."""
        share = self._adaptive / self._decided if self._decided else 0.0
        return {"alpha": self._alpha, "adaptive_share": share}

    # State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the last gradients (a collective where they are sharded)."""
        return {
            **self.gathered(AVERAGE, self._average),
            **self.gathered(GRADIENT, self._gradient),
            "updates": self._updates,
            "adaptive": self._adaptive,
            "decided": self._decided,
            "alpha": self._alpha,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a checkpoint's state until the model is seen."""
        self._saved = state
        self._updates, self._adaptive = state["updates"], state["adaptive"]
        self._decided, self._alpha = state["decided"], state["alpha"]


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def _mesh(tensor: Tensor) -> Any:
    """Return the mesh of a sharded tensor with the dimensions it is sharded over; None for a whole one."""
    if not isinstance(tensor, DTensor):
        return None
    sharded = tuple(dim for dim, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh, sharded
