"""TRL's SFT with another loss over the log-probabilities of a batch's tokens; its metrics stay as they are.

SFT computes loss and metrics in one method, from one forward with the fused head. That method runs here
unchanged on a stand-in for the model, which hands the outputs of the wrapped model on with the
log-probabilities exchanged: what SFT then sums, negates and divides is the method's own loss. Its division by
the tokens of all micro-batches and processes, its auxiliary loss and its metrics apply without a second
forward. Evaluation runs SFT's own loss.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from trl.trainer.sft_trainer import SFTTrainer

from .._compat import deepspeed
from ..core.checks import check
from ..core.dist import full_tensor
from ._base import check_columns, check_filled, own_args

T = TypeVar("T")
# Column with the number of a training row, in the order in which the rows were given.
ROW = "row_id"
# Logits of one piece of a batch, for losses over whole distributions.
_PIECE = 1 << 24


@dataclass(frozen=True)
class TokenOutputs:
    """What one forward gives for a batch; position t of L - 1 predicts token t + 1.

    Args:
        log_probs: (B, L - 1) nats, zero where `label_mask` is False.
        label_mask: (B, L - 1), whether the label counts.
        is_top1: (B, L - 1), whether the label is the most likely token.
        labels: (B, L - 1), -100 where they do not count.
        hidden: (B, L - 1, H), the head's input; None unless the trainer `needs_hidden`.
    """

    log_probs: Tensor
    label_mask: Tensor
    is_top1: Tensor
    labels: Tensor
    hidden: Tensor | None = None

    def rows(self, rows: slice) -> TokenOutputs:
        """Return the outputs of some rows."""
        hidden = None if self.hidden is None else self.hidden[rows]
        kept = (self.log_probs, self.label_mask, self.is_top1, self.labels)
        return TokenOutputs(*(value[rows] for value in kept), hidden=hidden)

    def at_labels(self) -> Tensor:
        """Return the hidden states (N, H) at the N positions whose label counts, in their order."""
        assert self.hidden is not None
        return self.hidden[self.label_mask]

    def spread(self, values: Tensor) -> Tensor:
        """Return values (N,) of the positions whose label counts as (B, L - 1), zero elsewhere."""
        return torch.zeros_like(self.log_probs).masked_scatter(self.label_mask, values.to(self.log_probs))


class TokenLossTrainer(SFTTrainer):
    """SFT with a loss that a method computes in `token_loss`; base of the methods, after `MethodTrainer`.

    SFT's arguments are all kept. What computes SFT's loss in another way is refused: `loss_type="dft"`, label
    smoothing, Liger, `compute_loss_func` and DeepSpeed's sequence parallelism.

    Raises:
        TypeError: `args` is not the trainer's own config.
        ValueError: A refused setting is on.
    """

    # Whether `token_loss` is given hidden states.
    needs_hidden: bool = False
    # Keys of a batch that are for `token_loss` alone.
    own_inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, args: Any = None, *positional: Any, **keywords: Any) -> None:
        args = own_args(self, args)
        _refuse_other_losses(args)
        super().__init__(model, args, *positional, **keywords)
        check(self.compute_loss_func is None, "compute_loss_func", self.compute_loss_func, "None")
        images = self._is_vision_dataset and self.wants_row_ids(args)
        check(not images, "train_dataset", "images", "text: rows are numbered as they are tokenized")
        parallel = self.accelerator.parallelism_config
        check(
            parallel is None or not (parallel.sp_enabled or parallel.cp_enabled),
            "parallelism_config",
            parallel,
            "without context or sequence parallelism",
        )
        refused = self.needs_hidden and is_prompt_learning(self.model)
        check(not refused, "peft_config", "prompt learning", "an adapter without virtual tokens")

    # What a method overrides ----------------------------------------------------------------------

    def replaces_loss(self) -> bool:
        """Return whether the coming micro-batch has a loss of its own; if not, SFT's is computed as it is."""
        return True

    @abstractmethod
    def token_loss(self, outputs: TokenOutputs, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss of a micro-batch.

        Args:
            outputs: Of one forward, with gradients.
            inputs: The model's inputs and the `own_inputs`.

        Returns:
            (B, L - 1) losses of tokens, zero where no label counts: SFT sums them and divides by the tokens
            of the whole batch. Or a scalar: the loss of the micro-batch, for trainers with
            `loss_is_scaled_for_ga = False`.
        """

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        """Run another model on a micro-batch, before there is a graph of the model in training.

        Args:
            inputs: As `token_loss` will be given them.
        """

    def forward_parts(self, inputs: Mapping[str, Any]) -> list[slice]:
        """Return which rows of a micro-batch go through the model together; by default all of them."""
        return [slice(None)]

    def wants_row_ids(self, args: Any) -> bool:
        """Return whether training rows are to carry their number (`ROW`) into the batches."""
        return False

    # SFT's methods --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return SFT's loss with the method's in the place of the negative log-likelihoods."""
        own = {name: inputs.pop(name) for name in self.own_inputs if name in inputs}
        training = cast(nn.Module, self.model).training
        if not training or not self.replaces_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.loss_is_scaled_for_ga is False:
            num_items_in_batch = None  # else SFT would scale its auxiliary loss by it
        self.before_forward({**inputs, **own})
        states: list[Tensor] = []
        found: list[Tensor] = []
        parts, multiple = self.forward_parts({**inputs, **own}), cast(Any, self.args).pad_to_multiple_of

        def call(**given: Any) -> Any:
            return forward_in_parts(model, given, parts, states, multiple)

        def exchange(outputs: Any) -> Any:
            loss = self.token_loss(
                TokenOutputs(
                    log_probs=outputs.log_probs,
                    label_mask=outputs.label_mask,
                    is_top1=outputs.is_top1,
                    labels=inputs["labels"][:, 1:],
                    hidden=states[-1][:, :-1] if states else None,
                ),
                {**inputs, **own},
            )
            found.append(loss)
            outputs.log_probs = -loss if loss.ndim else torch.zeros_like(outputs.log_probs)
            return outputs

        with last_hidden_states(self.accelerator.unwrap_model(model), states if self.needs_hidden else None):
            through: Any = _Through(call if len(parts) > 1 else model, exchange)
            done = super().compute_loss(through, inputs, return_outputs, num_items_in_batch)
        if found[0].ndim:
            return done
        if return_outputs:
            return done[0] + found[0], done[1]
        return done + found[0]

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Check the rows for training, and number them where the method wants that, beside what SFT does."""
        if dataset_name == "train" and formatting_func is None:
            check_rows(dataset, args, "train_dataset")
        if ROW in (dataset.column_names or ()):  # of another trainer, or rows that were trained on
            dataset = dataset.remove_columns(ROW)
        if dataset_name == "train" and self.wants_row_ids(args):
            if not isinstance(dataset, Dataset):
                raise TypeError("train_dataset must be a Dataset: rows of a stream have no fixed numbers")
            dataset = dataset.add_column(ROW, list(range(len(dataset))))  # type: ignore[call-arg]
        return super()._prepare_dataset(
            dataset, processing_class, args, packing, formatting_func, dataset_name
        )

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the rows' numbers."""
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        if self.wants_row_ids(self.args) and ROW not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW]


@dataclass
class RowIdCollator:
    """Collator that keeps the rows' numbers (B,) under `ROW`, where they have some.

    Args:
        inner: The collator of the rows themselves.
    """

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one batch."""
        batch = self.inner([{k: v for k, v in row.items() if k != ROW} for row in examples])
        if ROW in examples[0]:
            batch[ROW] = torch.tensor([row[ROW] for row in examples])
        return batch


def check_rows(dataset: Any, args: Any, field: str) -> None:
    """Raise unless a data set's rows are of a form that SFT takes, with no text empty.

    Args:
        dataset: Rows of a prompt and a completion, of messages, of one text, or of tokens.
        args: The trainer's settings.
        field: The argument that gave it, for the error.

    Raises:
        ValueError: A column is missing, or a text is empty.
    """
    first = next(iter(dataset), {})
    whole = {"input_ids", "messages", "conversations", args.dataset_text_field} & set(first)
    needed = tuple(sorted(whole)) or ("prompt", "completion")
    check_columns(dataset, needed, field)
    check_filled(dataset, () if "input_ids" in whole else needed, field)


def refuse_without_rows(args: Any, why: str) -> None:
    """Raise if a batch's rows would not be the data set's rows: packing, padding-free, prepared elsewhere.

    Raises:
        ValueError: Such a setting is on.
    """
    for name in ("packing", "padding_free"):
        check(not getattr(args, name), name, True, f"False: {why}")
    prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    check(not prepared, "dataset_kwargs", args.dataset_kwargs, f"without skip_prepare_dataset: {why}")


def is_prompt_learning(model: Any) -> bool:
    """Return whether a model's adapter puts virtual tokens before the real ones."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def _refuse_other_losses(args: Any) -> None:
    rule = "the loss is the method's own"
    check(args.loss_type == "nll", "loss_type", args.loss_type, f"'nll': {rule}")
    smoothing = args.label_smoothing_factor
    check(smoothing == 0.0, "label_smoothing_factor", smoothing, f"0: {rule}")
    check(not args.use_liger_kernel, "use_liger_kernel", True, f"False: {rule}")


class _Through:
    """A model for SFT to call; outputs of its fused head go through a function first."""

    def __init__(self, model: Any, change: Callable[[Any], Any]) -> None:
        self.model, self.change = model, change

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        return self.change(outputs) if inputs.get("fused_lm_head") else outputs


def forward_in_parts(
    model: Any, inputs: Mapping[str, Any], parts: list[slice], states: list[Tensor], multiple: int | None
) -> Any:
    """Run a model with TRL's fused head on parts of a batch's rows, each without the padding of the others.

    Args:
        model: The model.
        inputs: Its inputs, with `input_ids` (B, L), padded on the right.
        parts: Rows of each forward; together all of them, in order.
        states: Where `last_hidden_states` appends; the parts' are replaced by those of the batch.
        multiple: Lengths are rounded up to a multiple of it; None for no rounding.

    Returns:
        The outputs of the batch; positions that were cut off have zeros, and a label that does not count.
    """
    if len(parts) == 1 or not inputs.get("fused_lm_head"):
        return model(**inputs)
    rows, longest = inputs["input_ids"].shape
    outputs, cut = [], []
    before = len(states)
    for part in parts:
        used = int(inputs["attention_mask"][part].any(0).nonzero().max()) + 1
        length = min(longest, -(-used // multiple) * multiple if multiple else used)
        own = {name: _of_part(value, part, rows, longest, length) for name, value in inputs.items()}
        outputs.append(model(**own))
        cut.append(longest - length)

    def join(values: list[Tensor], axis: int) -> Tensor:
        padding = (0, 0) * (values[0].ndim - 1 - axis)
        return torch.cat([F.pad(value, (*padding, 0, more)) for value, more in zip(values, cut, strict=True)])

    if len(states) > before:
        states[before:] = [join(states[before:], 1)]
    joined = {
        name: join([output[name] for output in outputs], 1)
        for name, value in outputs[0].items()
        if isinstance(value, Tensor) and value.ndim == 2
    }
    return type(outputs[0])(**joined)


def _of_part(value: Any, part: slice, rows: int, longest: int, length: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
        return value
    return value[part, :length] if value.ndim > 1 and value.size(1) == longest else value[part]


# Whole distributions ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def last_hidden_states(model: Any, into: list[Tensor] | None) -> Generator[None]:
    """Collect what a causal language model's head is given, (B, L, H), at each forward.

    Args:
        model: The model, unwrapped; a PeftModel or not.
        into: Where each forward's hidden states are appended; None for nowhere.
    """
    if into is None:
        yield
        return
    causal = _causal(model)

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        into.append(output.last_hidden_state)

    handle = causal.base_model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _causal(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass(frozen=True)
class Head:
    """A language model's head as it is now; its tensors may be exchanged in the model later.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        scale: Factor of the logits.
        softcap: c in c tanh(z / c), after the scale; None for none.
        layer: The head itself where DeepSpeed's stage 3 splits its tensors, which are whole within `run`;
            else None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    layer: nn.Module | None = None

    @classmethod
    def of(cls, model: Any, *, detach: bool = False) -> Head:
        """Return a model's head.

        Args:
            model: The causal language model, unwrapped; a PeftModel or not.
            detach: Whether the tensors take no gradients, and stay these when the parameters get others; not
                where DeepSpeed's stage 3 shards them, which brings parameters together alone.
        """
        causal = _causal(model)
        layer, config = causal.get_output_embeddings(), causal.config.get_text_config()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        split = deepspeed.is_split(weight)
        if detach and not split:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
            if any(isinstance(module, FSDPModule) for module in causal.modules()):
                # What FSDP gathered for the forward, it gives back.
                weight = full_tensor(weight).clone()
                bias = None if bias is None else full_tensor(bias).clone()
        own = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(weight, bias, _logit_scale(config), softcap, own if split else None)

    @classmethod
    def kept(cls, model: Any) -> Head:
        """Return a head without gradients that stays when the parameters get other values (a collective)."""
        head = cls.of(model, detach=True)
        if head.layer is None:
            return head
        with deepspeed.gathered([head.weight, head.bias]):
            weight, bias = (None if x is None else x.detach().clone() for x in (head.weight, head.bias))
        return replace(head, weight=cast(Tensor, weight), bias=bias, layer=None)

    @property
    def vocabulary(self) -> int:
        """V."""
        return deepspeed.whole_shape(self.weight)[0]

    def run(self, function: Callable[[Tensor], T], hidden: Tensor) -> T:
        """Return a function of hidden states (N, H) that uses this head, which may be split (a collective).

        The layer that brings its tensors together, for the backward pass too, is called once: how often the
        function uses the head need not be the same on all processes.
        """
        layer: Any = self.layer
        if layer is None:
            return function(hidden)
        own = layer.__dict__.get("forward")
        layer.forward = function
        try:
            return layer(hidden)
        finally:
            del layer.forward
            if own is not None:
                layer.forward = own

    def log_probs(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities (N, V), fp32, for hidden states (N, H)."""
        weight = self.weight
        logits = F.linear(hidden.to(weight.dtype), weight, self.bias).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.log_softmax(logits / temperature, dim=-1)


def _logit_scale(config: Any) -> float:
    """Return the factor of a model's logits, by the names that TRL's fused head reads."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    value = getattr(config, "logits_scaling", None)
    if value is None:
        return 1.0
    return float(value) if config.model_type == "hyperclovax" else 1.0 / float(value)


def cross_entropy_to(head: Head, hidden: Tensor, target: Callable[[slice], Tensor]) -> Tensor:
    """Return the cross-entropy -sum_v t_v log p_v of each position to a target distribution.

    The logits of a piece of the positions exist at a time, and are computed again for the backward pass.

    Args:
        head: Of the model in training.
        hidden: (N, H), its hidden states.
        target: Gives the distributions t, (n, V) in fp32, of a slice of the positions.

    Returns:
        (N,) nats, fp32.
    """

    def piece(states: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            wanted = target(rows)
        return -(wanted * head.log_probs(states)).sum(-1)

    def all_pieces(hidden: Tensor) -> Tensor:
        parts = [checkpoint(piece, hidden[rows], rows, use_reentrant=False) for rows in pieces(hidden, head)]
        return torch.cat(parts) if parts else hidden.sum(-1)  # no position: zeros of shape (0,)

    return head.run(all_pieces, hidden)


def pieces(hidden: Tensor, head: Head) -> list[slice]:
    """Return slices of positions whose logits fit in memory together."""
    size = max(1, _PIECE // head.vocabulary)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
