"""How FSDP2 and DeepSpeed lay out the model of a trainer with rounds.

Under FSDP2 and ZeRO-3 the model is sharded before anything is computed with it. Under DeepSpeed each round
has a new engine; with ZeRO-3 another, which trains nothing, brings parameters together before the first one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from .._compat.accelerate import know_model
from .._compat.deepspeed import end_engine, is_split, trains, whole_state_dict
from .._compat.trl import prepare_deepspeed
from ..core.checks import check
from ._base import MethodTrainer, check_parts, place_for_deepspeed, zero_stage
from ._parts import own_part, part_of_whole, put_fp32_copies
from ._reference import evaluation_mode


class ShardedRounds(MethodTrainer):
    """First base of trainers with rounds; a subclass tells which tensors are a policy's."""

    # What Trainer brings.
    callback_handler: Any
    deepspeed: Any
    push_to_hub: Any
    _save: Any

    _wide: dict[str, Tensor] | None  # the policy, where the model holds its rounding alone

    @abstractmethod
    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return, by name, all tensors that differ between the policies of this run."""

    def _check_sharding(self) -> None:
        stage = zero_stage(self)
        rule = "above 0 for rounds in bf16 or fp16: policies are what its optimizer holds in fp32"
        check(stage > 0 or not self.rounds_weights(), "DeepSpeed's zero_optimization.stage", stage, rule)
        kept = self.is_deepspeed_enabled and not self.args.reset_optimizer
        rule = "True with DeepSpeed, whose optimizer is made anew for each round"
        check(not kept, "reset_optimizer", False, rule)
        check_parts(self, "rounds")
        if not self.is_fsdp_enabled:
            return
        plugin: Any = self.accelerator.state.fsdp_plugin
        # Accelerate would wrap the layers once more in each round.
        rule = "false for rounds; gradient_checkpointing=True does the same"
        check(not plugin.activation_checkpointing, "fsdp_config's activation_checkpointing", True, rule)

    def _shard(self) -> None:
        """Let FSDP2 or DeepSpeed lay out the model now and not in the first round's training."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            self._place_for_deepspeed()
        if not self.is_fsdp_enabled or isinstance(self.model, FSDPModule):
            return
        self._check_sharding()  # a construction computes the reference of held-out pairs
        # Accelerate shards a model together with an optimizer; that of a round is made of the shards.
        unused = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.model, _ = self.accelerator.prepare(self.model, unused)
        self.model_wrapped = self.callback_handler.model = self.model
        register_fsdp_forward_method(self.model, "generate")

    def _place_for_deepspeed(self) -> None:
        """Put the model where DeepSpeed will have it, and in its precision."""
        self._check_sharding()
        place_for_deepspeed(self)
        wide = self._wide
        if self.rounds_weights() and wide is None:
            wide = {name: own_part(p).float() for name, p in self.policy_parameters().items()}
            self.model.to(self._deepspeed().dtype())
        if zero_stage(self) == 3:
            whole = not any(map(is_split, self.model.parameters()))
            self._split()
            if wide is not None and whole:
                of = self.policy_parameters()
                wide = {name: part_of_whole(tensor, of[name], name) for name, tensor in wide.items()}
        self._wide = wide

    def _split(self) -> None:
        """Let stage 3 split the model, with an engine that trains nothing."""
        with evaluation_mode(self.model):  # which it would be left in
            engine = prepare_deepspeed(self.model, self.accelerator)
        self.deepspeed = self.model_wrapped = cast(Any, engine)
        know_model(self.accelerator, engine)

    def _end_engine(self) -> None:
        """Take the engine off the model, if there is one; training makes another."""
        if self.deepspeed is not None:
            end_engine(self.deepspeed)
        self.deepspeed, self.model_wrapped = None, self.model

    def _deepspeed(self) -> Any:
        return cast(Any, self.accelerator.state).deepspeed_plugin.hf_ds_config

    def rounds_weights(self) -> bool:
        """Return whether the model holds, by DeepSpeed's bf16 or fp16, no more than a policy's rounding."""
        return self.is_deepspeed_enabled and self._deepspeed().dtype() != torch.float32

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Make the engine as Trainer does, and let its optimizer begin with the policy, not its rounding."""
        found = super()._prepare_for_training(  # pyright: ignore[reportAttributeAccessIssue]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self._wide is not None and resume_from_checkpoint is None:
            put_fp32_copies(self.policy_parameters(), self._wide)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does, under DeepSpeed also without an engine that trains.

        With stage 3 always from the parameters: Trainer may write what the engine's optimizer trains instead,
        which after a round is the point that was trained, and not the policy.
        """
        split = zero_stage(self) == 3
        if not self.is_deepspeed_enabled or (trains(self.model_wrapped) and not split):
            super().save_model(output_dir, _internal_call)  # pyright: ignore[reportAttributeAccessIssue]
            return
        tensors: dict[str, Any] = {}
        if split:
            self._shard()
            adapted = isinstance(self.model, PeftModel)
            tensors["state_dict"] = whole_state_dict(self.deepspeed, trained_only=adapted)
        self._save(output_dir, **tensors)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
