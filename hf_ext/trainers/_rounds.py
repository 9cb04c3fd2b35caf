"""Rounds of preference training: sample from the policy, score, pair, train by TRL's DPO, and again.

A round is one run of `DPOTrainer.train()` with its own schedule, in a folder of its own below `output_dir`:

    rounds.json             the round in work, or the last one that is done, with its figures and logs
    round_2/candidates.jsonl   what was sampled, with scores
    round_2/pairs.parquet      the pairs, with their log-probabilities under the reference
    round_2/checkpoint-10/     the trainer's own checkpoints
    round_2/policy.safetensors the trained tensors at the end of the round

`train(resume_from_checkpoint=True)` goes on from there: within a round from its newest checkpoint, with the
pairs that were made for it; between rounds from the tensors of the last one.

The reference is fixed within a round, so its log-probabilities are computed once, before the round; with
`reference="round_start"` by the policy itself: no second model is kept, and any adapter type will do.

Under FSDP2 and ZeRO-3 the model is sharded before anything is computed with it, and each process keeps its
own part of the policies; files hold whole tensors. Under DeepSpeed each round has a new engine; where that
computes in half precision, policies are what its optimizer holds in fp32, and the model has their rounding.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import shutil
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_utils import TrainOutput
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ..core import dist
from ..core.checks import check, check_choice
from ..core.files import read_tensors, write_tensors
from ..core.state import ROUNDS_FILE
from ._base import (
    check_columns,
    check_filled,
    check_map,
    map_rows,
    own_args,
)
from ._pairs import SELECTIONS, round_figures, select_pairs
from ._parts import fp32_copies, own_part, part_of_whole, put_part, whole_tensors
from ._reference import evaluation_mode, reference_model
from ._rewards import call_rewards, check_rewards
from ._round_engines import ShardedRounds
from ._round_files import (
    Progress,
    finite,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    read_rows,
    remove_checkpoints,
    remove_tensors,
    write_candidates,
    write_rows,
)
from ._sampling import (
    Sampler,
    SamplingSettings,
    VLLMArguments,
    decode_completions,
    end_tokens,
    tokenize_prompts,
)
from ._snapshots import reshard

logger = logging.getLogger(__name__)
_PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")
# Stated, so that a round without pairs has columns of the same types.
_FEATURES = Features(
    {name: List(Value("int64")) for name in _PAIR}
    | {name: Value("float32") for name in ("chosen_reward", "rejected_reward")}
)
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class RoundsConfig(VLLMArguments, DPOConfig):
    """Settings of rounds; `max_steps`, epochs, schedule and saving are those of each round.

    Args:
        num_rounds: Rounds T, >= 1.
        num_candidates: Completions n sampled for each prompt, >= 2.
        pair_selection: "max_min", "max_random", "max_max", "random" or "max_min_p"; see `select_pairs`.
        length_penalty: Score that each token costs a completion, for "max_min_p", >= 0.
        min_margin: Pairs whose scores differ by less are dropped, >= 0.
        missing_eos_penalty: Score that a completion without its end costs, >= 0; None for nothing.
        temperatures: Sampling temperatures, > 0; the candidates of a prompt take them in turn.
        sampling_top_p: Keep the likeliest tokens up to this probability, in (0, 1].
        sampling_top_k: Keep this many of the likeliest tokens; 0 keeps all.
        max_completion_length: Longest sampled completion, tokens, >= 1.
        generation_batch_size: Completions sampled at once on a process, >= 1.
        ds3_gather_for_generation: Whether DeepSpeed's stage 3 brings all weights together to sample, or one
            module's at a time, which needs less memory and more time.
        mix_previous_policy: Share of a prompt's candidates from the policy before the last round, [0, 1).
        reference: The DPO reference: "round_start", the policy that the round begins with, or "initial".
        accumulate_rounds: Whether to train on the pairs of all rounds so far.
        prompts_per_round: Prompts of a round; None deals all prompts evenly to the rounds.
        min_pairs: With fewer pairs, a round trains nothing, >= 1.
        reset_optimizer: Whether each round begins with a fresh optimizer.
        reward_weights: Weight of each reward function; None for 1.
        kl_prompts: Prompts that KL(policy || reference) is estimated on at a round's end; 0 for none.

    Raises:
        ValueError: A setting is outside its range, or two contradict each other.
    """

    num_rounds: int = field(default=3, metadata={"help": "Rounds."})
    num_candidates: int = field(default=8, metadata={"help": "Completions sampled for each prompt."})
    pair_selection: str = field(default="max_min", metadata={"help": "Which two completions make a pair."})
    length_penalty: float = field(default=0.0, metadata={"help": "Score for each token, for max_min_p."})
    min_margin: float = field(default=0.0, metadata={"help": "Pairs below this margin are dropped."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Score that a completion without its end costs."}
    )
    temperatures: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Sampling temperatures, taken in turn."}
    )
    sampling_top_p: float = field(default=1.0, metadata={"help": "Top-p of the sampling."})
    sampling_top_k: int = field(default=0, metadata={"help": "Top-k of the sampling; 0 for all."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest sampled completion, tokens."})
    generation_batch_size: int = field(default=32, metadata={"help": "Completions sampled at once."})
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Bring all weights of ZeRO-3 together to sample."}
    )
    mix_previous_policy: float = field(
        default=0.0, metadata={"help": "Share of candidates from the policy before the last round."}
    )
    reference: str = field(default="round_start", metadata={"help": "'round_start' or 'initial'."})
    accumulate_rounds: bool = field(default=False, metadata={"help": "Train on the pairs of all rounds."})
    prompts_per_round: int | None = field(default=None, metadata={"help": "Prompts of a round."})
    min_pairs: int = field(default=1, metadata={"help": "With fewer pairs, a round trains nothing."})
    reset_optimizer: bool = field(default=True, metadata={"help": "Each round has a fresh optimizer."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function."}
    )
    kl_prompts: int = field(default=64, metadata={"help": "Prompts for the estimate of the KL."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_rounds >= 1, "num_rounds", self.num_rounds, "at least 1")
        check(self.num_candidates >= 2, "num_candidates", self.num_candidates, "at least 2")
        check_choice("pair_selection", self.pair_selection, SELECTIONS)
        check(self.length_penalty >= 0, "length_penalty", self.length_penalty, "at least 0")
        only = "0 unless pair_selection is 'max_min_p'"
        fits = self.length_penalty == 0 or self.pair_selection == "max_min_p"
        check(fits, "length_penalty", self.length_penalty, only)
        check(self.min_margin >= 0, "min_margin", self.min_margin, "at least 0")
        penalty = self.missing_eos_penalty
        check(penalty is None or penalty >= 0, "missing_eos_penalty", penalty, "at least 0, or None")
        warm = bool(self.temperatures) and all(value > 0 for value in self.temperatures)
        check(warm, "temperatures", self.temperatures, "positive numbers, at least one")
        mix = self.mix_previous_policy
        check(0 <= mix < 1, "mix_previous_policy", mix, "in [0, 1)")
        check_choice("reference", self.reference, ("round_start", "initial"))
        # Named as here, not as the sampler's.
        top_p, top_k, longest = self.sampling_top_p, self.sampling_top_k, self.max_completion_length
        check(0 < top_p <= 1, "sampling_top_p", top_p, "above 0 and at most 1")
        check(top_k >= 0, "sampling_top_k", top_k, "at least 0 (0 keeps all tokens)")
        check(longest >= 1, "max_completion_length", longest, "at least 1")
        size = self.generation_batch_size
        check(size >= 1, "generation_batch_size", size, "at least 1")
        check(
            self.prompts_per_round is None or self.prompts_per_round >= 1,
            "prompts_per_round",
            self.prompts_per_round,
            "at least 1, or None",
        )
        check(self.min_pairs >= 1, "min_pairs", self.min_pairs, "at least 1")
        check(self.kl_prompts >= 0, "kl_prompts", self.kl_prompts, "at least 0")
        check(not self.sync_ref_model, "sync_ref_model", True, "false: a round's reference is fixed")
        self._smooth_sigmoid()
        self.sampling_settings()  # checks the rest

    def _smooth_sigmoid(self) -> None:
        # TRL's "sigmoid" ignores label_smoothing; conservative DPO is this sum of two of its losses.
        epsilon = self.label_smoothing
        if self.loss_type == ["sigmoid"] and epsilon > 0:
            check(epsilon < 0.5, "label_smoothing", epsilon, "in [0, 0.5)")
            self.loss_type = ["robust", "sigmoid"]
            self.loss_weights = [-(1 - 2 * epsilon), 2 * (1 - epsilon)]

    def sampling_settings(self) -> SamplingSettings:
        """Return how completions are drawn."""
        return SamplingSettings.of(
            self,
            max_new_tokens=self.max_completion_length,
            top_p=self.sampling_top_p,
            top_k=self.sampling_top_k,
            batch_size=self.generation_batch_size,
        )


class RoundsTrainer(ShardedRounds, DPOTrainer):
    """Base of trainers that make their own pairs, round after round; see the module's docstring.

    A method overrides `end_round`.

    Args:
        model: As TRL's DPOTrainer.
        ref_model: As TRL's; with `reference="initial"` only.
        args: A config derived from `RoundsConfig`.
        data_collator: As TRL's.
        train_dataset: Rows with the column `prompt` (a text, or messages); other columns go to the reward
            functions.
        eval_dataset: Rows with `prompt`, `chosen` and `rejected`, or None.
        reward_funcs: A function, or several, with the signature of GRPO's.
        **kwargs: The other arguments of TRL's DPOTrainer.

    Raises:
        ValueError: A column is missing, a prompt is empty, or the settings contradict each other.
        TypeError: The data set streams, or a reward function is none.
    """

    args: Any  # a RoundsConfig

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *more: Any,
        reward_funcs: Any,
        **kwargs: Any,
    ) -> None:
        args = own_args(self, args)
        self.reward_funcs = check_rewards(reward_funcs, args.reward_weights)
        check_map(train_dataset, "train_dataset", "prompts are dealt to the rounds, and sampled from as text")
        for name, rows in _named(eval_dataset).items():
            field = f"eval_dataset[{name!r}]" if isinstance(eval_dataset, dict) else "eval_dataset"
            check_map(rows, field, "its reference log-probabilities are computed before each round, for text")
        check_columns(train_dataset, ("prompt",), "train_dataset")
        check_filled(train_dataset, ("prompt",), "train_dataset")
        at_start = args.reference == "round_start"
        if at_start and ref_model is not None:
            raise ValueError(
                "ref_model must be left out with reference='round_start': it is the policy itself"
            )
        # Each round computes its reference ahead in any case. TRL keeps a reference model, or none, by this.
        args.precompute_ref_log_probs = at_start
        self._kept_optimizer: dict[str, Tensor] | None = None
        self._initial: dict[str, Tensor] | None = None  # the policy that `train` was first called with
        self._round_start: dict[str, Tensor] | None = None
        self._wide = None
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *more, **kwargs)
        self._check_sharding()
        if self.is_deepspeed_enabled:  # as given: a round fills in its own number of steps
            self._deepspeed_scheduler = copy.deepcopy(self._deepspeed().config.get("scheduler"))
        self.prompts = cast(Dataset, self.train_dataset)
        self.precompute_ref_logps = True
        self._check_room()
        asked = (args.prompts_per_round or 0) * args.num_rounds
        if asked > len(self.prompts):
            warnings.warn(
                f"{args.num_rounds} rounds of {args.prompts_per_round} prompts use some of the "
                f"{len(self.prompts)} prompts again",
                stacklevel=2,
            )
        self.sampler = Sampler(self, args.sampling_settings())
        self.round = 0
        if not args.precompute_ref_log_probs:  # else TRL's construction has asked for it
            if self.is_deepspeed_enabled:
                self._shard()
            held_out = {name: self.with_reference(rows) for name, rows in _named(self.eval_dataset).items()}
            self.eval_dataset = held_out if isinstance(self.eval_dataset, dict) else held_out.get("eval")

    # Data -----------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if dataset_name != "train":
            check_columns(dataset, ("chosen", "rejected"), f"{dataset_name}_dataset")
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            ids = tokenize_prompts(
                processing_class,
                [row["prompt"]],
                tools=row.get("tools"),
                chat_template_kwargs=row.get("chat_template_kwargs"),
            )
            return {"prompt_ids": ids[0]}

        rows = map_rows(dataset, tokenize, args, "Tokenizing prompts")
        limit = args.max_length
        if limit is None or args.truncation_mode != "keep_start":
            return rows
        # As TRL does: what is cut at the end would leave nothing of a completion.
        kept = rows.filter(lambda row: len(row["prompt_ids"]) < limit, desc="Dropping long prompts")
        check(len(kept) > 0, "max_length", limit, "above the length of some prompt of train_dataset")
        return kept

    def _check_room(self) -> None:
        config: Any = self.accelerator.unwrap_model(self.model).config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = self.args.max_completion_length
        for prompt, ids in zip(self.prompts["prompt"], self.prompts["prompt_ids"], strict=True):
            if positions is not None and len(ids) + longest > positions:
                raise ValueError(
                    f"train_dataset: the prompt {str(prompt)[:60]!r} has {len(ids)} tokens; with "
                    f"max_completion_length={longest} the model's {positions} positions leave room for "
                    f"{positions - longest}"
                )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's caches by the hash of the model that it began with, and so by none of a later round.
        if "chosen_ids" not in dataset.column_names:
            return dataset
        self._shard()
        if self.args.reference == "initial" or self._round_start is None:
            return self.with_reference(dataset, batch_size)
        kept = self._round_start.keys() == self.policy_parameters().keys()
        rule = "given at construction: the policy that the last round began with is no longer there"
        check(kept, "a data set to evaluate", name, rule)
        with self._as_policy(self._round_start):
            return self.with_reference(dataset, batch_size)

    def with_reference(self, rows: Dataset, batch_size: int | None = None) -> Dataset:
        """Return pairs with their log-probabilities under the reference as columns (a collective)."""
        rows = _without_reference(rows)
        if self.args.reference == "initial":
            with reference_model(self) as model:
                found = self._logps(rows, model, batch_size)
        else:
            found = self._logps(rows, self.model, batch_size)
        for name, values in zip(_REFERENCE, found, strict=True):
            rows = rows.add_column(name, values.tolist())  # pyright: ignore[reportCallIssue]
        return rows

    def _logps(self, rows: Dataset, model: Any, batch_size: int | None = None) -> Tensor:
        """Return log-probabilities (2, rows) of chosen and rejected under a model as it stands."""
        size = batch_size or self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        tokens = rows.select_columns(list(_PAIR))
        if not len(rows):
            return torch.zeros(2, 0)
        loader = self.accelerator.prepare(
            DataLoader(cast(Any, tokens), batch_size=size, collate_fn=self.data_collator)
        )
        found: list[Tensor] = []
        kept = self.ref_model
        # As its own reference: the parent then leaves the adapters as they stand.
        self.ref_model = model
        try:
            with evaluation_mode(model):
                for batch in loader:
                    pair = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
                    found.append(torch.stack([values.float().cpu() for values in pair]))
        finally:
            self.ref_model = kept
        return torch.cat(found, dim=1)

    def prompts_of(self, number: int) -> Dataset:
        """Return the prompts of a round; with `prompts_per_round` they begin anew when they are used up."""
        total, rounds = len(self.prompts), self.args.num_rounds
        size = self.args.prompts_per_round
        if size is None:
            check(total >= rounds, "train_dataset's rows", total, f"at least {rounds}, one for each round")
            first, last = number * total // rounds, (number + 1) * total // rounds
        else:
            first, last = number * size, (number + 1) * size
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.args.seed)).tolist()
        return self.prompts.select([order[place % total] for place in range(first, last)])

    # Policies -------------------------------------------------------------------------------------

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return, by name, all tensors that differ between the policies of this run."""
        model = self.accelerator.unwrap_model(self.model)
        reshard(model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def policy_state(self) -> dict[str, Tensor]:
        """Return copies of the policy's tensors on the CPU, of sharded ones this process's part."""
        if self._wide is not None:
            return dict(self._wide)
        return {name: own_part(p) for name, p in self.policy_parameters().items()}

    def read_policy(self, path: Path) -> dict[str, Tensor]:
        """Return what `policy_state` has returned, from a file of whole tensors (a collective).

        Raises:
            ValueError: A name or a shape differs from that of the model in training.
        """
        state, parameters = read_tensors(path), self.policy_parameters()
        differing = sorted(state.keys() ^ parameters.keys())
        check(not differing, "the policy's tensors", differing[:1], "those of the model in training")
        return {name: part_of_whole(state[name], p, name) for name, p in parameters.items()}

    def load_policy(self, state: Mapping[str, Tensor]) -> None:
        """Write a policy's tensors into the model.

        Args:
            state: What `policy_state` has returned.
        """
        for name, parameter in self.policy_parameters().items():
            put_part(parameter, state[name])
        if self._wide is not None:
            self._wide = dict(state)

    @contextlib.contextmanager
    def _as_policy(self, state: Mapping[str, Tensor]) -> Generator[None]:
        # What the model itself holds is put back: in the middle of a round it has left `_wide` behind.
        wide, self._wide = self._wide, None
        kept = self.policy_state()
        self.load_policy(state)
        try:
            yield
        finally:
            self.load_policy(kept)
            self._wide = wide

    def begin_rounds(self, run: Path, last: int) -> None:
        """Take up what a method keeps between rounds; `last` is the last round done, or -1."""

    def end_round(self, before: Mapping[str, Tensor], folder: Path, *, trained: bool) -> dict[str, float]:
        """Make the next round's policy of the one at the end of this round; here they are the same.

        Args:
            before: The policy that the round began with.
            folder: The round's folder.
            trained: Whether there were pairs to train on.

        Returns:
            Figures of the round.
        """
        del before, folder, trained
        return {}

    def after_rounds(self, run: Path) -> None:
        """Make the model that the run returns, once all rounds are done."""

    # Rounds ---------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Run all rounds.

        Args:
            resume_from_checkpoint: True, or the run's folder, to go on where an earlier call was cut short.
            trial: As transformers' Trainer.
            ignore_keys_for_eval: As transformers' Trainer.

        Returns:
            TRL's output of the last round, where `global_step` counts the steps of all rounds and `metrics`
            has the figures of the last one; `state.log_history` holds the logs of all rounds.

        Raises:
            ValueError: There is nothing to resume, or it was made with other settings.
        """
        run = Path(str(self.args.output_dir))
        progress, checkpoint = self._begin(run, resume_from_checkpoint)
        outputs: list[TrainOutput] = []
        try:
            for number in range(progress.round + 1, self.args.num_rounds):
                self.round, folder = number, run / f"round_{number}"
                rows = self._rows(run, folder, progress)
                set_seed(self.args.seed + 1000 * number)
                enough = len(rows) >= self.args.min_pairs
                if enough:
                    outputs.append(self._train_round(rows, folder, checkpoint, trial, ignore_keys_for_eval))
                    last = outputs[-1]
                    seconds = float(last.metrics["train_runtime"])
                    progress.figures[number] |= {"train_loss": last.training_loss, "train_runtime": seconds}
                else:
                    self._tell_too_few(len(rows), progress.figures[number])
                checkpoint = None
                self._finish_round(run, folder, progress, trained=enough)
        finally:
            self.args.output_dir = str(run)
            self.train_dataset = self.prompts
        self.after_rounds(run)
        self.state.log_history = list(progress.logs)
        figures = {f"rounds/{name}": value for name, value in progress.figures[-1].items()}
        trained = [entry for entry in progress.figures if "train_loss" in entry]
        loss = float(trained[-1]["train_loss"] or math.nan) if trained else 0.0
        seconds = sum(float(entry["train_runtime"]) for entry in trained)
        of_last = outputs[-1].metrics if outputs else {}
        return TrainOutput(sum(progress.steps), loss, {**of_last, **figures, "train_runtime": seconds})

    def _tell_too_few(self, pairs: int, figures: Mapping[str, float]) -> None:
        if dist.is_main():
            logger.warning(
                "round %d trains nothing: %d pairs of %d prompts, min_pairs is %d; completions of the others "
                "score alike (mean reward %.3g, best %.3g)",
                self.round,
                pairs,
                int(figures["pairs"] + figures["dropped"]),
                self.args.min_pairs,
                figures["mean_reward"],
                figures["top1_reward"],
            )

    def _begin(self, run: Path, resume: str | bool | None) -> tuple[Progress, str | None]:
        settings = self._settings()
        self._shard()
        if not resume or self._initial is None:
            self._initial = self.policy_state()
        self.policy = self.previous_policy = initial = self._initial
        if not resume:
            dist.on_main(lambda: (run / ROUNDS_FILE).unlink(missing_ok=True))
            self.begin_rounds(run, -1)
            return Progress(-1, True, settings), None
        given = run if resume is True else Path(resume)
        check(
            given.resolve() == run.resolve(),
            "resume_from_checkpoint",
            str(resume),
            f"true, or the run's folder {run}; rounds know where they were cut short",
        )
        progress = Progress.read(run)
        where = str(run / ROUNDS_FILE)
        for name, value in settings.items():
            saved = progress.settings.get(name)
            check(saved == value, name, value, f"{saved!r}, as in the run to resume", where=where)
        checkpoint = None
        if not progress.done:
            checkpoint = newest_checkpoint(run / f"round_{progress.round}")
            progress.round, progress.done = progress.round - 1, True
        policies = [
            self.read_policy(run / f"round_{number}" / "policy.safetensors") if number >= 0 else initial
            for number in (progress.round - 1, progress.round)
        ]
        self.previous_policy, self.policy = policies
        self.round = max(progress.round, 0)
        self.load_policy(self.policy)  # this object may have trained before
        self.begin_rounds(run, progress.round)
        kept = run / f"round_{progress.round}" / "optimizer.safetensors"
        if not self.args.reset_optimizer and checkpoint is None and any(progress.steps):
            self._kept_optimizer = read_tensors(kept)
        return progress, checkpoint

    def _settings(self) -> dict[str, Any]:
        free = {"ds3_gather_for_generation"}  # nothing of what a round gives
        # With a fixed number of prompts for each, more rounds may be asked for than before.
        free |= set() if self.args.prompts_per_round is None else {"num_rounds"}
        names = {name for cls in type(self.args).__mro__ if cls.__module__.startswith("hf_ext.")
                 for name in vars(cls).get("__annotations__", {})}  # fmt: skip
        own = {name: getattr(self.args, name) for name in sorted(names - free)}
        return {**own, "seed": self.args.seed, "prompts": len(self.prompts)}

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer, with the state of the round before where that is kept."""
        reshard(self.model)  # of the shards: sampling and scoring leave some of them gathered
        optimizer = super().create_optimizer(model)
        if self._kept_optimizer is not None:
            load_optimizer_tensors(optimizer, self._kept_optimizer)
            self._kept_optimizer = None
        return optimizer

    def _rows(self, run: Path, folder: Path, progress: Progress) -> Dataset:
        """Return a round's pairs: those of its file where it is resumed, else new ones (a collective)."""
        if len(progress.figures) <= self.round:
            dist.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
            rows, figures = self._sample_pairs(folder)
            if self.args.accumulate_rounds and self.round:
                earlier = read_rows(run / f"round_{self.round - 1}" / "pairs.parquet")  # of all before it
                rows = concatenate_datasets([_without_reference(earlier), rows])
            rows = self.with_reference(rows)
            dist.on_main(lambda: write_rows(folder / "pairs.parquet", rows))
            for name, held_out in _named(self.eval_dataset).items():
                referred = self.with_reference(held_out).select_columns(list(_REFERENCE))
                path = folder / f"reference_{name}.parquet"
                dist.on_main(lambda path=path, referred=referred: write_rows(path, referred))
            progress.figures.append(figures)
            progress.begin(self.round).write(run)
        held_out = {
            name: concatenate_datasets(
                [_without_reference(old), read_rows(folder / f"reference_{name}.parquet")], axis=1
            )
            for name, old in _named(self.eval_dataset).items()
        }
        if held_out:
            self.eval_dataset = held_out if isinstance(self.eval_dataset, dict) else held_out["eval"]
        return read_rows(folder / "pairs.parquet")

    def _sample_pairs(self, folder: Path) -> tuple[Dataset, dict[str, float]]:
        data = self.prompts_of(self.round)
        prompts, prompt_ids = list(data["prompt"]), list(data["prompt_ids"])
        ids = self._candidates(prompt_ids)
        completions = decode_completions(self.sampler.tokenizer, prompts, ids)
        columns = {name: list(data[name]) for name in data.column_names if name != "prompt_ids"}
        weights = self.args.reward_weights
        with dist.together():
            scores = call_rewards(
                self.reward_funcs, prompts, completions, ids, columns, reward_weights=weights
            )
        scores = dist.broadcast_(scores)  # a function need not give every process the same
        lengths = torch.tensor([[len(one) for one in group] for group in ids])
        pairs = select_pairs(
            scores - self._unended(ids),
            lengths,
            selection=self.args.pair_selection,
            length_penalty=self.args.length_penalty,
            min_margin=self.args.min_margin,
            seed=self.args.seed + 1000 * self.round,
        )
        path = folder / "candidates.jsonl"
        dist.on_main(lambda: write_candidates(path, prompts, completions, scores, pairs))
        kept = [row for row, keep in enumerate(pairs.keep.tolist()) if keep]
        better, worse = pairs.chosen.tolist(), pairs.rejected.tolist()
        rows = {
            "prompt_ids": [prompt_ids[row] for row in kept],
            "chosen_ids": [ids[row][better[row]] for row in kept],
            "rejected_ids": [ids[row][worse[row]] for row in kept],
            "chosen_reward": [float(scores[row, better[row]]) for row in kept],
            "rejected_reward": [float(scores[row, worse[row]]) for row in kept],
        }
        return Dataset.from_dict(rows, features=_FEATURES), round_figures(scores, lengths, pairs)

    def _unended(self, ids: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        penalty = self.args.missing_eos_penalty or 0.0
        ends = set(end_tokens(self.accelerator.unwrap_model(self.model), self.sampler.tokenizer))
        return torch.tensor([[0.0 if one and one[-1] in ends else penalty for one in group] for group in ids])

    def _candidates(self, prompt_ids: list[list[int]]) -> list[list[list[int]]]:
        n, temperatures = self.args.num_candidates, self.args.temperatures
        old = round(n * self.args.mix_previous_policy) if self.round else 0
        found: list[list[list[int]]] = [[] for _ in prompt_ids]

        def draw(count: int, stream: int) -> None:
            for place, temperature in enumerate(temperatures):
                share = len(range(place, count, len(temperatures)))
                seed = self.args.seed + 1000 * self.round + stream + place
                if share:
                    new = self.sampler.completions(prompt_ids, share, temperature=temperature, seed=seed)
                    for group, more in zip(found, new, strict=True):
                        group += more

        draw(n - old, 0)
        if old:
            with self._as_policy(self.previous_policy):
                draw(old, 500)
        return found

    def _train_round(
        self, rows: Dataset, folder: Path, checkpoint: str | None, trial: Any, ignore: list[str] | None
    ) -> TrainOutput:
        self.train_dataset = rows
        if self.args.reset_optimizer:
            self.optimizer = None
        if self.is_deepspeed_enabled:
            self._end_engine()
            if self._deepspeed_scheduler is not None:
                self._deepspeed().config["scheduler"] = copy.deepcopy(self._deepspeed_scheduler)
        self.args.output_dir = str(folder)
        self._round_start = self.policy
        at_start = self.args.eval_on_start
        self.args.eval_on_start = at_start and checkpoint is None
        try:
            output = super().train(checkpoint, trial, ignore)
        finally:
            self.args.eval_on_start = at_start
        if self._wide is not None:
            self._wide = fp32_copies(self.policy_parameters())
        return output

    def _finish_round(self, run: Path, folder: Path, progress: Progress, *, trained: bool) -> None:
        self.args.output_dir = str(run)
        before, figures = self.policy, progress.figures[self.round]
        if trained:
            figures |= self._kl_to_reference(before)
        figures |= self.end_round(before, folder, trained=trained)
        if trained:
            self.log({name if "/" in name else f"rounds/{name}": value for name, value in figures.items()})
            before_it = sum(progress.steps[: self.round])
            for entry in self.state.log_history:
                step = before_it + entry["step"]  # of the whole run
                progress.logs.append({**finite(entry), "round": self.round, "step": step})
        progress.figures[self.round] = finite(figures)
        self.previous_policy, self.policy = before, self.policy_state()
        policy = whole_tensors(self.policy, self.policy_parameters())
        dist.on_main(lambda: write_tensors(folder / "policy.safetensors", policy))
        # After a resume no optimizer is there until a round trains: its state then still waits for one.
        kept = None if self.args.reset_optimizer else self._kept_optimizer
        if not self.args.reset_optimizer and kept is None and self.optimizer is not None:
            kept = optimizer_tensors(self.optimizer)
        if kept is not None:
            dist.on_main(lambda: write_tensors(folder / "optimizer.safetensors", kept))
        progress.round, progress.done = self.round, True
        progress.steps = [*progress.steps[: self.round], self.state.global_step if trained else 0]
        progress.write(run)
        # Two policies are kept, and the checkpoints of the last round alone.
        if self.round:
            dist.on_main(lambda: remove_checkpoints(run / f"round_{self.round - 1}"))
        dist.on_main(lambda: remove_tensors(run / f"round_{self.round - 2}"))

    def _kl_to_reference(self, before: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean of log pi(y|x) - log pi_ref(y|x) over samples y of the policy (a collective)."""
        ids = list(self.prompts_of(self.round)["prompt_ids"])[: self.args.kl_prompts]
        if not ids:
            return {}
        sampled = self.sampler.completions(ids, 1, seed=self.args.seed + 1000 * self.round + 900)
        rows = {"prompt_ids": ids, "chosen_ids": [group[0] for group in sampled]}
        data = Dataset.from_dict({**rows, "rejected_ids": rows["chosen_ids"]})
        now = self._logps(data, self.model)
        if self.args.reference == "initial":
            with reference_model(self) as model:
                then = self._logps(data, model)
        else:
            with self._as_policy(before):
                then = self._logps(data, self.model)
        return {"kl_to_reference": (now - then).mean().item()}


# Rows -------------------------------------------------------------------------------------------------------


def _named(rows: Any) -> dict[str, Dataset]:
    return {} if rows is None else dict(rows) if isinstance(rows, dict) else {"eval": rows}


def _without_reference(rows: Dataset) -> Dataset:
    return rows.remove_columns([name for name in _REFERENCE if name in rows.column_names])
