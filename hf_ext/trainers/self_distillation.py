"""Progressive self-distillation: targets that mix the ground truth with the model's own of an epoch ago.

Source: Kim et al. 2020, "Self-Knowledge Distillation with Progressive Refinement of Targets", arXiv
2006.12000 (PS-KD); the closed form of the weight from Borup and Andersen 2021, "Even your Teacher Needs
Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation", arXiv 2102.13088. With y
the one-hot target, q the distribution that the model gave an epoch ago, p its distribution now, and e = 0 ..
E - 1 the epoch: alpha_e = alpha (e + 1) / E, target t = (1 - alpha_e) y + alpha_e q, loss -sum_v t_v log p_v
= (1 - alpha_e) NLL + alpha_e (KL(q || p) + H(q)); in the first epoch q = y.
Closed form, in the paper's own convention a weight of the ground truth: a* = <y - u, v - u> / ||v - u||^2 in
[0, 1], u and v the predictions on held-out rows of models fitted to the teacher alone and to the ground truth
alone. Here alpha = 1 - a*.

Differs from the paper:
- The teacher is the last epoch's weights, run on the present batch with dropout off. PS-KD's code keeps what
  the model gave while it trained through that epoch (`teacher="cache"`), here for the likeliest tokens only.
- The epoch-old weights stand in for the trained ones during the teacher's pass; there is no second model.
- The closed form is over whole next-token distributions at the label tokens of held-out rows. It is exact
  where predictions are linear in the targets; for a network it is the paper's estimate.
- The logged target ratio is one of means, sum (p_y - t_y) / sum (p_y - 1): a mean of ratios is dominated by
  tokens whose p_y is next to 1.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..core.checks import check, check_choice
from ..core.registry import Variant
from ._base import Inputs, MethodTrainer, Neutral, check_parts, register_trainer
from ._reference import model_inputs
from ._snapshots import HeldWeights, TopKCache, awaits_sharding, check_tensors, trained_tensors
from ._token_loss import (
    ROW,
    Head,
    RowIdCollator,
    TokenLossTrainer,
    TokenOutputs,
    cross_entropy_to,
    last_hidden_states,
    pieces,
    refuse_without_rows,
)

__all__ = [
    "SelfDistillationConfig",
    "SelfDistillationTrainer",
    "closed_form_weight",
    "fit_two_and_mix",
    "soft_target",
    "target_ratio",
]

SCHEDULES = ("linear", "constant", "closed_form")
TEACHERS = ("checkpoint", "cache")
TEACHER = "teacher='checkpoint'"  # for errors
RESTS = ("drop", "uniform")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class SelfDistillationConfig(SFTConfig):
    """Settings of progressive self-distillation, beside those of SFT.

    Args:
        pskd_alpha: Weight alpha of the model's own targets at the end of the schedule, in [0, 1].
        pskd_schedule: "linear" in the epoch, "constant", or "closed_form": constant at 1 - a*, found before
            training by two fits of as many epochs, with the rows of `eval_dataset`.
        teacher: "checkpoint" for the weights of the last refresh, or "cache" for what the model gave while it
            trained since the refresh before.
        refresh_epochs: Epochs between refreshes, above 0; a whole number with the cache.
        cache_top_k: Tokens that the cache keeps for each label, at least 1 and at most the vocabulary.
        cache_rest: What becomes of the other tokens' mass: "drop" makes the kept ones' sum to 1, "uniform"
            spreads it over the others.
        teacher_temperature: Temperature of the teacher's distribution, above 0.
        teacher_dtype: In which the old weights are kept: "float32", "bfloat16" or "float16"; None for their
            own. The teacher's pass runs in the model's.
        teacher_device: Where they are kept, such as "cpu"; None for where the model is.
        closed_form_val_rows: Rows of `eval_dataset` that the closed form reads at most, at least 1.

    Raises:
        ValueError: A field is outside its range.
    """

    pskd_alpha: float = 0.8
    pskd_schedule: str = "linear"
    teacher: str = "checkpoint"
    refresh_epochs: float = 1.0
    cache_top_k: int = 20
    cache_rest: str = "drop"
    teacher_temperature: float = 1.0
    teacher_dtype: str | None = None
    teacher_device: str | None = None
    closed_form_val_rows: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.pskd_alpha <= 1, "pskd_alpha", self.pskd_alpha, "in [0, 1]")
        check_choice("pskd_schedule", self.pskd_schedule, SCHEDULES)
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("cache_rest", self.cache_rest, RESTS)
        check(0 < self.refresh_epochs < math.inf, "refresh_epochs", self.refresh_epochs, "above 0")
        check(self.cache_top_k >= 1, "cache_top_k", self.cache_top_k, "at least 1")
        heat = self.teacher_temperature
        check(0 < heat < math.inf, "teacher_temperature", heat, "above 0")
        rows = self.closed_form_val_rows
        check(rows >= 1, "closed_form_val_rows", rows, "at least 1")
        if self.teacher_dtype is not None:
            check_choice("teacher_dtype", self.teacher_dtype, DTYPES)
        if self.teacher == "cache":
            whole = float(self.refresh_epochs).is_integer()
            check(whole, "refresh_epochs", self.refresh_epochs, "a whole number with teacher='cache'")
            refuse_without_rows(self, "teacher='cache' finds a label by its row")


# The targets ------------------------------------------------------------------------------------------------


def linear_alpha(alpha: float, epoch: int, epochs: int) -> float:
    """Return the weight in an epoch, counted from 0, of a number of epochs."""
    return alpha * min(epoch + 1, epochs) / epochs


def soft_target(labels: Tensor, previous: Tensor, alpha: float) -> Tensor:
    """Return t (..., V) for labels (...) and the previous distribution (..., V)."""
    one_hot = torch.nn.functional.one_hot(labels, previous.size(-1)).to(previous)
    return (1.0 - alpha) * one_hot + alpha * previous


def target_ratio(p_label: Tensor, previous_label: Tensor, alpha: float) -> Tensor:
    """Return the gradient at the label's logit over that of plain cross-entropy, (p_y - t_y) / (p_y - 1).

    Args:
        p_label: Probability of the label now, below 1.
        previous_label: The same an epoch ago.
        alpha: Weight of the model's own targets.
    """
    return 1.0 - alpha * (1.0 - previous_label) / (1.0 - p_label)


def closed_form_weight(y: Tensor, u: Tensor, v: Tensor) -> float:
    """Return the a in [0, 1] that minimizes ||y - (a v + (1 - a) u)||; 1 where u and v agree.

    Args:
        y: Ground truth on held-out rows, any shape.
        u: Predictions of a model fitted to the teacher alone, the same shape.
        v: Predictions of one fitted to the ground truth alone.
    """
    apart = (v - u).double()
    return _ratio(float(((y - u).double() * apart).sum()), float(apart.square().sum()))


def _ratio(inner: float, square: float) -> float:
    return 1.0 if square < 1e-12 else min(1.0, max(0.0, inner / square))


def spread_top(tokens: Tensor, probs: Tensor, vocabulary: int, rest: str) -> Tensor:
    """Return distributions (N, V) from the likeliest tokens (N, k) and their probabilities (N, k).

    Args:
        tokens: Indices, none twice in a row.
        probs: In fp32, their sum at most about 1 in each row.
        vocabulary: V.
        rest: "drop" or "uniform", as in the settings.
    """
    mass, others = probs.sum(-1, keepdim=True), vocabulary - tokens.size(-1)
    if rest == "drop" or not others:
        return probs.new_zeros(len(probs), vocabulary).scatter(-1, tokens, probs / mass.clamp(min=1e-12))
    left = (1.0 - mass).clamp(min=0.0) / others
    return left.expand(-1, vocabulary).scatter(-1, tokens, probs)


# The trainer ------------------------------------------------------------------------------------------------


@register_trainer(
    "self_distillation",
    summary="targets that mix the ground truth with the model's own of an epoch ago, for calibration",
    title="Self-Knowledge Distillation with Progressive Refinement of Targets",
    paper="arXiv:2006.12000",
    config=SelfDistillationConfig,
    inputs=Inputs(columns=(("prompt", "completion"), ("messages",), ("text",))),
    neutral=Neutral(parent=SFTTrainer, config=SFTConfig, settings={"pskd_alpha": 0.0}),
    test_kwargs={"refresh_epochs": 0.3},
    variants=(
        Variant(name="cache", test_kwargs={"teacher": "cache", "refresh_epochs": 1.0, "cache_top_k": 5}),
    ),
    bad_kwargs=(
        {"pskd_alpha": 1.5},
        {"pskd_schedule": "cosine"},
        {"teacher": "ema"},
        {"cache_rest": "keep"},
        {"refresh_epochs": 0.0},
        {"teacher": "cache", "refresh_epochs": 0.5},
        {"cache_top_k": 0},
        {"teacher_temperature": 0.0},
        {"teacher_dtype": "int8"},
        {"closed_form_val_rows": 0},
        {"loss_type": "dft"},
        {"teacher": "cache", "refresh_epochs": 1.0, "packing": True},
    ),
)
class SelfDistillationTrainer(MethodTrainer, TokenLossTrainer):
    """SFT's trainer whose targets are mixed with the model's own of an epoch ago.

    Until there is a teacher (the first epoch), and with a weight of 0, the loss is SFT's to the bit; so is
    the loss of evaluation. Normalization over micro-batches and processes is SFT's throughout.

    In a checkpoint: the number of refreshes and the closed form's weight, with the teacher's tensors (as many
    as train) or the two caches (6 bytes for each label and kept token).

    Raises:
        ValueError: A setting is refused: SFT's other losses, virtual tokens (prompt learning), packing or
            padding-free with the cache, a streamed data set, a teacher of weights that FSDP1 shards.
    """

    needs_hidden = True
    own_inputs = (ROW,)
    args: SelfDistillationConfig

    def __init__(self, model: Any, args: Any = None, *positional: Any, **keywords: Any) -> None:
        super().__init__(model, args, *positional, **keywords)
        args, data = self.args, cast(Any, self.train_dataset)
        check(hasattr(data, "__len__"), "train_dataset", type(data).__name__, "sized: epochs are counted")
        vocabulary = int(self._unwrapped().config.get_text_config().vocab_size)
        rule = f"at most the vocabulary's {vocabulary} tokens with teacher='cache'"
        check(
            args.teacher != "cache" or args.cache_top_k <= vocabulary, "cache_top_k", args.cache_top_k, rule
        )
        closed = args.pskd_schedule == "closed_form"
        rule = "a Dataset with pskd_schedule='closed_form', which reads held-out rows"
        given = self.eval_dataset
        check(not closed or hasattr(given, "select"), "eval_dataset", type(given).__name__, rule)
        if args.pskd_alpha == 1.0 and not closed:
            warnings.warn("pskd_alpha is 1: the ground truth has no weight in the end", stacklevel=2)
        if args.teacher == "checkpoint" and (args.pskd_alpha > 0 or closed):
            check_parts(self, "a copy of the weights")
        rule = "'linear' or 'constant' with DeepSpeed, which Accelerate gives one run of a process alone"
        check(not (closed and self.is_deepspeed_enabled), "pskd_schedule", args.pskd_schedule, rule)
        self._refreshes = 0
        self._mixing: float | None = None  # alpha by the closed form
        self._held: HeldWeights | None = None
        self._fixed = False  # a teacher that is given, and not refreshed
        self._given: dict[str, Tensor] | None = None  # that teacher, before the model is sharded
        self._alpha = 0.0
        self._taught: Any = None  # by the teacher, of this micro-batch
        self._previous: TopKCache | None = None
        self._current: TopKCache | None = None
        if args.teacher == "cache" and (args.pskd_alpha > 0 or closed):
            lengths = torch.zeros(1 + max(data[ROW]), dtype=torch.long)
            counts = [sum(label != -100 for label in labels[1:]) for labels in data["labels"]]
            lengths[torch.tensor(data[ROW])] = torch.tensor(counts)
            self._previous, self._current = (TopKCache(lengths, args.cache_top_k) for _ in range(2))
            self.data_collator = RowIdCollator(self.data_collator)

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def wants_row_ids(self, args: Any) -> bool:
        """Return whether the cache, which goes by row, is in use."""
        return args.teacher == "cache"

    def train(self, resume_from_checkpoint: Any = None, *positional: Any, **keywords: Any) -> Any:
        """Train; the closed form's weight is found first, unless a checkpoint has it.

        Of an earlier run of this trainer nothing is left but a fixed teacher (`teach`).
        """
        self._refreshes, self._mixing, self._taught = 0, None, None
        if not self._fixed:
            self._held = None
        for cache in (self._previous, self._current):
            if cache is not None:
                cache.clear()
        if self.args.pskd_schedule == "closed_form" and not resume_from_checkpoint:
            self._mixing = 1.0 - fit_two_and_mix(self)
        return super().train(resume_from_checkpoint, *positional, **keywords)

    # The teacher ----------------------------------------------------------------------------------

    def alpha(self) -> float:
        """Return the weight of the model's own targets in the coming micro-batch, were there a teacher."""
        args, state = self.args, self.state
        if args.pskd_schedule != "linear":
            return self._final_alpha()
        if not state.num_train_epochs:  # outside of a run
            return 0.0
        return linear_alpha(args.pskd_alpha, int((state.epoch or 0.0) + 1e-6), state.num_train_epochs)

    def _final_alpha(self) -> float:
        if self.args.pskd_schedule == "closed_form":
            return 0.0 if self._mixing is None else self._mixing
        return self.args.pskd_alpha

    def teach(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a fixed teacher, by the names of the parameters that train; it is never refreshed.

        Raises:
            ValueError: Names or shapes are not those of the parameters that train.
        """
        model = self._unwrapped()
        check_tensors(tensors, trained_tensors(model, TEACHER), TEACHER)
        self._fixed = True
        if awaits_sharding(self, model):  # a copy made now would not have the shards that the model will have
            self._held, self._given = None, {name: x.detach().cpu().clone() for name, x in tensors.items()}
        else:
            self._held, self._given = self._new_copy(), None
            self._held.load(tensors)

    def _lay_out_given(self) -> None:
        """Keep a fixed teacher as the model is laid out, now that it is."""
        if self._given is not None:
            self._held = self._new_copy()
            self._held.load(self._given)
            self._given = None

    def _new_copy(self) -> HeldWeights:
        dtype = None if self.args.teacher_dtype is None else getattr(torch, self.args.teacher_dtype)
        return HeldWeights(self._unwrapped(), TEACHER, dtype=dtype, device=self.args.teacher_device)

    def replaces_loss(self) -> bool:
        """Refresh the teacher where that is due, and return whether there is one, or a cache to fill."""
        self._alpha = self.alpha()
        self._lay_out_given()
        # The share of the run done, and so the same at each micro-batch of an update and after a resume.
        due = int((self.state.epoch or 0.0) / self.args.refresh_epochs + 1e-6)
        if not self._fixed and due > self._refreshes:
            self._refresh()
            self._refreshes = due
        taught = self._fixed or self._refreshes > 0
        if self._final_alpha() > 0:
            # Equal on all processes: no mean is needed.
            self._metrics["train"]["pskd/alpha"].append(self._alpha if taught else 0.0)
            every = self.args.refresh_epochs
            if not taught and 0 < self.state.num_train_epochs <= every:
                text = f"the run ends before its first refresh, after {every:g} epochs: it is plain SFT"
                warnings.warn(text, stacklevel=2)
        return self._current is not None or (self._alpha > 0 and self._held is not None)

    def _refresh(self) -> None:
        if self._current is not None:
            self._current.merge(self.accelerator)
            self._previous, self._current = self._current, self._previous
            self._current.clear()  # type: ignore[union-attr]
        elif self._held is not None:
            self._held.take(self._unwrapped())
        elif self._final_alpha() > 0:
            self._held = self._new_copy()

    def state_dict(self) -> dict[str, Any]:
        """Return the refreshes so far, the closed form's weight, and on the first process the teacher."""
        state: dict[str, Any] = {"refreshes": self._refreshes, "mixing": self._mixing}
        if self._held is not None:
            state |= {f"teacher.{name}": value for name, value in self._held.whole().items()}
        if self._current is not None and self._previous is not None:
            self._current.merge(self.accelerator)
            state |= {**self._previous.state("previous"), **self._current.state("current")}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: The teacher's tensors or the cache are not of this model and data, or are missing.
        """
        self._refreshes, self._mixing = state["refreshes"], state["mixing"]
        tensors = {
            name.removeprefix("teacher."): value
            for name, value in state.items()
            if name.startswith("teacher.")
        }
        cached = "current.filled" in state
        rule = f"{'cache' if cached else 'checkpoint'!r}, as in the checkpoint"
        check(
            (self._current is not None) == cached or not (cached or tensors),
            "teacher",
            self.args.teacher,
            rule,
        )
        if tensors:
            self._given = None
            self._held = self._new_copy()
            self._held.load(tensors)
        if cached:
            assert self._previous is not None
            assert self._current is not None
            self._previous.load(state, "previous")
            self._current.load(state, "current")

    # The loss -------------------------------------------------------------------------------------

    def token_loss(self, outputs: TokenOutputs, inputs: Mapping[str, Any]) -> Tensor:
        """Return the losses (B, L - 1) of the tokens to their mixed targets."""
        nll, alpha = -outputs.log_probs, self._alpha
        hidden, labels = outputs.at_labels(), outputs.labels[outputs.label_mask]
        head = Head.of(self._unwrapped())
        previous = torch.zeros(len(labels), device=nll.device)  # of the label, an epoch ago
        entropy = torch.zeros_like(previous)
        there: Tensor | None = None
        if self._current is None:
            assert self._held is not None
            known, teacher = self._taught

            def distributions(rows: slice) -> Tensor:
                return teacher.log_probs(known[rows], self.args.teacher_temperature).exp()
        else:
            assert self._previous is not None
            counts = outputs.label_mask.sum(1)
            tokens, probs, there = (
                value.to(nll.device) for value in self._previous.read(inputs[ROW], counts)
            )
            self._write(inputs[ROW], counts, head, hidden)
            if alpha == 0 or not self._refreshes:
                return nll

            def distributions(rows: slice) -> Tensor:
                return spread_top(tokens[rows], probs[rows], head.vocabulary, self.args.cache_rest)

        def target(rows: slice) -> Tensor:
            found = distributions(rows)
            previous[rows] = found.gather(-1, labels[rows, None])[:, 0]
            entropy[rows] = -torch.special.xlogy(found, found).sum(-1)
            return found

        crossed = cross_entropy_to(head, hidden, target)
        plain = nll[outputs.label_mask]
        # A row that the last epoch did not reach has q = y.
        weight = alpha * (torch.ones_like(previous) if there is None else there.to(previous))
        mixed = (1.0 - weight) * plain + weight * crossed
        gap = -torch.expm1(-plain.detach())  # 1 - p_y
        taught = (weight > 0).sum()
        metrics = {
            "nll": plain.mean(),
            "kl_prev": ((crossed - entropy) * (weight > 0)).sum() / taught,
            "target_ratio": 1.0 - (weight * (1.0 - previous)).sum() / gap.sum(),
        }
        # A process without such a label gives NaN, which the mean over processes leaves out.
        self.record({f"pskd/{name}": value for name, value in metrics.items()})
        return outputs.spread(mixed)

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        """Keep the teacher's hidden states (N, H) at the labels, and its head."""
        if self._held is None:
            return
        mask = inputs["labels"][:, 1:] != -100
        model, states = self._unwrapped(), []
        given = model_inputs(inputs, drop=frozenset(self.own_inputs))
        # Without a label the head has nothing to project, where a kernel takes labels alone.
        unscored = torch.full_like(inputs["labels"], -100)
        with self._held.in_place_of(model), last_hidden_states(model, states):
            model(**given, labels=unscored, fused_lm_head=True)
            self._taught = states[-1][:, :-1][mask], Head.kept(model)

    @torch.no_grad()
    def _write(self, rows: Tensor, counts: Tensor, head: Head, hidden: Tensor) -> None:
        """Keep the likeliest tokens at the labels of some rows, in the last epoch before a refresh."""
        assert self._current is not None
        every, epoch = int(self.args.refresh_epochs), int((self.state.epoch or 0.0) + 1e-6)
        if epoch % every != every - 1:
            return
        heat, k = self.args.teacher_temperature, self.args.cache_top_k

        def likeliest(hidden: Tensor) -> list[tuple[Tensor, ...]]:
            probs = (head.log_probs(hidden[part], heat).exp() for part in pieces(hidden, head))
            return [tuple(one.topk(k)) for one in probs]

        best = head.run(likeliest, hidden)
        if best:
            probs, tokens = (torch.cat([one[i] for one in best]).cpu() for i in (0, 1))
            self._current.write(rows, counts, tokens, probs)


# The closed form --------------------------------------------------------------------------------------------


def fit_two_and_mix(trainer: SelfDistillationTrainer, rows: Any = None) -> float:
    """Return the weight a* of the ground truth by two fits from the model as it is; the model is left so.

    The first fit is to the ground truth alone; it is also the teacher of the second, which is to the teacher
    alone. Each is a run of the trainer's own length, without its callbacks. Both models' predictions on
    held-out rows then give a*.

    Args:
        trainer: A trainer that has not begun; its settings and training rows are used.
        rows: Held-out rows as the trainer prepares them; None for the first `closed_form_val_rows` of its
            `eval_dataset`.
    """
    model = trainer._unwrapped()
    if rows is None:
        data = cast(Any, trainer.eval_dataset)
        rows = data.select(range(min(len(data), trainer.args.closed_form_val_rows)))
    start = HeldWeights(model, "pskd_schedule='closed_form'")
    try:
        _fit(trainer, 0.0, None)
        truth = HeldWeights(model, "pskd_schedule='closed_form'")
        _put(model, start)
        _fit(trainer, 1.0, truth.tensors)
        return _ratio(*_moments(trainer, model, truth, rows))
    finally:
        _put(model, start)


def _fit(trainer: SelfDistillationTrainer, alpha: float, teacher: Mapping[str, Tensor] | None) -> None:
    args = copy.copy(trainer.args)
    args.pskd_alpha, args.pskd_schedule, args.teacher = alpha, "constant", "checkpoint"
    args.save_strategy = args.eval_strategy = "no"  # type: ignore[assignment]
    args.report_to, args.push_to_hub, args.load_best_model_at_end = [], False, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weight of 1 is meant
        fit = SelfDistillationTrainer(
            trainer._unwrapped(),
            args,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
        )
    if teacher is not None:
        fit.teach(teacher)
    fit.train()


@torch.no_grad()
def _put(model: Any, held: HeldWeights) -> None:
    for name, parameter in model.named_parameters():
        if name in held.tensors:
            parameter.copy_(held.tensors[name])
            parameter.grad = None


@torch.no_grad()
def _moments(
    trainer: SelfDistillationTrainer, model: Any, truth: HeldWeights, rows: Any
) -> tuple[float, float]:
    """Return <y - u, v - u> and ||v - u||^2 over the label tokens of rows; the model gives u, `truth` v."""
    inner = square = 0.0
    size = trainer.args.per_device_eval_batch_size
    own = HeldWeights(model, "pskd_schedule='closed_form'")
    for start in range(0, len(rows), size):
        found = [rows[i] for i in range(start, min(start + size, len(rows)))]
        batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in found])
        batch = trainer._prepare_inputs(batch)
        labels = batch["labels"][:, 1:]
        sides = []
        for held in (own, truth):
            states: list[Tensor] = []
            with held.in_place_of(model), last_hidden_states(model, states):
                unscored = torch.full_like(batch["labels"], -100)
                model(**model_inputs(batch), labels=unscored, fused_lm_head=True)
                sides.append((states[-1][:, :-1][labels != -100], Head.kept(model)))
        wanted = labels[labels != -100]
        for part in pieces(*sides[0]):
            u, v = (head.log_probs(hidden[part]).exp() for hidden, head in sides)
            y = torch.nn.functional.one_hot(wanted[part], u.size(-1)).to(u)
            inner += float(((y - u) * (v - u)).double().sum())
            square += float((v - u).double().square().sum())
    return inner, square
