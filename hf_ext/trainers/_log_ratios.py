"""TRL's DPO with a loss over the log-ratios of any number of completions for a prompt.

DPO's own loss is one chain over pairs. Here a batch has R rows in any layout, each with a completion; their
log-probabilities under policy and reference are computed once and handed to the method as `LogRatios`, from
which it makes one loss for each of the batch's B samples. Their mean is the loss of the micro-batch. Kept
from DPO: the choice of the reference, precomputed references, the auxiliary loss of experts, and the metrics
that have a meaning without pairs (`entropy` and `mean_token_accuracy` over all completions, `num_tokens`,
`aux_loss`).
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from .._compat.trl import common_prefix_length, disable_gradient_checkpointing, use_adapter
from ..core.checks import check
from ._base import check_vocabulary, own_args, refuse_trained_reference
from ._reference import completion_labels, model_inputs, reference_model, sum_of_tokens, token_logps

# Fields of DPO's chain of losses, which a method with a loss of its own does not read.
_OF_THE_CHAIN = (
    *("beta", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"),
    *("label_smoothing", "use_weighting", "discopop_tau"),
)


@dataclass(frozen=True)
class LogRatios:
    """What one batch gives a loss; the log-ratios of its R completions are `policy - reference`.

    Args:
        policy: (R,) log-probabilities under the policy, nats, summed over tokens in fp32; with gradients.
        reference: (R,) the same under the reference, without gradients.
        lengths: (R,) tokens of each completion.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor

    @property
    def ratios(self) -> Tensor:
        """Return log pi - log pi_ref of each row, (R,)."""
        return self.policy - self.reference


class LogRatioTrainer(DPOTrainer):
    """DPO with a loss that a method computes in `sample_losses`; base of the methods, after `MethodTrainer`.

    Raises:
        TypeError: `args` is not the trainer's own config.
        ValueError: A setting of DPO's own losses is changed, `data_collator` is given, or `ref_model` shares
            tensors with the policy or has another vocabulary.
    """

    # Keys of a batch that are for the method alone.
    own_inputs: ClassVar[frozenset[str]] = frozenset()

    # What DPO and `MethodTrainer` bring.
    args: Any
    model: Any
    accelerator: Any
    data_collator: Any
    _total_train_tokens: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *positional: Any,
        **keywords: Any,
    ) -> None:
        args = own_args(self, args)
        refuse_dpos_losses(args)
        if ref_model is not None and not isinstance(model, str):
            refuse_trained_reference(model, ref_model, "ref_model")
            check_vocabulary(model, ref_model, "ref_model")
        given = type(data_collator).__name__
        check(data_collator is None, "data_collator", given, "left out: rows are laid out for this loss")
        super().__init__(model, ref_model, args, self.make_collator(args), *positional, **keywords)
        self.data_collator.pad_token_id = self._tokenizer.pad_token_id  # known by now

    # What a method overrides ----------------------------------------------------------------------

    @abstractmethod
    def make_collator(self, args: Any) -> Any:
        """Return the collator; its `pad_token_id` is set later."""

    @abstractmethod
    def sample_losses(self, rows: LogRatios, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss (B,) of each sample.

        Args:
            rows: Of one forward.
            inputs: The batch, with the `own_inputs`.
        """

    def complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with whatever the collator could not know."""
        return inputs

    def chunks(self, inputs: Mapping[str, Any]) -> list[slice]:
        """Return the rows of each forward, in order; those after the first keep no activations."""
        return [slice(0, len(inputs["input_ids"]))]

    def reference_rows(self, inputs: Mapping[str, Any]) -> list[tuple[slice, str | None]]:
        """Return parts of the rows with the adapter that is their reference; None for DPO's own."""
        return [(slice(0, len(inputs["input_ids"])), None)]

    @abstractmethod
    def precomputed(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the reference (R,) from the columns of a batch."""

    # DPO's methods --------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        inputs = self.complete(inputs)
        policy = self._policy(model, inputs)
        reference = self.precomputed(inputs) if self.precompute_ref_logps else self.reference_logps(inputs)
        lengths = inputs["completion_mask"][:, 1:].sum(dim=1)
        loss = self.sample_losses(LogRatios(policy.logps, reference, lengths), inputs).mean()
        if policy.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * policy.aux_loss
        self._log_policy(policy, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs(inputs, self.own_inputs))

    def reference_logps(self, inputs: Mapping[str, Any], model: Any = None) -> Tensor:
        """Return the reference's log-probabilities of the rows, (R,), fp32, without gradients.

        Args:
            inputs: A batch.
            model: What computes DPO's own reference, where it is not yet in its place.
        """
        labels = completion_labels(inputs)
        given = model_inputs(inputs, self.own_inputs)
        found = inputs["completion_mask"].new_zeros(len(labels), dtype=torch.float32)
        for rows, adapter in self.reference_rows(inputs):
            with self._reference(adapter, model) as frozen:
                for part in self.chunks(inputs):
                    both = slice(max(rows.start, part.start), min(rows.stop, part.stop))
                    if both.start < both.stop:
                        found[both] = sum_of_tokens(token_logps(frozen, _rows(given, both), labels[both]))
        return found

    @contextlib.contextmanager
    def _reference(self, adapter: str | None, model: Any) -> Generator[Any]:
        if adapter is None and (model is None or isinstance(self.model, PeftModel)):
            with reference_model(self) as frozen:
                yield frozen if model is None else model
            return
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        context = contextlib.nullcontext() if adapter is None else use_adapter(unwrapped, adapter)
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing), context:
            yield self.model if model is None else model

    def _policy(self, model: Any, inputs: Mapping[str, Any]) -> _Outputs:
        labels = completion_labels(inputs)
        given = model_inputs(inputs, self.own_inputs)
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        first, *others = self.chunks(inputs)
        # The first goes through the wrapped model, which tells DDP of the coming backward pass. The others do
        # not, as they run again within it.
        parts = [_forward(model, _rows(given, first), labels[first])]
        bare = self.accelerator.unwrap_model(model)
        for rows in others:
            chunk = (bare, _rows(given, rows), labels[rows])
            recompute = torch.is_grad_enabled() and self.model.training
            parts.append(checkpoint(_forward, *chunk, use_reentrant=False) if recompute else _forward(*chunk))
        return _Outputs.joined(parts, [len(part.logps) for part in parts])

    def _log_policy(self, policy: _Outputs, inputs: Mapping[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        sums = [policy.entropy, policy.top1, policy.tokens, inputs["attention_mask"].sum()]
        gathered = self.accelerator.gather(torch.stack([value.double() for value in sums])[None])
        entropy, top1, tokens, seen = gathered.sum(dim=0).tolist()
        self._metrics[mode]["entropy"].append(entropy / max(tokens, 1))
        self._metrics[mode]["mean_token_accuracy"].append(top1 / max(tokens, 1))
        if mode == "train":
            self._total_train_tokens += int(seen) // int(self._tp_size or 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if policy.aux_loss is not None:
            mean = self.accelerator.gather(policy.aux_loss.detach()).mean().item()
            self._metrics[mode]["aux_loss"].append(mean)


@dataclass(frozen=True)
class _Outputs:
    """The policy's forward: logps (r,), sums over tokens, and the auxiliary loss or None."""

    logps: Tensor
    entropy: Tensor
    top1: Tensor
    tokens: Tensor
    aux_loss: Tensor | None

    @classmethod
    def joined(cls, parts: list[_Outputs], sizes: list[int]) -> _Outputs:
        """Return the outputs of all rows; the auxiliary losses are averaged by rows."""
        aux = [
            part.aux_loss * size for part, size in zip(parts, sizes, strict=True) if part.aux_loss is not None
        ]
        return cls(
            torch.cat([part.logps for part in parts]),
            *(sum_of(getattr(part, name) for part in parts) for name in ("entropy", "top1", "tokens")),
            aux_loss=sum_of(aux) / sum(sizes) if aux else None,
        )


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(dim=0)


def _forward(model: Any, given: dict[str, Any], labels: Tensor) -> _Outputs:
    outputs = model(**given, labels=labels, fused_lm_head=True)
    mask = labels[:, 1:] != -100
    width = mask.size(1)  # prompt-learning adapters put virtual tokens before the real ones
    return _Outputs(
        logps=sum_of_tokens(outputs.log_probs[:, -width:]),
        entropy=(outputs.entropy[:, -width:].detach() * mask).sum(),
        top1=(outputs.is_top1[:, -width:] & mask).sum(),
        tokens=mask.sum(),
        aux_loss=outputs.aux_loss if given.get("output_router_logits") else None,
    )


def _rows(given: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {key: value[rows] if isinstance(value, Tensor) else value for key, value in given.items()}


def refuse_dpos_losses(args: DPOConfig) -> None:
    """Raise if a field of DPO's own losses is changed: it would do nothing.

    Raises:
        ValueError: One is; the text names it.
    """
    for one in fields(DPOConfig):
        if one.name in _OF_THE_CHAIN:
            default = ["sigmoid"] if one.name == "loss_type" else one.default
            value = getattr(args, one.name)
            check(value == default, one.name, value, f"left at {default!r}: the loss is the method's own")


# Data -------------------------------------------------------------------------------------------------------


def encode_completions(example: Mapping[str, Any], completions: list[Any], tokenizer: Any) -> dict[str, Any]:
    """Return the token ids of a prompt and of its completions as DPO cuts them.

    The completions begin where the tokens of the prompt and of the prompt with one of them first differ,
    which is not always after the prompt. Texts get the end-of-text token at their end.

    Args:
        example: A row with `prompt`, and `tools` and `chat_template_kwargs` for a chat where there are any.
        completions: Texts or lists of messages.
        tokenizer: The tokenizer.

    Returns:
        `prompt_ids` and `completion_ids`, one list for each completion.
    """
    prompt = example["prompt"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        texts = [prompt + (text if text.endswith(end) else text + end) for text in completions]
        start = tokenizer(text=prompt)["input_ids"]
        whole = [tokenizer(text=text)["input_ids"] for text in texts]
    else:
        settings = {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}
        settings |= {"tokenize": True, "return_dict": True}
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **settings)["input_ids"]
        whole = [
            tokenizer.apply_chat_template(prompt + as_messages(one), **settings)["input_ids"]
            for one in completions
        ]
    cut = min(common_prefix_length(start, ids) for ids in whole)
    return {"prompt_ids": start[:cut], "completion_ids": [ids[cut:] for ids in whole]}


def as_messages(completion: Any) -> list[dict[str, Any]]:
    """Return a completion of a chat as messages; a text is one of the assistant's."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
