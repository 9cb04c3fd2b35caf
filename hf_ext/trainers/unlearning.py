"""Unlearning: lower the likelihood of a forget set, and hold a retain set, with a choice of losses.

Source: Zhang et al. 2024, "Negative Preference Optimization: From Catastrophic Collapse to Effective
Unlearning", arXiv 2404.05868 (NPO); the losses as compared by Jia et al. 2024, "WAGLE: Strategic Weight
Attribution for Effective and Modular Unlearning in Large Language Models", arXiv 2410.17509. With l the mean
negative log-likelihood of a batch's label tokens, s the sum of a row's log-probabilities, s_ref the same
under the model that training started from, and d = s - s_ref:
ga: -l_f; graddiff: -l_f + gamma l_r; npo: -(2 / beta) mean log sigmoid(-beta d) + gamma l_r; po: l of
refusals in the place of the answers to forget + gamma l_r.

Differs from the paper and from WAGLE's code:
- NPO is as NPO's paper defines it, with one d for each row over the sum of its tokens; the code has one d for
  each batch, over the mean of its tokens (`npo_level="token_mean"`).
- The KL to the reference on retain rows is forward, KL(p_ref || p), over label tokens. The code's
  -sum p log p_ref over all positions, padding too, is least where p is one-hot, not where p = p_ref.
- Which retain rows go with a forget row depends on the seed, the row and the epoch alone.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig

from ..adapters._data_start import awaits_data
from ..core import dist
from ..core.checks import check, check_choice
from ..core.registry import Variant
from ._base import (
    Inputs,
    MethodTrainer,
    check_columns,
    check_filled,
    check_map,
    register_trainer,
    zero_stage,
)
from ._reference import before_training, evaluation_mode, model_inputs, sum_of_tokens, token_logps
from ._snapshots import HeldWeights, trained_tensors
from ._token_loss import (
    ROW,
    Head,
    TokenLossTrainer,
    TokenOutputs,
    cross_entropy_to,
    forward_in_parts,
    is_prompt_learning,
    last_hidden_states,
    refuse_without_rows,
)

__all__ = ["UnlearnCollator", "UnlearningConfig", "UnlearningTrainer", "npo_loss", "npo_weight"]

LOSSES = ("ga", "graddiff", "npo", "po")
RETAIN_LOSSES = ("nll", "kl", "none")
NPO_LEVELS = ("sequence", "token_mean")
logger = logging.getLogger(__name__)


@dataclass
class UnlearningConfig(SFTConfig):
    """Settings of unlearning, beside those of SFT.

    Args:
        unlearn_loss: "ga", "graddiff", "npo" or "po".
        retain_loss: "nll", "kl" (to the model that training started from) or "none"; "ga" has none.
        gamma_u: Weight gamma of the retain term, at least 0.
        npo_beta: beta of NPO, above 0; towards 0 it is gradient ascent.
        npo_level: "sequence" for a d of each row, or "token_mean" for one d per batch and token.
        retain_per_forget: Retain rows drawn for each forget row, at least 0.
        max_forget_loss: "ga" and "graddiff" stop when the forget rows' loss exceeds it, nats per token; None
            for the log of the vocabulary's size, the loss of a uniform guess.
        precompute_ref: Whether NPO's reference log-probabilities are computed once at the start; if not, a
            copy of the trained tensors is kept and run at each step.
        refusals: Answers that "po" draws from, one for each forget row; None where the data have a column
            `refusal`.
        separate_forward: Whether forget and retain rows have a forward each, without the padding that the
            longer rows of the other set would need; the loss is the same.
        global_norm: Whether means are over the tokens and rows of an update, on all processes and in all its
            micro-batches; if not, over those of each micro-batch, so that rows weigh by the one they are in.

    Raises:
        ValueError: A field is outside its range.
    """

    unlearn_loss: str = "npo"
    retain_loss: str = "nll"
    gamma_u: float = 1.0
    npo_beta: float = 0.1
    npo_level: str = "sequence"
    retain_per_forget: int = 1
    max_forget_loss: float | None = None
    precompute_ref: bool = True
    refusals: list[str] | None = None
    separate_forward: bool = False
    global_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("unlearn_loss", self.unlearn_loss, LOSSES)
        check_choice("retain_loss", self.retain_loss, RETAIN_LOSSES)
        check_choice("npo_level", self.npo_level, NPO_LEVELS)
        check(0 <= self.gamma_u < math.inf, "gamma_u", self.gamma_u, "at least 0")
        check(0 < self.npo_beta < math.inf, "npo_beta", self.npo_beta, "above 0")
        check(self.retain_per_forget >= 0, "retain_per_forget", self.retain_per_forget, "at least 0")
        bound = self.max_forget_loss
        check(bound is None or bound > 0, "max_forget_loss", bound, "above 0, or None")
        answers = self.refusals
        check(answers is None or (bool(answers) and all(answers)), "refusals", answers, "answers, none empty")
        refuse_without_rows(self, "the losses are of single rows")
        one_d = self.unlearn_loss == "npo" and self.npo_level == "token_mean"
        rule = "False with npo_level='token_mean', which has one log-ratio for each micro-batch"
        check(not (self.global_norm and one_d), "global_norm", True, rule)

    @property
    def retains(self) -> bool:
        """Whether batches have retain rows."""
        wanted = self.unlearn_loss != "ga" and self.retain_loss != "none"
        return wanted and self.gamma_u > 0 and self.retain_per_forget > 0


# The losses -------------------------------------------------------------------------------------------------


def npo_loss(d: Tensor, beta: float) -> Tensor:
    """Return NPO's loss of log-ratios d (N,) to the reference, as a scalar."""
    return -(2.0 / beta) * F.logsigmoid(-beta * d).mean()


def npo_weight(d: Tensor, beta: float) -> Tensor:
    """Return what NPO weighs each row's gradient by (N,): 1 at the reference, 0 once a row is forgotten."""
    return 2.0 * torch.sigmoid(beta * d)


def mean_nll(outputs: TokenOutputs) -> Tensor:
    """Return the mean negative log-likelihood of the rows' label tokens, nats, as a scalar in fp32."""
    return -outputs.log_probs.float().sum() / outputs.label_mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Counts:
    """What the means of an update are over, with `global_norm`.

    Args:
        forget_tokens: Label tokens of its forget rows.
        retain_tokens: Label tokens of its retain rows.
        forget_rows: Its forget rows.
        micro_batches: Its micro-batches on all processes, whose losses are averaged.
    """

    forget_tokens: float
    retain_tokens: float
    forget_rows: float
    micro_batches: float

    @classmethod
    def of(cls, batches: list[dict[str, Any]], first: int) -> Counts:
        """Return the counts of an update (a collective).

        Args:
            batches: This process's micro-batches.
            first: The first position whose label can be predicted: 1, or 0 after virtual tokens.
        """
        found = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            there, count = batch["labels"][:, first:] != -100, batch["num_forget"]
            tokens = [float(there[rows].sum()) for rows in (slice(count), slice(count, None))]
            found += torch.tensor([*tokens, count, 1.0], dtype=torch.float64)
        return cls(*dist.all_reduce_sum_(found).tolist())


# Batches ----------------------------------------------------------------------------------------------------


class UnlearnCollator:
    """Collator that puts retain rows below the forget rows, and `num_forget` (int) into the batch.

    Which ones depends on the seed, the forget row's number and the epoch alone, so that the loader's workers,
    the processes and a resumed run all draw the same. Rows without a number, as in evaluation, stay alone.

    Args:
        inner: Collator of rows with `input_ids` and `labels`.
        retain: Those rows; None for none.
        per_forget: Retain rows for each forget row; without repetition among them where there are enough.
        seed: Of the draws.
    """

    def __init__(
        self, inner: Callable[[list[Any]], dict[str, Any]], retain: Any, per_forget: int, seed: int
    ) -> None:
        self.inner, self.retain, self.per_forget, self.seed = inner, retain, per_forget, seed
        # In memory that workers share: persistent ones keep the collator of the first epoch.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    def start_epoch(self, epoch: int) -> None:
        """Draw for another epoch from now on."""
        self._epoch.fill_(epoch)

    def draw(self, row: int) -> list[int]:
        """Return the numbers of the retain rows that go with a forget row in this epoch."""
        if self.retain is None:
            return []
        numbers = range(len(self.retain))
        stream = random.Random(f"{self.seed}/{row}/{int(self._epoch)}")
        if self.per_forget <= len(numbers):
            return stream.sample(numbers, self.per_forget)
        return stream.choices(numbers, k=self.per_forget)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one padded batch."""
        if ROW not in examples[0]:
            return self.inner(examples)
        drawn = [self.retain[number] for row in examples for number in self.draw(row[ROW])]
        rows = [*examples, *drawn]
        batch = self.inner([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        batch["num_forget"] = len(examples)
        batch[ROW] = torch.tensor([row[ROW] for row in examples])
        return batch


class _Watch(TrainerCallback):
    """Tells the collator the epoch, and stops a run whose forget loss is out of bounds."""

    def __init__(self, trainer: UnlearningTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.unlearn_collator.start_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._counts = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.unlearn_loss not in ("ga", "graddiff"):
            return
        # Means over processes: all of them stop at the same step.
        last = self.trainer.step_losses()
        if not last <= self.trainer.max_forget_loss:
            logger.warning(
                "training stops after step %d: the forget rows' loss %.4g is above max_forget_loss %.4g",
                *(state.global_step, last, self.trainer.max_forget_loss),
            )
            control.should_training_stop = control.should_log = True


# The trainer ------------------------------------------------------------------------------------------------


@register_trainer(
    "unlearning",
    summary="forgets a set of rows and holds another, by NPO, gradient difference or refusals",
    title="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
    paper="arXiv:2404.05868",
    config=UnlearningConfig,
    inputs=Inputs(columns=(("prompt", "completion"),), datasets={"retain_dataset": False}),
    neutral=None,
    supports={"per_micro_batch"},
    test_kwargs={},
    variants=(
        Variant(
            name="graddiff_kl",
            test_kwargs={"unlearn_loss": "graddiff", "retain_loss": "kl", "max_forget_loss": 1e4},
        ),
        Variant(name="refusals", test_kwargs={"unlearn_loss": "po", "refusals": ["I do not know.", "No."]}),
    ),
    bad_kwargs=(
        {"unlearn_loss": "dpo"},
        {"retain_loss": "ce"},
        {"gamma_u": -1.0},
        {"npo_beta": 0.0},
        {"npo_level": "token"},
        {"retain_per_forget": -1},
        {"max_forget_loss": 0.0},
        {"refusals": []},
        {"unlearn_loss": "npo", "npo_level": "token_mean", "global_norm": True},
        {"packing": True},
        {"loss_type": "dft"},
    ),
)
class UnlearningTrainer(MethodTrainer, TokenLossTrainer):
    """SFT's trainer with one of the losses above in the place of the negative log-likelihood.

    `train_dataset` is the set to forget. Each micro-batch holds its rows and the retain rows drawn for them,
    in one forward; the loss is of the micro-batch, and the mean over micro-batches and processes is trained
    on, so that rows weigh by the micro-batch that they fall in (with `global_norm` all weigh alike).
    Evaluation computes SFT's loss.

    In a checkpoint: NPO's reference log-probabilities (float32, one for each forget row), or a fingerprint of
    the reference's weights where those are kept instead.

    Args:
        retain_dataset: Rows to hold, of the form of `train_dataset`; required where there is a retain term.

    Raises:
        ValueError: The retain set is missing or shares rows with the forget set, a text is empty, a column is
            missing, or a setting is refused.
    """

    loss_is_scaled_for_ga = False
    own_inputs = ("num_forget", ROW)
    args: UnlearningConfig

    def __init__(
        self, model: Any, args: Any = None, *positional: Any, retain_dataset: Any = None, **keywords: Any
    ) -> None:
        self._given_retain, self._retain = retain_dataset, None
        super().__init__(model, args, *positional, **keywords)
        args = self.args
        check(
            not self.accelerator.dispatch_batches,
            "dispatch_batches",
            True,
            "False: each process draws the retain rows of its own batches",
        )
        self.unlearn_collator = UnlearnCollator(
            self.data_collator, self._retain, args.retain_per_forget, args.seed
        )
        self.data_collator = self.unlearn_collator
        self.max_forget_loss = args.max_forget_loss or math.log(self._vocabulary())
        self._reference: HeldWeights | None = None
        self._ref_logps: Tensor | None = None
        self._losses: list[float] = []
        self._known: Any = None  # of the reference, for this micro-batch
        self._counts: Counts | None = None  # of the update in work
        mixed = args.separate_forward and self.aux_loss_enabled
        check(not mixed, "separate_forward", True, "False with router losses, which are of a whole batch")
        if self._needs_distribution() or (args.unlearn_loss == "npo" and not args.precompute_ref):
            field = "retain_loss='kl'" if self._needs_distribution() else "precompute_ref=False"
            rule = "started from its data before the trainer is made: the reference is a copy of the start"
            check(not awaits_data(self._unwrapped()), f"the adapter, with {field},", "waiting", rule)
            stage = zero_stage(self)
            rule = f"below 3 with {field}, which keeps a copy of the weights"
            check(stage < 3, "DeepSpeed's zero_optimization.stage", stage, rule)
            self._reference = HeldWeights(self._unwrapped(), field)
        if args.unlearn_loss == "npo" and args.precompute_ref:
            self._ref_logps = self._log_likelihoods()
        self.add_callback(_Watch(self))

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _vocabulary(self) -> int:
        return int(self._unwrapped().config.get_text_config().vocab_size)

    def _needs_distribution(self) -> bool:
        return self.args.retains and self.args.retain_loss == "kl"

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        """Whether the loss is over whole distributions."""
        return self._needs_distribution()

    def wants_row_ids(self, args: Any) -> bool:
        """Return True: the draws and the reference go by row."""
        return True

    # Data -----------------------------------------------------------------------------------------

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Prepare the retain set with the forget set, and put refusals in the place of answers for "po"."""
        prepare = super()._prepare_dataset
        if dataset_name != "train":
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        _check_form(dataset, "train_dataset")
        if args.retains:
            retain = self._given_retain
            if retain is None:
                raise ValueError("retain_dataset is missing: the retain term needs rows to hold")
            _check_form(retain, "retain_dataset")
            shared = len(_keys(dataset) & _keys(retain))
            if shared:
                raise ValueError(
                    f"train_dataset and retain_dataset share {shared} row{'s' if shared > 1 else ''}: what "
                    "is to be forgotten would be held"
                )
            self._retain = _with_labels(
                prepare(retain, processing_class, args, packing, formatting_func, "retain"), "retain_dataset"
            )
        if args.unlearn_loss == "po":
            dataset = _with_refusals(dataset, args.refusals, args.seed)
        forget = prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        return _with_labels(forget, "train_dataset")

    # The reference --------------------------------------------------------------------------------

    def _log_likelihoods(self) -> Tensor:
        """Return the log-probabilities of the forget rows by number, fp32, under the model as it is now."""
        rows, size = cast(Any, self.train_dataset), self.args.per_device_train_batch_size
        sharded = zero_stage(self) == 3
        if not sharded:
            trained_tensors(self._unwrapped(), "precompute_ref")  # raises where FSDP1 shards them
        model = before_training(self)
        total = torch.zeros(1 + max(rows[ROW]), device=self.args.device)
        # Before it shards a model, FSDP may have its weights on the first process alone.
        ranks, rank = (1, dist.rank()) if self.is_fsdp_enabled else (dist.world_size(), dist.rank())
        own = range(len(rows))[rank::ranks] if rank < ranks else range(0)
        turns = -(-len(range(0, len(rows), ranks) if sharded else own) // size)
        with evaluation_mode(model), torch.no_grad():
            for turn in range(turns):
                mine = own[turn * size : (turn + 1) * size]
                # Stage 3 gathers within each call: processes without a batch call too.
                found = rows.select(mine or [0])
                wanted = [{name: row[name] for name in ("input_ids", "labels")} for row in found]
                batch = self.unlearn_collator.inner(wanted)
                batch = {name: value.to(self._unwrapped().device) for name, value in batch.items()}
                with self.compute_loss_context_manager():
                    logps = token_logps(model, model_inputs(batch), batch["labels"])
                if mine:
                    total[torch.tensor(found[ROW])] = sum_of_tokens(logps).to(total.device)
        return dist.all_reduce_sum_(total).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the reference's log-probabilities, or a fingerprint of its weights."""
        if self._ref_logps is not None:
            return {"ref_logps": self._ref_logps}
        return {} if self._reference is None else {"reference": self._reference.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: The model given is not the one that the run started from.
        """
        if self._ref_logps is not None:
            held = state["ref_logps"]
            rule = f"of {len(held)} rows, as in the checkpoint"
            check(held.shape == self._ref_logps.shape, "train_dataset", len(self._ref_logps), rule)
            self._ref_logps = held
        elif self._reference is not None:
            found = self._reference.fingerprint()
            same = math.isclose(found, state["reference"], rel_tol=1e-6)
            check(same, "model", found, f"the one that the run started from ({state['reference']})")

    # The loss -------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of an update, and count what its means are over."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.global_norm and batches:
            self._counts = Counts.of(batches, 0 if is_prompt_learning(self._unwrapped()) else 1)
        return batches, items

    def forward_parts(self, inputs: Mapping[str, Any]) -> list[slice]:
        """Return forget rows and retain rows apart with `separate_forward`, else all rows."""
        count = inputs["num_forget"]
        if self.args.separate_forward and self.args.retains:
            return [slice(count), slice(count, None)]
        return [slice(None)]

    def _in_update(self, mean: Tensor, own: Tensor | int, kind: str) -> Tensor:
        """Return a micro-batch's part of a mean over the update with `global_norm`, else its own mean.

        Args:
            mean: Its own mean.
            own: How many tokens or rows that is over.
            kind: The field of `Counts` for all of them.
        """
        if self._counts is None:
            return mean
        return mean * (own * self._counts.micro_batches / max(getattr(self._counts, kind), 1.0))

    def token_loss(self, outputs: TokenOutputs, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss of a micro-batch as a scalar."""
        args, count = self.args, inputs["num_forget"]
        forget, retain = outputs.rows(slice(count)), outputs.rows(slice(count, None))
        nll = mean_nll(forget)
        metrics: dict[str, Tensor] = {"forget_nll": nll, "forget_token_acc": _accuracy(forget)}
        if args.unlearn_loss == "po":
            metrics = {"refusal_nll": nll}
            loss = self._in_update(nll, forget.label_mask.sum(), "forget_tokens")
        elif args.unlearn_loss == "npo":
            d = self._log_ratios(forget, inputs)
            loss = self._in_update(npo_loss(d, args.npo_beta), len(d), "forget_rows")
            metrics |= {"d_mean": d.mean(), "npo_weight": npo_weight(d, args.npo_beta).mean()}
        else:
            loss = -self._in_update(nll, forget.label_mask.sum(), "forget_tokens")
        if args.retains:
            term = self._divergence(retain, inputs) if args.retain_loss == "kl" else mean_nll(retain)
            loss = loss + args.gamma_u * self._in_update(term, retain.label_mask.sum(), "retain_tokens")
            metrics |= {"retain": term, "retain_token_acc": _accuracy(retain)}
        self.record({f"unlearn/{name}": value for name, value in metrics.items()})
        if args.unlearn_loss in ("ga", "graddiff"):
            self._losses.append(self._metrics["train"]["unlearn/forget_nll"][-1])
        return loss

    def step_losses(self) -> float:
        """Return the forget rows' loss of the last update, a mean over its micro-batches, and forget it."""
        losses, self._losses = self._losses, []
        return sum(losses) / max(len(losses), 1)

    def _log_ratios(self, forget: TokenOutputs, inputs: Mapping[str, Any]) -> Tensor:
        """Return d (N,), or one d (1,) per token and batch."""
        own = sum_of_tokens(forget.log_probs)
        if self._ref_logps is not None:
            reference = self._ref_logps[inputs[ROW].cpu()].to(own.device)
        else:
            reference = sum_of_tokens(self._known[0].log_probs[: inputs["num_forget"]])
        d = own - reference
        if self.args.npo_level == "token_mean":
            d = d.sum(0, keepdim=True) / forget.label_mask.sum().clamp(min=1)
        return d

    def _divergence(self, retain: TokenOutputs, inputs: Mapping[str, Any]) -> Tensor:
        """Return the mean of KL(p_ref || p) over the label tokens of the retain rows."""
        _, hidden, reference = self._known
        known = hidden[inputs["num_forget"] :, :-1][retain.label_mask]
        entropy = known.new_zeros(len(known), dtype=torch.float32)

        def target(rows: slice) -> Tensor:
            logps = reference.log_probs(known[rows])
            entropy[rows] = -(logps.exp() * logps).sum(-1)
            return logps.exp()

        crossed = cross_entropy_to(Head.of(self._unwrapped()), retain.at_labels(), target)
        return (crossed - entropy).sum() / retain.label_mask.sum().clamp(min=1)

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        """Keep the reference's outputs, its hidden states (B, L, H) and its head, where a term needs them."""
        if self._reference is None:
            return
        model, states = self._unwrapped(), []
        own, labels = model_inputs(inputs, drop=frozenset(self.own_inputs)), inputs["labels"]
        with self._reference.in_place_of(model), last_hidden_states(model, states):
            given = {**own, "labels": labels, "fused_lm_head": True}
            parts, multiple = self.forward_parts(inputs), cast(Any, self.args).pad_to_multiple_of
            outputs = forward_in_parts(model, given, parts, states, multiple)
            self._known = outputs, states[-1], Head.of(model, detach=True)


def _accuracy(outputs: TokenOutputs) -> Tensor:
    return outputs.is_top1.sum() / outputs.label_mask.sum().clamp(min=1)


def _check_form(dataset: Any, field: str) -> None:
    """Raise unless a data set holds rows of a prompt and a completion, or of tokens with labels."""
    check_map(dataset, field, "rows are drawn by number, as text")
    if "input_ids" in dataset.column_names:
        check_columns(dataset, ("labels",), field)
        return
    check_columns(dataset, ("prompt", "completion"), field)
    check_filled(dataset, ("prompt", "completion"), field)


def _keys(dataset: Dataset) -> set[str]:
    """Return the rows' contents, to compare."""
    tokenized = "input_ids" in dataset.column_names
    names = ("input_ids",) if tokenized else ("prompt", "completion")
    return {json.dumps(list(row)) for row in zip(*(dataset[name] for name in names), strict=True)}


def _with_labels(dataset: Any, field: str) -> Any:
    """Return the rows that have a label to predict; the others are counted in a warning."""
    kept = [i for i, labels in enumerate(dataset["labels"]) if any(label != -100 for label in labels[1:])]
    lost = len(dataset) - len(kept)
    if not kept:
        raise ValueError(f"{field} has no row with a label to predict")
    if lost:
        logger.warning("%s: %d of %d rows have no label to predict; left out", field, lost, len(dataset))
    return dataset.select(kept) if lost else dataset


def _with_refusals(dataset: Dataset, refusals: list[str] | None, seed: int) -> Dataset:
    """Return the rows with a refusal as the completion, from the column or drawn by row from the list."""
    if "prompt" not in dataset.column_names:
        raise ValueError("unlearn_loss='po' needs train_dataset with a prompt: refusals are put after it")
    if refusals is None:
        check_columns(dataset, ("refusal",), "refusals is None, and train_dataset")
        check_filled(dataset, ("refusal",), "train_dataset")

    def refuse(row: dict[str, Any], number: int) -> dict[str, Any]:
        text = row["refusal"] if refusals is None else random.Random(f"{seed}/{number}").choice(refusals)
        chat = isinstance(row["completion"], list) and isinstance(text, str)
        return {"completion": [{"role": "assistant", "content": text}] if chat else text}

    return dataset.map(refuse, with_indices=True)
