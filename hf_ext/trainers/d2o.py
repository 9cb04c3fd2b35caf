"""D2O: preference training from bad completions alone; the policy's own samples stand on the good side.

Source: Duan et al. 2024, "Negating Negatives: Alignment with Human Negative Samples via Distributional
Dispreference Optimization", arXiv 2403.03419. With a prompt x, a bad completion y_l, K anchors y_i drawn from
the policy, frozen references r+ and r-, and log-probabilities summed over tokens, it is -log sigmoid(z) for
z = (beta / K) sum_i log(pi(y_i | x) / r-(y_i | x)) - alpha log(pi(y_l | x) / r+(y_l | x)).
The mean stands inside the sigmoid, so that the loss is at most the mean of K losses of DPO (Jensen).

Differs from the paper:
- Both references are the initial policy (DPO's reference), unless the model has frozen adapters `ref_pos`
  (r+) and `ref_neg` (r-).
- An anchor equal to y_l is dropped: the two sides would cancel. K is the number of a row's anchors left.
- `anchor_filter` can refuse anchors: what the policy does badly and samples often is else held up too.
- When anchors come from the policy in training, and how often, is set by `online_after` and `resample_every`;
  the instructions before the prompts are used for the first anchors alone. They are ours, not the paper's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.dpo_config import DPOConfig

from ..core import dist
from ..core.checks import check
from ._anchors import (
    ROW,
    AnchorCollator,
    AnchorSet,
    AnchorTable,
    check_anchors,
    draw_anchors,
    encode_row,
    fits,
    prompt_columns,
    spread,
    warn_without_anchors,
    with_prefix,
    without,
)
from ._base import (
    Inputs,
    MethodTrainer,
    check_columns,
    check_filled,
    map_rows,
    register_trainer,
    zero_stage,
)
from ._log_ratios import LogRatios, LogRatioTrainer
from ._reference import reference_model
from ._sampling import Sampler, SamplingSettings, VLLMArguments, seed_of, tokenize_prompts

__all__ = ["D2OConfig", "D2OTrainer"]

PREFIXES = (
    "Answer politely and without harm to anyone.\n",
    "Give a helpful answer that is safe to follow.\n",
    "Be honest, kind and respectful in your answer.\n",
    "Answer in a way that a careful expert would approve of.\n",
    "Decline what is harmful and help with the rest.\n",
)
POSITIVE, NEGATIVE = "ref_pos", "ref_neg"


@dataclass(kw_only=True)
class D2OConfig(VLLMArguments, DPOConfig):
    """Settings of D2O, beside DPO's and vLLM's; those of DPO's own losses are left at their defaults.

    Args:
        d2o_beta: Weight beta of the anchors, above 0; more holds the policy closer to what it samples.
        d2o_alpha: Weight alpha of the bad completion, above 0.
        num_anchors: Anchors K sampled for a prompt, at least 1; rows that bring theirs may have fewer.
        anchor_prefixes: Instructions put before prompts when the first anchors are sampled, in turn; log-
            probabilities are of the bare prompt. An empty list for none.
        anchor_temperature: Temperature of the samples, above 0.
        anchor_top_p: Keep the likeliest tokens up to this total probability, in (0, 1].
        anchor_max_new_tokens: Longest anchor, tokens.
        anchor_batch_size: Anchors sampled at once on a process.
        online_after: Optimizer step from which anchors are sampled from the policy in training; None keeps
            the first ones.
        resample_every: Optimizer steps between samplings from then on, at least 1.
        anchor_microbatch: Anchors in one forward, whose activations are computed again for the backward
            pass; None takes all rows at once.
        length_normalize: Use means over tokens instead of sums.

    Raises:
        ValueError: A field is outside its range, or anchors are to be replaced while references are
            computed in advance.
    """

    d2o_beta: float = field(default=0.1, metadata={"help": "Weight of the anchors."})
    d2o_alpha: float = field(default=0.1, metadata={"help": "Weight of the bad completion."})
    num_anchors: int = field(default=11, metadata={"help": "Anchors sampled for a prompt."})
    anchor_prefixes: list[str] = field(
        default_factory=lambda: list(PREFIXES),
        metadata={"help": "Instructions before prompts when the first anchors are sampled."},
    )
    anchor_temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    anchor_top_p: float = field(default=1.0, metadata={"help": "Total probability of the tokens kept."})
    anchor_max_new_tokens: int = field(default=256, metadata={"help": "Longest anchor, tokens."})
    anchor_batch_size: int = field(default=32, metadata={"help": "Anchors sampled at once on a process."})
    online_after: int | None = field(
        default=200, metadata={"help": "Step from which anchors come from the policy in training."}
    )
    resample_every: int = field(default=50, metadata={"help": "Steps between samplings from then on."})
    anchor_microbatch: int | None = field(default=None, metadata={"help": "Anchors in one forward."})
    length_normalize: bool = field(default=False, metadata={"help": "Means over tokens, not sums."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d2o_beta", "d2o_alpha", "anchor_temperature"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("num_anchors", "resample_every", "anchor_batch_size", "anchor_max_new_tokens"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(0 < self.anchor_top_p <= 1, "anchor_top_p", self.anchor_top_p, "above 0 and at most 1")
        small = self.anchor_microbatch
        check(small is None or small >= 1, "anchor_microbatch", small, "at least 1, or None")
        check(
            isinstance(self.anchor_prefixes, list), "anchor_prefixes", self.anchor_prefixes, "a list of texts"
        )
        start = self.online_after
        check(start is None or start >= 0, "online_after", start, "at least 0, or None")
        fixed = not self.precompute_ref_log_probs or start is None
        check(fixed, "online_after", start, "None with precompute_ref_log_probs: anchors must not change")


def d2o_margins(
    anchors: Tensor, anchor_mask: Tensor, negatives: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """Return z = beta mean_i s_i - alpha s_l of each sample.

    Args:
        anchors: (B, K) log-ratios s_i of the anchors, nats.
        anchor_mask: (B, K), which of them there are; the mean over none is 0.
        negatives: (B,) log-ratios s_l of the bad completions.
        beta: Weight of the anchors.
        alpha: Weight of the bad completion.

    Returns:
        (B,) margins; the loss is -log sigmoid(z).
    """
    counts = anchor_mask.sum(dim=1).clamp(min=1)
    return beta * (anchors * anchor_mask).sum(dim=1) / counts - alpha * negatives


class _Sampling(TrainerCallback):
    """Has anchors sampled when training begins, and where new ones are due."""

    def __init__(self, trainer: D2OTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sample_first_anchors()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.replace_anchors()


@register_trainer(
    "d2o",
    summary="preference training from bad completions alone, against the policy's own samples",
    title=(
        "Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference "
        "Optimization"
    ),
    paper="arXiv:2403.03419",
    config=D2OConfig,
    inputs=Inputs(columns=(("prompt", "rejected"), ("prompt", "rejected", "anchors"))),
    neutral=None,  # DPO needs the column `chosen`, which is none of ours
    supports={"generates"},
    test_kwargs={"num_anchors": 3, "anchor_max_new_tokens": 6, "online_after": 2, "resample_every": 2},
    bad_kwargs=(
        {"d2o_beta": 0.0},
        {"d2o_alpha": -1.0},
        {"num_anchors": 0},
        {"anchor_top_p": 0.0},
        {"anchor_temperature": 0.0},
        {"anchor_microbatch": 0},
        {"resample_every": 0},
        {"loss_type": "ipo"},
        {"beta": 0.2},
        {"precompute_ref_log_probs": True, "online_after": 5},
    ),
)
class D2OTrainer(MethodTrainer, LogRatioTrainer):
    """DPO without good completions: data have `prompt`, `rejected`, and perhaps `anchors`, lists of texts.

    Anchors that are not brought are sampled when training begins. A model with an adapter in training may
    hold two more, frozen, named `ref_pos` and `ref_neg`: they are then the references of the bad completions
    and of the anchors.

    Args:
        model: As DPO's.
        ref_model: As DPO's.
        args: Settings.
        *positional: DPO's further arguments; `data_collator` must be left out.
        anchor_filter: Called with lists `prompts`, `completions` and `completion_ids` of sampled anchors;
            gives for each whether it may be one. Those refused are drawn again up to three times.
        **keywords: DPO's further arguments.

    In a checkpoint: the sampled anchors (int32 tokens, lengths and counts) and the step of each sampling.
    """

    own_inputs = frozenset({ROW, "anchor_mask", "ref_rejected_logps", "ref_anchor_logps"})

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: D2OConfig | None = None,
        *positional: Any,
        anchor_filter: Callable[..., Sequence[Any]] | None = None,
        **keywords: Any,
    ) -> None:
        self.anchors = AnchorTable()
        self.anchor_filter = anchor_filter
        self._sampler: Sampler | None = None
        self._constructed = False
        super().__init__(model, ref_model, args, *positional, **keywords)
        _distinct_references(self.model, self.ref_model)
        sharded = self.is_fsdp_enabled or zero_stage(self) == 3
        small, rule = self.args.anchor_microbatch, "None with FSDP and with DeepSpeed's stage 3"
        check(small is None or not sharded, "anchor_microbatch", small, rule)
        self._constructed = True
        self.add_callback(_Sampling(self))

    # Loss -----------------------------------------------------------------------------------------

    def sample_losses(self, rows: LogRatios, inputs: Mapping[str, Any]) -> Tensor:
        """Return -log sigmoid(z) of each sample, (B,)."""
        mask, args = inputs["anchor_mask"], self.args
        count = len(mask)
        ratios = rows.ratios / rows.lengths.clamp(min=1) if args.length_normalize else rows.ratios
        anchors = spread(ratios[count:], mask)
        margins = d2o_margins(anchors, mask, ratios[:count], beta=args.d2o_beta, alpha=args.d2o_alpha)
        some = mask.sum().clamp(min=1)
        metrics = {
            "d2o/anchor_logratio": ratios[count:].sum() / some,
            "d2o/negative_logratio": ratios[:count].mean(),
            "d2o/z": margins.mean(),
            "d2o/anchor_age": float(self.state.global_step - self._step_of(inputs)),
            "rewards/accuracies": (margins > 0).float().mean(),
            "logps/anchor": rows.policy[count:].sum() / some,
            "logps/rejected": rows.policy[:count].mean(),
        }
        self.record(metrics)
        return -F.logsigmoid(margins)

    def chunks(self, inputs: Mapping[str, Any]) -> list[slice]:
        count, total, size = len(inputs["anchor_mask"]), len(inputs["input_ids"]), self.args.anchor_microbatch
        if size is None:
            return [slice(0, total)]
        starts = range(count, total, size)
        return [slice(0, count), *(slice(start, min(start + size, total)) for start in starts)]

    def reference_rows(self, inputs: Mapping[str, Any]) -> list[tuple[slice, str | None]]:
        count, total = len(inputs["anchor_mask"]), len(inputs["input_ids"])
        if not _distinct_references(self.model, self.ref_model):
            return [(slice(0, total), None)]
        return [(slice(0, count), POSITIVE), (slice(count, total), NEGATIVE)]

    # Data -----------------------------------------------------------------------------------------

    def make_collator(self, args: Any) -> AnchorCollator:
        return AnchorCollator(
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        name = f"{dataset_name}_dataset"
        check_columns(dataset, ("prompt", "rejected"), name)
        check_filled(dataset, ("prompt", "rejected"), name)
        first = next(iter(dataset))
        given, streamed = "anchors" in first, isinstance(dataset, IterableDataset)
        if streamed:
            check(given, name, "a streamed data set", "with the column 'anchors' if it is streamed")
            online = args.online_after
            check(
                online is None, "online_after", online, "None with a streamed data set: its rows are not kept"
            )
        if "chosen" in first:
            warnings.warn(f"{name}: the column 'chosen' is not used by D2O", stacklevel=2)
            dataset = dataset.remove_columns("chosen")
        if given:
            check_anchors(dataset, args.num_anchors, name)
        dataset = map_rows(
            dataset, encode_row, args, f"Tokenizing {name}", fn_kwargs={"tokenizer": processing_class}
        )
        if args.max_length is not None and args.truncation_mode == "keep_start":  # as DPO does
            dataset = dataset.filter(fits, fn_kwargs={"max_length": args.max_length})
        if streamed:
            return dataset
        check(len(dataset) > 0, name, "no row", "with prompts shorter than max_length")
        warn_without_anchors(dataset["anchor_ids"] if given else [], name)
        return self.anchors.add(dataset_name, dataset, given=given, kept=not self._constructed)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "rejected_ids", "anchor_ids", ROW]
            self._signature_columns += ["ref_rejected_logps", "ref_anchor_logps"]

    def complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with the anchors of this moment, where they are not the data set's own."""
        if ROW not in inputs:
            return inputs
        numbers = inputs[ROW].tolist()
        for one in {id(found): found for found in map(self.anchors.of, numbers)}.values():
            if one.rows is None and not one.given:
                self._sample_first(one)
        examples = self.anchors.examples(numbers)
        return inputs if examples is None else dict(self._prepare_inputs(self.data_collator(examples)))

    # References computed in advance -----------------------------------------------------------------

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        streamed = isinstance(dataset, IterableDataset)
        check(not streamed, "precompute_ref_log_probs", True, "False with a streamed data set")
        one = self.anchors.of(dataset[0][ROW])
        if not one.given:
            check(
                not self.args.use_vllm, "use_vllm", True, "False with precompute_ref_log_probs: draws differ"
            )
            self._sample_first(one)
            one.dataset = dataset.add_column("anchor_ids", one.rows)
            dataset, one.given, one.rows = one.dataset, True, None
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        return dataset.rename_column("ref_chosen_logps", "ref_anchor_logps")

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the reference of anchors (B, num_anchors), 0 where there is none, and of negatives (B,)."""
        with self.accelerator.autocast():
            found = self.reference_logps(inputs, model)
        count, mask = len(inputs["anchor_mask"]), inputs["anchor_mask"]
        anchors = spread(found[count:], mask)
        return F.pad(anchors, (0, self.args.num_anchors - mask.size(1))), found[:count]

    def precomputed(self, inputs: Mapping[str, Any]) -> Tensor:
        anchors = inputs["ref_anchor_logps"][inputs["anchor_mask"]]
        return torch.cat([inputs["ref_rejected_logps"], anchors]).float()

    # Anchors --------------------------------------------------------------------------------------

    @property
    def sampler(self) -> Sampler:
        """Return what draws the anchors; with vLLM the engine is made at the first call."""
        if self._sampler is None:
            args = self.args
            settings = SamplingSettings.of(
                args,
                max_new_tokens=args.anchor_max_new_tokens,
                temperature=args.anchor_temperature,
                top_p=args.anchor_top_p,
                batch_size=args.anchor_batch_size,
            )
            self._sampler = Sampler(self, settings)
        return self._sampler

    def sample_first_anchors(self) -> None:
        """Sample the anchors of each data set that brings none and has none yet (a collective)."""
        for one in self.anchors.sets.values():
            if one.rows is None and not one.given:
                self._sample_first(one)

    def replace_anchors(self) -> None:
        """Sample the training rows' anchors from the policy in training, where that is due (a collective)."""
        step, start = self.state.global_step, self.args.online_after
        if start is None or step < max(start, 1) or (step - start) % self.args.resample_every:
            return
        one = self.anchors.sets["train"]
        if one.rows is None or one.step != step:  # else resumed from the checkpoint of this sampling
            self._sample(one, [""], None)

    def state_dict(self) -> dict[str, Any]:
        fixed = all(one.given for one in self.anchors.sets.values()) and self.args.online_after is None
        return {} if fixed else self.anchors.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.anchors.load_state_dict(state)

    def _sample_first(self, one: AnchorSet) -> None:
        with self._initial_policy() as model:
            self._sample(one, self.args.anchor_prefixes or [""], model)

    def _sample(self, one: AnchorSet, prefixes: list[str], model: Any) -> None:
        prompts = list(one.dataset["prompt"])
        count, tokenizer, sampling_ids = self.args.num_anchors, self.sampler.tokenizer, []
        for number, row in enumerate(one.dataset.select_columns(prompt_columns(one.dataset))):
            used = {prefixes[(number + k) % len(prefixes)] for k in range(count)}
            ids = tokenize_prompts(
                tokenizer,
                [with_prefix(row["prompt"], prefix) for prefix in used],
                tools=row.get("tools"),
                chat_template_kwargs=row.get("chat_template_kwargs"),
            )
            by_prefix = dict(zip(used, ids, strict=True))
            sampling_ids.append([by_prefix[prefixes[(number + k) % len(prefixes)]] for k in range(count)])
        seed = seed_of(self.args.seed, self.state.global_step, one.start)
        rows = draw_anchors(
            self.sampler, prompts, sampling_ids, seed=seed, model=model, accept=self.anchor_filter
        )
        rejected = one.dataset["rejected_ids"]
        one.rows = [without(anchors, bad) for anchors, bad in zip(rows, rejected, strict=True)]
        one.step = self.state.global_step
        warn_without_anchors(one.rows, "the sampled anchors")

    @contextlib.contextmanager
    def _initial_policy(self) -> Generator[Any]:
        """Make the reference the policy; yield another model to draw from, or None for the trainer's own."""
        start = self.state.global_step == 0
        adapter = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        if self.args.use_vllm or (self.ref_model is None and not adapter):
            rule = "with the column 'anchors': the initial policy, whose samples they are, is no longer there"
            check(start, "a data set first evaluated in training", "without anchors", rule)
            yield None
            return
        placed = self._constructed or self.ref_model is not None or not dist.awaits_broadcast()
        with dist.together():  # it is loaded on one process of a host
            rule = "with the column 'anchors': FSDP has not loaded the model yet"
            check(placed, "a data set", "without anchors", rule)
        with reference_model(self) as model:
            yield None if self.ref_model is None else model

    def _step_of(self, inputs: Mapping[str, Any]) -> int:
        return self.anchors.of(int(inputs[ROW][0])).step if ROW in inputs else 0


def _distinct_references(model: Any, ref_model: Any) -> bool:
    """Return whether the model holds the references r+ and r- as adapters.

    Raises:
        ValueError: It holds one of them alone, one trains, or there is a `ref_model` too.
    """
    names = set(getattr(model, "peft_config", {})) & {POSITIVE, NEGATIVE}
    if not names:
        return False
    check(
        len(names) == 2, "the model's adapters", sorted(names), f"both {POSITIVE!r} and {NEGATIVE!r}, or none"
    )
    check(
        ref_model is None,
        "ref_model",
        type(ref_model).__name__,
        f"left out beside {POSITIVE!r}, {NEGATIVE!r}",
    )
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad and names & set(name.split("."))
        check(not trains, f"the adapter of {name}", "trainable", "frozen: it is a reference")
    return True
