"""CheckFree in training: a lost stage of a model rebuilt from its neighbors, without a checkpoint.

Source: Blagoev et al. 2025, "All is Not Lost: LLM Recovery without Checkpoints", arXiv 2506.15461, algorithm
1; authors' code (gensyn-ai/CheckFree, MIT) for the points below. The layers make S equal stages, and omega_i
is the norm of stage i's last gradient. A lost stage becomes W_i = (omega_{i-1} W_{i-1} + omega_{i+1} W_{i+1})
/ (omega_{i-1} + omega_{i+1}), its optimizer state starts afresh, and its learning rate is raised. CheckFree+
runs half of the micro-batches with stages 1 and 2, and S - 1 and S, in each other's place, so that a lost
outer stage is a copy of its partner.

Differs from the paper:
- Norms are those before clipping; the authors' code takes them after each stage was clipped to 1, which makes
  weights equal whenever both were clipped. They are kept by layer.
- The raised rate follows the run's schedule, where the code starts a new one, and may fall back to it.
- Stages swap on every other micro-batch, counted over all processes, where the paper draws half of them.
- Without CheckFree+ an outer stage is a copy of its neighbor; with it a stage whose partner is lost too is
  rebuilt from what is left.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.checks import check
from ..core.layer_recovery import (
    WHY_NOT_SHARDED,
    Recovery,
    RecoveryPlan,
    find_layers,
    layer_kinds,
    plan_recovery,
    rebuilt,
    swap_partners,
)
from ..core.peft_starts import changes_base
from ._base import Callback, Neutral, Run, register_callback, whole
from ._gradients import before_clipping, gradient_norm
from ._local_updates import refuse_sharded

__all__ = ["StageRecoveryCallback"]


@dataclass
class _Rebuilt:
    """A stage that was rebuilt.

    Args:
        updates: Optimizer steps since then.
        counters: For each group of the optimizer what the optimizer counts in it, for this stage's part.
    """

    updates: int = 0
    counters: dict[int, dict[str, Any]] = field(default_factory=dict)


@register_callback(
    "stage_recovery",
    summary="a lost stage rebuilt from its neighbors in the middle of a run, without a checkpoint",
    paper="arXiv:2506.15461",
    supports={"observes", "whole_replica"},
    neutral=Neutral(settings={}, arguments={}),
    test_kwargs={"stages": 1},
    bad_kwargs=(
        {"stages": 0},
        {"norm_power": 3},
        {"norm_power": -1},
        {"eps": 0.0},
        {"lr_scale": 0.9},
        {"lr_scale": 2.1},
        {"lr_recover_steps": -1},
        {"swap_prob": 0.3},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class StageRecoveryCallback(Callback):
    """Record each layer's gradient norm, and rebuild stages that are lost when `recover` is called.

    Who has noticed the loss calls `recover(stage)` between two optimizer steps, on every process. Stages are
    numbered from 1, as in the paper: of 12 layers in 4 stages, stage 2 is layers 3 to 5. Until then the run
    is that without the callback to the bit, unless `swap_prob` is set.

    A rebuilt stage's learning rate is laid on around the optimizer step alone, where its parameters are a
    group of their own: schedule, log and checkpoint see the groups that they know. What the optimizer counts
    in a group, such as its steps, starts afresh for the stage. Parameters that do not train are left as they
    are: they come from the base model.

    In a checkpoint: the norms, and for each rebuilt stage its updates since and the optimizer's counters.

    Args:
        stages: Number of equal blocks that the layers are cut into, a divisor of their number; None for one
            to each layer.
        norm_power: Exponent of the norms: 1, 2, or 0 for equal weights.
        eps: Added to a stage's norm, above 0.
        lr_scale: Factor of a rebuilt stage's learning rate, from 1 to 2.
        lr_recover_steps: Optimizer steps over which the factor falls to 1, linearly; 0 to keep it.
        swap_prob: Share of micro-batches that run with the outer stages swapped (CheckFree+): 0 or 0.5. Needs
            `hf_ext.attach` and at least 4 stages.
        prefix: Name of the list of layers, such as "model.layers"; None to find it.
    """

    stages: int | None = None
    norm_power: int = 1
    eps: float = 1e-4
    lr_scale: float = 1.1
    lr_recover_steps: int = 0
    swap_prob: float = 0.0
    prefix: str | None = None

    def validate(self) -> None:
        """Check the settings."""
        check(self.stages is None or self.stages >= 1, "stages", self.stages, "at least 1")
        check(self.norm_power in (0, 1, 2), "norm_power", self.norm_power, "0, 1 or 2")
        check(self.eps > 0.0, "eps", self.eps, "above 0")
        check(1.0 <= self.lr_scale <= 2.0, "lr_scale", self.lr_scale, "in [1, 2]")
        check(self.lr_recover_steps >= 0, "lr_recover_steps", self.lr_recover_steps, "at least 0")
        check(self.swap_prob in (0.0, 0.5), "swap_prob", self.swap_prob, "0 or 0.5")

    def needs_attach(self, args: TrainingArguments) -> str | None:
        """Events come after clipping, and not around a micro-batch."""
        if self.swap_prob:
            return "swaps stages for every other micro-batch"
        if args.max_grad_norm > 0.0:
            return f"records gradient norms before clipping (max_grad_norm={args.max_grad_norm:g})"
        return None

    # The run --------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget an earlier run."""
        self._norms: list[Tensor] = []  # of each layer, float64
        self._pending: list[Tensor] = []
        self._l2: Any = None
        self._micro_batches = 0  # of this process
        self._recovered = 0
        self._rebuilt: dict[int, _Rebuilt] = {}
        self._counted: set[str] = set()  # entries of groups that the optimizer changes in a step
        self._before: list[dict[str, Any]] = []
        self._whole: list[tuple[dict[str, Any], list[Tensor]]] = []  # groups as they are between steps
        self._parts: list[tuple[int, int, dict[str, Any]]] = []  # stage, group, and the part of it
        self._model: Any = None
        self._optimizer: Any = None
        self._hooks: list[Any] = []
        self._stem, self._count, self._size = "", 0, 1
        self._trained: list[list[nn.Parameter]] = []  # of each layer

    def begin(self, run: Run) -> None:
        """Look for the layers.

        Raises:
            ValueError: The model is sharded, weights differ between processes, the layers are not found or
                cannot be cut into the stages, or stages that are to be swapped differ.
        """
        name = type(self).__name__
        refuse_sharded(run, run.model.parameters(), name, f"with FSDP or DeepSpeed {WHY_NOT_SHARDED}")
        others = () if self.trainer is None else self.trainer.callback_handler.callbacks
        apart = [c for c in others if isinstance(c, Callback) and "local_updates" in c.info.supports]
        for other in apart if dist.is_distributed() else ():
            rule = "used without it on several processes, whose gradients it lets differ"
            check(False, self.info.name, type(other).__name__, rule)
        self._refuse_taken_from_base(run.model)
        self._model, self._optimizer = run.model, getattr(run.optimizer, "optimizer", run.optimizer)
        named = dict(run.model.named_parameters())
        self._stem, layers = find_layers(named, self.prefix)
        self._count = len(layers)
        numbers = sorted(layers)
        check(numbers == list(range(self._count)), self._stem, numbers, "layers 0, 1, ... without a gap")
        stages = self.stages or self._count
        check(self._count % stages == 0, "stages", stages, f"a divisor of {self._count}, the layers")
        self._size = self._count // stages
        found = [[named[rest] for rest in layers[number].values()] for number in numbers]
        self._trained = [[p for p in parameters if p.requires_grad] for parameters in found]
        recorded, rule = len(self._norms), f"{self._count}, one of each layer"
        check(recorded in (0, self._count), "number of recorded norms", recorded, rule)
        if self.swap_prob:
            for layer in self._partners():
                self._plan([layer])
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def _refuse_taken_from_base(self, model: nn.Module) -> None:
        """Refuse adapters whose trained tensors belong to frozen ones of their own layer."""
        bound = {m.__class__.__name__ for m in model.modules() if getattr(m, "adapter_frozen_names", ())}
        starts = [getattr(config, "init_lora_weights", None) for config in _peft_configs(model)]
        found = [*sorted(bound), *(f"init_lora_weights={start!r}" for start in starts if changes_base(start))]
        rule = "one whose trained tensors do not go with frozen ones of the same layer; train whole weights"
        check(not found, "adapter", ", ".join(found), rule, where=self.info.name)

    def undo(self) -> None:
        """Leave the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._join()
        self._hooks, self._model, self._optimizer, self._trained = [], None, None, []

    # Norms ----------------------------------------------------------------------------------------

    def gradient_norm(self, norm: Any) -> None:
        """Take the l2 norm before clipping from an attached trainer."""
        self._l2 = norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure each layer's gradient, with one fused call for a layer."""
        found = [gradient_norm((p.grad for p in ps if p.grad is not None), 2) for ps in self._trained]
        if self._l2 is not None:
            l2 = torch.as_tensor(self._l2).detach().to(torch.float64)
            found = [before_clipping(n, l2.to(n.device), args.max_grad_norm) for n in found]
        # With a device map layers lie on several devices, and one without gradients counts on the CPU.
        self._pending, self._l2 = [n.to(found[0].device) for n in found], None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep them, unless the update was skipped (an overflow in fp16)."""
        if self._pending and not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._norms = self._pending
        self._pending = []

    def norms(self) -> dict[int, float]:
        """Return each layer's gradient norm of the last update, before clipping; empty before the first."""
        return dict(enumerate(whole(self._norms).tolist()))

    # Recovery -------------------------------------------------------------------------------------

    def recover(self, *stages: int) -> Recovery:
        """Rebuild lost stages in place from those that are left, and forget their optimizer state.

        Args:
            *stages: Their numbers, from 1; what they hold does not matter.

        Returns:
            Which layers were made of which, with what weights.

        Raises:
            RuntimeError: No run is on.
            ValueError: A stage does not exist, none is left beside one, neighbors have other tensors, or hold
                NaN. The model is then unchanged.
        """
        if self._model is None:
            raise RuntimeError("recover works while a run is on: call it from an event, such as on_step_end")
        count = self._count // self._size
        unknown = [stage for stage in stages if not 1 <= stage <= count]
        rule = f"1 to {count} (stages are numbered from 1)"
        check(bool(stages) and not unknown, "stages", list(stages), rule)
        plan = self._plan([layer for stage in sorted({*stages}) for layer in self._layers_of(stage)])
        named = self._tensors()
        with torch.no_grad():
            values = {name: _checked(name, named, parts) for name, parts in plan.sources.items()}
            for name, value in values.items():
                named[name].copy_(value)
        for name in plan.sources:
            self._optimizer.state.pop(named[name], None)
        for stage in {*stages}:
            self._rebuilt[stage] = _Rebuilt()
        self._recovered += len({*stages})
        return plan.recovery()

    def _plan(self, layers: Sequence[int]) -> RecoveryPlan:
        return plan_recovery(
            {name: tuple(tensor.shape) for name, tensor in self._tensors().items()},
            layers,
            self.norms() or None,
            stage_size=self._size,
            norm_power=self.norm_power,
            eps=self.eps,
            prefix=self._stem,
            partners=self._partners() if self.swap_prob else None,
            kinds=layer_kinds(getattr(self._model, "config", None), self._count),
        )

    def _tensors(self) -> dict[str, Tensor]:
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        return {**trained, **dict(self._model.named_buffers())}

    def _layers_of(self, stage: int) -> range:
        return range((stage - 1) * self._size, stage * self._size)

    def _partners(self) -> dict[int, int]:
        """Return for each layer of the outer stages that which takes its place in a swap."""
        return swap_partners(self._count, self._size)

    # The learning rate of rebuilt stages ----------------------------------------------------------

    def lr_factor(self, stage: int) -> float:
        """Return what the learning rate of a stage's next update is multiplied by."""
        if stage not in self._rebuilt:
            return 1.0
        if not self.lr_recover_steps:
            return self.lr_scale
        share = max(0.0, 1.0 - self._rebuilt[stage].updates / self.lr_recover_steps)
        return 1.0 + (self.lr_scale - 1.0) * share

    def _before_step(self, optimizer: Any, *inputs: Any) -> None:
        self._before = [_marks(group) for group in optimizer.param_groups]
        if not self._rebuilt:
            return
        self._whole = [(group, group["params"]) for group in optimizer.param_groups]
        for stage, found in self._rebuilt.items():
            own = {id(p) for layer in self._layers_of(stage) for p in self._trained[layer]}
            for index, (group, _) in enumerate(self._whole):
                moved = [p for p in group["params"] if id(p) in own]
                if moved:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    part = self._part(optimizer, group, found.counters.get(index))
                    part |= {"params": moved, "lr": group["lr"] * self.lr_factor(stage)}
                    self._parts.append((stage, index, part))
        rest = [group for group, _ in self._whole if group["params"]]
        optimizer.param_groups[:] = [*rest, *(part for _, _, part in self._parts)]

    def _part(
        self, optimizer: Any, group: Mapping[str, Any], counters: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return a group's settings, with the counters of a stage: at the start those of a new optimizer."""
        settings = {key: value for key, value in group.items() if key not in self._counted}
        if counters is None:
            counters = {key: optimizer.defaults[key] for key in self._counted & optimizer.defaults.keys()}
        return settings | {key: _copied(value) for key, value in counters.items()}

    def _after_step(self, optimizer: Any, *inputs: Any) -> None:
        parts = self._parts
        self._join()
        for group, marks in zip(optimizer.param_groups, self._before, strict=True):
            after = _marks(group)
            self._counted |= {key for key in after if marks.get(key) != after[key]}
        for stage, index, part in parts:
            self._rebuilt[stage].counters[index] = {key: part[key] for key in self._counted if key in part}
        for found in self._rebuilt.values():
            found.updates += 1
        self._before = []

    def _join(self) -> None:
        """Give the optimizer its groups back."""
        if self._whole:
            for group, parameters in self._whole:
                group["params"] = parameters
            self._optimizer.param_groups[:] = [group for group, _ in self._whole]
        self._whole, self._parts = [], []

    # Swapping -------------------------------------------------------------------------------------

    def around_training_step(self, step: Callable[..., Any], model: Any, *inputs: Any) -> Any:
        """Run every other micro-batch of all processes with the outer stages in each other's place."""
        if not self.swap_prob:
            return step(model, *inputs)
        number = self._micro_batches * dist.world_size() + dist.rank()
        self._micro_batches += 1
        with self._swapped() if number % 2 else contextlib.nullcontext():
            return step(model, *inputs)

    @contextlib.contextmanager
    def _swapped(self) -> Generator[None]:
        modules = self._model.get_submodule(self._stem)._modules
        before = dict(modules)
        try:
            modules.update({str(a): before[str(b)] for a, b in self._partners().items()})
            yield
        finally:
            modules.update(before)

    # State ----------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Return the number of stages that were rebuilt, and the least and the largest of the norms."""
        norms = list(self.norms().values())
        low, high = (min(norms), max(norms)) if norms else (0.0, 0.0)
        return {"recovered": float(self._recovered), "norm_min": low, "norm_max": high}

    def state_dict(self) -> dict[str, Any]:
        """Return the norms, the rebuilt stages, and the number of micro-batches where stages swap."""
        tensors: dict[str, Tensor] = {}
        stages: dict[str, Any] = {}
        for stage, found in self._rebuilt.items():
            counters: dict[str, dict[str, Any]] = {}
            for index, values in found.counters.items():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[f"{stage}:{index}:{key}"] = value
                    else:
                        rule = "of tensors and numbers"
                        plain = value is None or isinstance(value, int | float)
                        check(plain, "optimizer", value, rule, where=f"{key!r} in a group")
                        counters.setdefault(str(index), {})[key] = value
                counters.setdefault(str(index), {})
            stages[str(stage)] = {"updates": found.updates, "counters": counters}
        # A number that is none cannot be written; recovering from it is refused then.
        norms = [norm if math.isfinite(norm) else None for norm in self.norms().values()]
        state = {"norms": norms, "recovered": self._recovered, "micro_batches": self._micro_batches}
        return {**state, "rebuilt": stages, "counted": sorted(self._counted), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        norms = [math.nan if norm is None else norm for norm in state["norms"]]
        self._norms = [torch.tensor(norm, dtype=torch.float64) for norm in norms]
        self._recovered, self._micro_batches = state["recovered"], state["micro_batches"]
        self._counted = set(state["counted"])
        for stage, saved in state["rebuilt"].items():
            counters = {int(index): dict(values) for index, values in saved["counters"].items()}
            self._rebuilt[int(stage)] = _Rebuilt(saved["updates"], counters)
        for key, value in state.items():
            if isinstance(value, Tensor):
                stage, index, name = key.split(":", 2)
                self._rebuilt[int(stage)].counters[int(index)][name] = value.clone()


def _checked(name: str, named: Mapping[str, Tensor], parts: Iterable[tuple[str, float]]) -> Tensor:
    found = [(named[part].to(named[name].device), weight) for part, weight in parts]
    value = rebuilt(found)
    finite = not value.is_floating_point() or bool(torch.isfinite(value).all())
    check(finite, name, "NaN or infinite values", f"made of finite ones: {[part for part, _ in parts]}")
    return value


def _peft_configs(model: nn.Module) -> list[Any]:
    return list((getattr(model, "peft_config", None) or {}).values())


def _marks(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return by key what changes when an entry of a group does; learning rates are the schedule's."""
    left_out = ("params", "lr", "initial_lr")
    return {
        key: (id(value), value._version) if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in left_out
    }


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
