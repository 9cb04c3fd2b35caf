"""The comparison: methods times seeds on the same rows in the same order, each at a rate tuned on other rows.

Every run goes through the trainer of `hf-ext train`. A finished run is written at once, under a key of
everything that determines it, so that a second invocation repeats none and a changed recipe reuses none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..core.checks import check
from .comparison_report import Results, Tuning, summarize, write_report
from .comparison_runs import Bench, Record, Run, RunStore
from .comparison_settings import (
    CompareSettings,
    Method,
    read_methods,
    read_settings,
    run_seeds,
    tune_seed,
)
from .preflight import build_adapter, check_surroundings, check_targets, skeleton
from .recipe import Job
from .run import Say, dataset_label, versions
from .sources import load_data, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments

RUNS = "runs.json"


@dataclass(frozen=True)
class Comparison:
    """A comparison that has passed every check, with what the checks have built.

    Args:
        job: The recipe.
        args: The trainer's settings.
        settings: The recipe's `compare`.
        methods: What to compare, the baseline first.
        tokenizer: The model's.
        train: Rows to train on.
        tune: Rows to choose the learning rates on.
        test: Rows to report on.
    """

    job: Job
    args: TrainingArguments
    settings: CompareSettings
    methods: list[Method]
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    tune: Dataset
    test: Dataset


# Checks -----------------------------------------------------------------------------------------------------


def check_comparison(job: Job, chosen: Sequence[str] | None = None) -> Comparison:
    """Check a comparison in full, before a weight is read.

    Args:
        job: The recipe.
        chosen: Methods to compare instead of the recipe's; None for those.

    Raises:
        ValueError: Something in the recipe does not fit; the text names the file and the field.
        TypeError: A value does not have its field's type.
        OSError: The output folder cannot be written.
    """
    if job.recipe.cpu_threads is not None:
        torch.set_num_threads(job.recipe.cpu_threads)
    settings = read_settings(job)
    methods = read_methods(job, settings, chosen)
    rule = "left out: a comparison continues by itself"
    resume = job.recipe.resume_from_checkpoint
    check(resume is None, f"{job.where}: resume_from_checkpoint", resume, rule)
    args = job.training_arguments()
    rule = "1: a comparison runs in one process; start it without a launcher"
    check(args.world_size == 1, f"{job.where}: world size", args.world_size, rule)
    rule = "at most 1: make one visible with CUDA_VISIBLE_DEVICES"
    check(args.n_gpu <= 1, f"{job.where}: visible GPUs", args.n_gpu, rule)
    check_surroundings(job, args)
    RunStore(Path(job.output_dir) / RUNS)
    model = skeleton(job, args)
    for method in methods:
        adapter = build_adapter(method.job(job), method.field)
        check_targets(job, copy.deepcopy(model), adapter, method.field)
    tokenizer = load_tokenizer(job)
    train, tune, test = _load_rows(job, settings)
    return Comparison(job, args, settings, methods, tokenizer, train, tune, test)


def _load_rows(job: Job, settings: CompareSettings) -> tuple[Dataset, Dataset, Dataset]:
    train, test = load_data(job)
    assert test is not None  # read_settings has checked that the recipe names held-out rows
    if settings.tune_split is not None:
        split = replace(
            job.recipe,
            dataset_train_split=settings.tune_split,
            dataset_test_split=None,
            dataset_test_size=None,
            max_train_samples=job.recipe.max_eval_samples,
        )
        try:
            tune, _ = load_data(replace(job, recipe=split))
        except ValueError as error:
            text = str(error).replace("dataset_train_split", "compare.tune_split")
            raise ValueError(text) from error
        return train, tune, test
    count = len(test) if settings.tune_size is None else settings.tune_size
    rule = f"below {len(train)}, the number of training rows (left out, it is that of the held-out rows)"
    check(count < len(train), f"{job.where}: compare.tune_size", count, rule)
    parts = train.train_test_split(test_size=count, seed=int(job.settings.get("seed", 42)))
    return parts["train"], parts["test"], test


# All runs ---------------------------------------------------------------------------------------------------


def run_comparison(comparison: Comparison, say: Say = lambda _: None) -> dict[str, Any]:
    """Choose the rates, run methods times seeds, and write table, JSON and plot into the output folder.

    Args:
        comparison: The checked comparison.
        say: Receives lines for the user.

    Returns:
        What `comparison.json` holds.

    Raises:
        OSError: A file cannot be written.
        RuntimeError: No method has finished, or a method was given other batches than another one.
    """
    c, settings = comparison, comparison.settings
    if find_spec("matplotlib") is None:
        say("no plot without matplotlib: pip install 'hf-ext[plot]'")
    held_out = {"tune": c.tune, "test": c.test}
    bench = Bench(c.job, c.args, c.tokenizer, c.train, held_out, settings.eval_points)
    rows = {"train": len(bench.train), **{name: len(found) for name, found in bench.held_out.items()}}
    counts = f"{rows['train']:,} rows to train on, {rows['tune']:,} to tune on, {rows['test']:,} to report"
    say(f"{c.job.recipe.dataset_name}: {counts}")
    shared = settings.shared_learning_rate
    seeds = run_seeds(c.job, settings)
    planned = sum(len(method.learning_rates) for method in c.methods)
    planned += len(c.methods) * len(seeds) * (1 if shared is None else 2)
    with tqdm(total=planned, unit="run", smoothing=0.0, disable=bool(c.args.disable_tqdm)) as bar:
        loop = _Loop(bench, RunStore(Path(c.job.output_dir) / RUNS), bar, say)
        tuning = {method.label: loop.tune(method, tune_seed(c.job, settings)) for method in c.methods}
        best = {label: found.best for label, found in tuning.items()}
        tuned = {method.label: loop.report(method, best[method.label], seeds) for method in c.methods}
        at_shared = {
            # A method without a finite rate is not tried again.
            method.label: loop.report(method, shared if best[method.label] is not None else None, seeds)
            for method in c.methods
            if shared is not None
        }
    results = Results(
        job=c.job,
        settings=settings,
        methods=c.methods,
        seeds=seeds,
        tune_seed=tune_seed(c.job, settings),
        rows=rows,
        dataset=dataset_label(c.job.recipe.dataset_name),
        tuning=tuning,
        tuned=tuned,
        shared=at_shared if shared is not None else None,
        versions=versions(),
    )
    summary = summarize(results)
    say(write_report(Path(c.job.output_dir), summary))
    if all(row["failed"] for row in summary["tuned"]):
        raise RuntimeError(f"no method has finished: {summary['tuned'][0]['failed']}")
    return summary


class _Loop:
    """Runs what is not yet in the store, and counts."""

    def __init__(self, bench: Bench, store: RunStore, bar: tqdm[Any], say: Say) -> None:
        self.bench, self.store, self.bar, self.say = bench, store, bar, say
        self.orders: dict[int, tuple[str, str]] = {}  # seed -> batches, and whose they were

    def once(self, run: Run) -> Record:
        key = self.bench.key(run)
        record = self.store.get(key)
        if record is not None:
            self._pass_over()
        else:
            record = self.bench.train_once(run)
            self.store.put(key, record)
            self.bar.update()
            with self.bar.external_write_mode():
                self.say(f"{run}: {_outcome(record)} ({record['seconds']:.1f} s)")
        self._check_order(run, record)
        return record

    def _pass_over(self) -> None:
        if not self.bar.disable:  # a bar that is switched off has no `initial`
            self.bar.initial += 1  # not work of this session: the estimate leaves it out
            self.bar.n += 1
            self.bar.refresh()

    def _check_order(self, run: Run, record: Record) -> None:
        if record["status"] != "done":
            return
        batches, owner = self.orders.setdefault(run.seed, (record["batches"], str(run)))
        if batches != record["batches"]:
            raise RuntimeError(f"{run} was given other batches than {owner}: the losses cannot be compared")

    def tune(self, method: Method, seed: int) -> Tuning:
        records = {rate: self.once(Run(method, rate, seed, "tune")) for rate in method.learning_rates}
        found = Tuning(records)
        for line in found.notes(method.label):
            with self.bar.external_write_mode():
                self.say(line)
        return found

    def report(self, method: Method, rate: float | None, seeds: Sequence[int]) -> list[Record]:
        if rate is None:
            self.bar.total -= len(seeds)
            return []
        return [self.once(Run(method, rate, seed, "test")) for seed in seeds]


def _outcome(record: Record) -> str:
    return f"{record['curve'][-1][1]:.4f}" if record["status"] == "done" else f"failed, {record['reason']}"
