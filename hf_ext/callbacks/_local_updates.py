"""Rounds of updates that each process makes alone, and an exchange of weights between them.

Within a round no gradient is averaged: every micro-batch runs under DDP's `no_sync`. After the round's last
update the processes exchange weights (`LocalUpdatesCallback.exchange`); here all take their mean, and the
method says what it becomes. Each process has an optimizer state of its own, which is never averaged, and of
which the Trainer saves the first process's alone: the rest is in the state of the callback, and so are the
statistics of batch norms.

The mean takes the place of weights that are equal on one process, or where the method adds nothing to it, so
that such runs are those without the callback, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core import dist
from ..core.checks import check
from ._base import Callback, Run

Weights = dict[str, Tensor]  # trained parameters by name, fp32
_MOST_FAILURES = 3
_BUCKET = 2**26  # numbers that are sent at once


@dataclass(kw_only=True, eq=False, repr=False)
class LocalUpdatesCallback(Callback):
    """Base of the methods whose processes train alone for a while.

    Args:
        local_steps: Optimizer steps of a round, at least 1.
        reset_inner: Whether the optimizers forget their state at the end of each round.
    """

    per_rank: ClassVar[bool] = True
    owns: ClassVar[frozenset[str]] = frozenset({"gradient_averaging"})

    local_steps: int = 50
    reset_inner: bool = False

    def next_anchor(self, mean: Weights, anchor: Weights, whole: bool) -> Weights:
        """Return the weights that the next round starts from, the same on every process.

        Args:
            mean: Mean over the processes of the weights at the round's end; may be changed.
            anchor: The weights that the round has started from.
            whole: Whether the round had all of its steps; the last one of a run may be shorter.
        """
        return mean

    def stays_apart(self) -> bool:
        """Return whether processes may differ between two rounds, as they do within one."""
        return False

    def needs_anchor(self) -> bool:
        """Return whether `next_anchor` looks at the anchor."""
        return True

    def shared_state(self) -> dict[str, Weights]:
        """Return the method's weights by name that are equal on all processes: the first one saves them."""
        return {}

    def load_shared_state(self, state: Mapping[str, Weights]) -> None:
        """Restore them."""

    def own_state(self) -> dict[str, Weights]:
        """Return the method's weights by name that each process has of its own."""
        return {}

    def load_own_state(self, state: Mapping[str, Weights]) -> None:
        """Restore them."""

    def validate(self) -> None:
        """Check the settings."""
        check(self.local_steps >= 1, "local_steps", self.local_steps, "at least 1")

    def needs_attach(self, args: TrainingArguments) -> str | None:
        """Processes are kept apart inside the training step."""
        return "keeps gradients from being averaged" if args.world_size > 1 else None

    # The run --------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget an earlier run."""
        self.in_round = 0  # updates since the round's start
        self.rounds = 0
        self.failures = 0
        self._in_row = 0
        self._anchor: Weights | None = None
        self._held: dict[str, Any] = {}  # what a checkpoint says of weights and optimizer
        self._trained: dict[str, nn.Parameter] = {}
        self._norms: dict[str, _NormBase] = {}
        self._optimizer: Any = None
        self._averages_tokens: tuple[TrainingArguments, bool] | None = None
        self._synced: tuple[Any, bool] | None = None

    def begin(self, run: Run) -> None:
        """Take note of what is trained, and bring back what each process had of its own."""
        self._trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        # Instance norms that keep statistics too, which `core.batch_norm` leaves out.
        self._norms = {n: m for n, m in run.model.named_modules() if isinstance(m, _NormBase)}
        self._optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
        refuse_sharded(run, self._trained.values(), type(self).__name__)
        if dist.is_distributed():
            # Each process's loss is then a mean over its own tokens.
            self._averages_tokens = run.args, run.args.average_tokens_across_devices
            run.args.average_tokens_across_devices = False
            wrapped = getattr(self.trainer, "model_wrapped", None)
            if isinstance(wrapped, nn.parallel.DistributedDataParallel):
                # Its first forward would overwrite each process's statistics with those of the first.
                self._synced = wrapped, wrapped.require_forward_param_sync
                wrapped.require_forward_param_sync = False
            self._restore_own()
        self.load_shared_state(self._shared())
        self.load_own_state(self._unpacked("own"))
        anchor = self._unpacked("anchor")
        if self.needs_anchor():
            self._anchor = anchor or self.current()
        self._held = {}

    def undo(self) -> None:
        """Give the Trainer its count of tokens back, and DDP its copying of statistics; let tensors go."""
        if self._synced is not None:
            wrapped, synced = self._synced
            wrapped.require_forward_param_sync = synced
        self._synced = None
        if self._averages_tokens is not None:
            args, value = self._averages_tokens
            args.average_tokens_across_devices = value
        self._averages_tokens = None
        self._anchor, self._held, self._optimizer = None, {}, None
        self._trained, self._norms = {}, {}

    def around_training_step(self, step: Callable[..., Any], model: Any, *inputs: Any) -> Any:
        """Run forward and backward without averaging the gradients."""
        with self.trainer.accelerator.no_sync(model):
            return step(model, *inputs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the round after its last update, and after the run's."""
        self.in_round += 1
        last = state.global_step >= state.max_steps or control.should_training_stop
        if self.in_round >= self.local_steps or last:
            self.end_round(state.global_step / max(state.max_steps, 1), last)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the last round where an evaluation has stopped the run: before a best checkpoint is loaded."""
        if self.in_round and control.should_training_stop:
            self.end_round(1.0, True)

    def finish(self, run: Run) -> None:
        """End the last round of a run that ended otherwise, unless the best checkpoint is in its place."""
        loaded = run.args.load_best_model_at_end and run.state.best_model_checkpoint is not None
        if self.in_round and not loaded:
            self.end_round(1.0, True)

    def end_round(self, share: float, last: bool) -> None:
        """Exchange the weights and begin the next round (a collective).

        Args:
            share: Share of the run that is done.
            last: Whether the run ends here.
        """
        whole, self.in_round = self.in_round >= self.local_steps, 0
        self.exchange(whole, share, last)
        self.rounds += 1
        if self.reset_inner:
            self._optimizer.state.clear()

    def exchange(self, whole: bool, share: float, last: bool) -> None:
        """Give every process the weights that its next round starts from (a collective).

        Args:
            whole: Whether the round had all of its steps.
            share: Share of the run that is done.
            last: Whether the run ends here.
        """
        anchor = self._anchor
        if dist.is_distributed() or anchor is not None:
            mean = mean_over_processes(self.current())
            if finite(mean):
                self._in_row = 0
                following = mean if anchor is None else self.next_anchor(mean, anchor, whole)
                self.put(following)
            else:
                self._fail(anchor)
        for buffer in self.statistics().values() if dist.is_distributed() else ():
            if buffer.is_floating_point():
                _mean_of_finite_(buffer)

    def statistics(self) -> dict[str, Tensor]:
        """Return the buffers of batch norms by name."""
        return {
            f"{name}.{key}": buffer
            for name, module in self._norms.items()
            for key, buffer in module.named_buffers(recurse=False)
        }

    def _fail(self, anchor: Weights | None) -> None:
        """Go back to the round's start, with empty optimizers: theirs may remember what was not finite.

        Raises:
            ValueError: There is no way back, or several rounds in a row have failed.
        """
        self.failures, self._in_row = self.failures + 1, self._in_row + 1
        if self._in_row >= _MOST_FAILURES or anchor is None:
            kept = "" if anchor is not None else ", and nothing was kept to go back to"
            raise ValueError(
                f"{self.info.name}: the weights are not finite at the end of a round, for the "
                f"{self._in_row}. time in a row{kept}; a lower learning_rate may help"
            )
        self.put(anchor)
        self._optimizer.state.clear()
        self.forget_round()

    def forget_round(self) -> None:
        """Forget what the method has learned within a round that has failed."""

    def put(self, weights: Weights) -> None:
        """Write weights into the model."""
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])
        if self._anchor is not None:
            self._anchor = weights

    def current(self) -> Weights:
        """Return copies of the trained weights, fp32."""
        return {name: p.detach().to(torch.float32, copy=True) for name, p in self._trained.items()}

    # State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the round, the anchor, and what each process has of its own."""
        state: dict[str, Any] = {"in_round": self.in_round, "rounds": self.rounds}
        state |= {"failures": self.failures, "in_row": self._in_row}
        shared = {f"shared.{key}": value for key, value in self.shared_state().items()}
        # At a round's end the anchor is the model, but for what its type cannot hold.
        exact = all(p.dtype == torch.float32 for p in self._trained.values())
        if self._anchor is not None and (self.in_round or not exact):
            shared["anchor"] = self._anchor
        found = dict(shared) if dist.is_main() else {}
        found |= {f"own.{key}": value for key, value in self.own_state().items()}
        if dist.is_distributed():
            if self.in_round or self.stays_apart():
                found["local"] = {name: p.detach() for name, p in self._trained.items()}
                state |= {f"statistics:{name}": buffer for name, buffer in self.statistics().items()}
            state |= self._optimizer_state()
        state["shared"] = sorted(shared)
        packed = {f"{part}:{name}": t for part, weights in found.items() for name, t in weights.items()}
        return {**state, **packed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scalars; the tensors wait for `begin`."""
        self.in_round, self.rounds = state["in_round"], state["rounds"]
        self.failures, self._in_row = state["failures"], state["in_row"]
        self._held = dict(state)

    def _unpacked(self, part: str) -> Any:
        """Return what was held as part "a" or, of parts "a.x", by x."""
        found: dict[str, Weights] = {}
        for key, value in self._held.items():
            owner, _, name = key.partition(":")
            if name and (owner == part or owner.startswith(f"{part}.")):
                parameter = self._trained[name]
                # A copy: what a file holds may lie at odd addresses, where sums come out in other bits.
                held = value.to(parameter.device, copy=True)
                found.setdefault(owner.removeprefix(part).lstrip("."), {})[name] = held
        return found.get("", {}) if part in ("anchor", "local") else found

    def _shared(self) -> dict[str, Weights]:
        """Return the shared weights, which the first process has read (a collective)."""
        for part in self._held.get("shared", ()):
            for name, parameter in self._trained.items():
                empty = torch.empty(parameter.shape, dtype=torch.float32)
                held = self._held[f"{part}:{name}"] if dist.is_main() else empty
                self._held[f"{part}:{name}"] = dist.broadcast_(held.to(parameter.device, torch.float32))
        return self._unpacked("shared")

    def _optimizer_state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, parameter in self._trained.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                rule = "of tensors and numbers, where processes have optimizers of their own"
                plain = isinstance(value, (Tensor, int, float, bool, type(None)))
                check(plain, "optimizer", type(self._optimizer).__name__, rule, where=f"state {key!r}")
                found[f"optimizer:{key}:{name}"] = value
        return found

    def _restore_own(self) -> None:
        with torch.no_grad():
            for name, value in self._unpacked("local").items():
                self._trained[name].copy_(value)
        statistics = self.statistics()
        for key, value in self._held.items():
            part, _, rest = key.partition(":")
            if part == "statistics":
                statistics[rest].copy_(value)
            elif part == "optimizer":
                entry, _, name = rest.partition(":")
                state = self._optimizer.state[self._trained[name]]
                before = state.get(entry)
                device = before.device if isinstance(before, Tensor) else self._trained[name].device
                state[entry] = value.to(device) if isinstance(value, Tensor) else value


def refuse_sharded(
    run: Run, trained: Iterable[Tensor], name: str, why: str = "use DDP, not FSDP or DeepSpeed"
) -> None:
    """Raise where no process has a whole replica of the model.

    Args:
        run: The run.
        trained: Parameters.
        name: Of the callback.
        why: The rest of the error's text.

    Raises:
        ValueError: The model is sharded, or DeepSpeed runs it.
    """
    kind = str(getattr(run.args.distributed_state, "distributed_type", ""))
    sharded = any(hasattr(p, "full_tensor") or type(p).__name__ == "FlatParameter" for p in trained)
    if sharded or "DEEPSPEED" in kind or "FSDP" in kind:
        raise ValueError(f"{name} needs a whole replica of the model on each process: {why}")


def _mean_of_finite_(buffer: Tensor) -> None:
    """Overwrite a buffer with the mean of the processes whose is finite; leave it where none is."""
    there = torch.isfinite(buffer).all()
    total = torch.where(there, buffer, torch.zeros_like(buffer))
    count = dist.all_reduce_sum_(there.to(buffer.dtype))
    total = dist.all_reduce_sum_(total) / count
    if bool(count > 0):
        buffer.copy_(total)


def mean_over_processes(weights: Weights) -> Weights:
    """Overwrite weights with their mean over the processes, many tensors at once, and return them."""
    return _in_buckets(weights, dist.all_reduce_mean_) if dist.is_distributed() else weights


def mean_of_pair(weights: Weights, partner: int) -> Weights:
    """Overwrite weights with their mean with another process's, which calls this too, and return them.

    A sum of two does not depend on their order: both get the same bits.
    """
    return _in_buckets(weights, lambda flat: (flat + dist.swapped(flat, partner)) / 2)


def _in_buckets(weights: Weights, action: Callable[[Tensor], Tensor]) -> Weights:
    bucket: list[Tensor] = []
    for index, tensor in enumerate(weights.values()):
        bucket.append(tensor)
        if sum(map(torch.numel, bucket)) >= _BUCKET or index == len(weights) - 1:
            flat = action(torch.cat([tensor.reshape(-1) for tensor in bucket]))
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
            bucket = []
    return weights


def finite(weights: Mapping[str, Tensor]) -> bool:
    """Return whether no number is NaN or infinite."""
    # A sum of finite numbers is finite, short of overflow, and far cheaper to look at than each of them.
    return all(
        bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all()) for value in weights.values()
    )
