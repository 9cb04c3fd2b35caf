"""What callbacks share that keep an average of the trained weights beside a run.

Averages are fp32 and hold this process's part of a tensor (FSDP2 shards it, DDP does not). The raw weights
drive the training and are what a checkpoint holds; the average is in their place during evaluations and after
the run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from .._compat.generation import hand_over_anew
from ..core import dist
from ..core.checks import check, check_choice
from ..core.state import load_scalars
from ._base import Callback, Run

AVERAGE = "average."  # prefix of the average's tensors in a checkpoint
LARGE = 2**30  # bytes of buffers that are worth a warning


@dataclass(kw_only=True, eq=False, repr=False)
class AveragedWeightsCallback(Callback):
    """Base: an average that takes the weights' place in evaluations and at the end of the run.

    A method moves `_average` along the run, or overrides `averaged`, and calls `begin` of this class.

    Args:
        params: Pattern that is searched for in the names of the tensors to average; None for all that train.
        use_for_eval: Whether evaluations during the run are of the average.
        replace_weights: Whether the average is in the model after the run.
        best_from: With `load_best_model_at_end`: "average" for the average of the checkpoint whose evaluation
            was the best, or "raw" for what the Trainer loads, which needs both settings above to be False.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"final_weights"})
    may_change: ClassVar[frozenset[str]] = frozenset({"use_for_eval", "replace_weights", "best_from"})

    params: str | None = None
    use_for_eval: bool = True
    replace_weights: bool = True
    best_from: str = "raw"

    def validate(self) -> None:
        """Check the pattern, and what is loaded at the end."""
        check_choice("best_from", self.best_from, ("average", "raw"))
        averages = self.use_for_eval and self.replace_weights
        rule = "'raw' unless evaluations and the model after the run are of the average"
        check(averages or self.best_from == "raw", "best_from", self.best_from, rule)
        if self.params is not None:
            try:
                re.compile(self.params)
            except re.error as error:
                raise ValueError(
                    f"params must be a regular expression, got {self.params!r}: {error}"
                ) from error

    def needs_attach(self, args: TrainingArguments) -> str | None:
        """Events come after an evaluation, not before it."""
        strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
        if not self.use_for_eval or (strategy == "no" and not args.eval_on_start):
            return None
        return "evaluates the averaged weights (or set use_for_eval=False)"

    def reset(self) -> None:
        """Forget an earlier run."""
        self._average: dict[str, Tensor] = {}  # this process's part, fp32
        self._saved: Mapping[str, Any] | None = None
        self._model: Any = None
        self._swapped = False
        self._places: tuple[Any, list[tuple[str, nn.Parameter]]] = None, []

    def begin(self, run: Run) -> None:
        """Look at the model.

        Raises:
            ValueError: Weights cannot be seen here or differ between processes, no tensor is averaged, or the
                best checkpoint would be loaded at the end.
        """
        name = self.info.name
        kind = str(getattr(run.args.distributed_state, "distributed_type", ""))
        rule = "used without DeepSpeed, which keeps weights and gradients to itself"
        check("DEEPSPEED" not in kind, name, "DeepSpeed", rule)
        flat = any(type(parameter).__name__ == "FlatParameter" for parameter in run.model.parameters())
        check(not flat, name, "FSDP1", "used with FSDP2: FSDP1 flattens parameters")
        self.check_best(run)
        others = () if self.trainer is None else self.trainer.callback_handler.callbacks
        apart = [c for c in others if isinstance(c, Callback) and "local_updates" in c.info.supports]
        for other in apart if dist.is_distributed() else ():
            rule = "used without it on several processes, whose weights it lets differ"
            check(False, name, type(other).__name__, rule)
        self._model = run.model
        rule = "the name of some trainable tensor, or a part of it"
        check(bool(self._trained()), "params", self.params, rule)

    def check_best(self, run: Run) -> None:
        """Refuse a best checkpoint that would be of other weights than those that were evaluated."""
        loads = run.args.load_best_model_at_end
        if self.best_from == "raw":
            name = type(self).__name__
            rule = f"False with {name}, which would load raw weights by the average's evaluations"
            keeps = not (loads and (self.use_for_eval or self.replace_weights))
            check(keeps, "load_best_model_at_end", True, f"{rule}; or set best_from='average'")
            return
        check(loads, "load_best_model_at_end", False, "True with best_from='average'")
        best = run.state.best_model_checkpoint
        if best is not None:  # of the run that is resumed; better to know before than after it
            rule = "'raw' where the best checkpoint so far was made without this callback"
            known = (Path(best) / f"{self.file_name()}.json").is_file()
            check(known, "best_from", self.best_from, rule, where=best)
            rule = "'raw' where the best checkpoint so far was chosen by its own weights"
            settings = load_scalars(best, self.file_name())["settings"]
            check(settings.get("use_for_eval", True), "best_from", self.best_from, rule, where=best)

    def averaged(self) -> Mapping[str, Tensor]:
        """Return what takes the place of the weights, by name; empty where there is no average yet."""
        return self._average

    def write_averaged(self, values: Mapping[str, Tensor]) -> None:
        """Put an average in the place of the weights."""
        write(self._trained(), values)

    def replaced(self) -> dict[str, Tensor]:
        """Return by name the tensors of the model that `write_averaged` may change."""
        return self._trained()

    def take_average(self, state: Mapping[str, Any]) -> None:
        """Take the average of a checkpoint's state; a method that keeps it otherwise overrides this."""
        self._average = self.scattered(AVERAGE, state)

    def finish(self, run: Run) -> None:
        """Put the average in the place of the weights: that of the best checkpoint, where it is asked for."""
        best = run.state.best_model_checkpoint if self.best_from == "average" else None
        if best is not None:  # its raw weights are in the model; tensors that are not averaged stay those
            self.take_average(self.read_state(Path(best)))
        values = self.averaged() if self.replace_weights else {}
        if values:
            self.write_averaged(values)

    def undo(self) -> None:
        """Let the buffers go; the raw weights are in the model but for a run that came to its end."""
        self._average, self._model = {}, None
        self._places = None, []

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        """Put the average in the place of the weights for an evaluation within a run."""
        values: Mapping[str, Tensor] = {}
        if self._running and self.use_for_eval and not self._swapped:
            values = self.averaged()
        if not values:
            yield  # several data sets are evaluated one within the other
            return
        raw = {name: copied(tensor, keep=True) for name, tensor in self.replaced().items()}
        self._swapped = True
        try:
            self.write_averaged(values)
            hand_over_anew(self.trainer)
            yield
        finally:
            write(self.replaced(), raw)
            hand_over_anew(self.trainer)
            self._swapped = False

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self._named() if parameter.requires_grad}

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        _reshard(self._model)
        for name, parameter in self._model.named_parameters():  # a tied tensor comes once
            if self.params is None or re.search(self.params, name):
                yield name, parameter

    def _stepped(self, optimizer: Any) -> dict[str, Tensor]:
        """Return what `_trained` does, after an update, for a small part of its time.

        The model is searched anew only where the optimizer has other parameters than before: none that is new
        can have been trained without that.
        """
        groups = getattr(optimizer, "param_groups", ())
        known = [id(parameter) for group in groups for parameter in group["params"]]
        if self._places[0] != known:
            self._places = known, list(self._named())
        return {name: parameter for name, parameter in self._places[1] if parameter.requires_grad}

    # State ----------------------------------------------------------------------------------------

    def gathered(self, prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return buffers as whole tensors under names for a checkpoint (a collective where sharded)."""
        like = self.replaced()
        return {prefix + name: whole(part, like[name]) for name, part in values.items() if name in like}

    def scattered(self, prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return this process's part of what `gathered` has put into a checkpoint.

        Raises:
            ValueError: It is of other tensors than those that are averaged here.
        """
        like = self.replaced()
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            where = f"{name} in the checkpoint's {self.file_name()}.safetensors"
            known = like.get(name)
            check(known is not None, "trained tensors", sorted(like)[:3], f"with {name}")
            assert known is not None
            shape, own = tuple(value.shape), tuple(known.shape)
            check(shape == own, "shape", shape, f"{own}", where=where)
            found[name] = local(dist.shard_like(value.to(known.device), known)).clone()
        return found


# Tensors that may be sharded ----------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copied(tensor: Tensor, *, keep: bool = False) -> Tensor:
    """Return a copy of this process's part, in fp32 unless its dtype is to be kept."""
    part = local(tensor).detach()
    return part.clone() if keep else part.to(torch.float32, copy=True)


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor of which `part` is this process's, laid out as `like` is (a collective)."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    joined = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return joined.full_tensor()


def write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy this process's parts into tensors of the same names, in place: the optimizer holds them."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in values:
                local(tensor).copy_(values[name])


def _reshard(model: Any) -> None:
    """Let FSDP2 gather weights anew: after an evaluation its root still has those of the evaluation."""
    modules: Iterable[Any] = model.modules()
    sharded: Sequence[FSDPModule] = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
