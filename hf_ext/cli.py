"""`hf-ext`: train a recipe, compare methods on it, list and explain methods, merge models, export adapters.

Only the standard library is imported here; each command imports what it needs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_NAME = "hf-ext"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        0; 2 where the command line, a recipe or a file was refused before work began; 1 where work failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed, rest = _parser().parse_known_args(arguments)
    if rest and parsed.command not in ("train", "compare"):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.command is None:
        _parser().print_help()
        return 2
    parsed.rest = rest
    try:
        return int(parsed.run(parsed))
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error, parsed.debug, code=2)
    except KeyboardInterrupt:
        return _fail(InterruptedError("interrupted"), parsed.debug, code=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_NAME, description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = _command(
        commands,
        "train",
        _train,
        help="train a recipe",
        description="Train a recipe: check it, train, evaluate, save, export, merge, reload.",
        epilog="Every key of a recipe can be given as --key value; --adapter.r 8 sets one of the adapter.",
    )
    train.add_argument("recipe", help="YAML file; examples/quickstart.yaml needs no network")
    train.add_argument("--num_processes", "--num-processes", type=int, metavar="N", help="run in N processes")

    compare = _command(
        commands,
        "compare",
        _compare,
        help="compare methods on a recipe",
        description="Train methods times seeds on a recipe's data, each at a tuned learning rate.",
        epilog="Every key of a recipe can be given as --key value; --compare.seeds 5 sets one of the "
        "comparison. The same command continues a comparison that was interrupted.",
    )
    compare.add_argument("recipe", help="YAML file; examples/compare.yaml needs no network")
    compare.add_argument("--methods", metavar="A,B", help="methods to compare, the baseline first")

    listing = _command(commands, "list", _list, help="list the methods")
    listing.add_argument("kind", nargs="?", help="adapter, callback, trainer, optimizer or merge")

    info = _command(commands, "info", _info, help="explain a method and its settings")
    info.add_argument("name")

    schedule = commands.add_parser("schedule", help="learning-rate schedules from finished runs")
    schedules = schedule.add_subparsers(dest="action", metavar="ACTION", required=True)
    refine = _command(
        schedules,
        "refine",
        _refine,
        help="make the refined schedule of a recorded run",
        description="Write refined_schedule.json and .png into the folder of a run that recorded gradient "
        "norms (RefinedLinearDecayCallback).",
    )
    refine.add_argument("run_dir", metavar="RUN_DIR", help="output folder of the run")
    refine.add_argument("--norm", default="auto", help="l1, l2, or auto for what suits the optimizer")
    refine.add_argument("--tau", type=float, default=0.1, help="median window as a share of the run (0.1)")
    refine.add_argument("--keep-zero", action="store_true", help="end with a rate of 0, as in the paper")
    refine.add_argument("--allow-partial", action="store_true", help="take a run that was ended early")
    predict = _command(
        schedules,
        "predict",
        _predict,
        help="rank schedules by their forecast final loss",
        description="Fit the annealing law to recorded runs (AnnealingLawCallback), rank candidate schedules "
        "by it, and write schedule_forecast.json and .png into the first run's folder.",
        epilog="Options of a schedule follow a colon: --schedules wsd:num_decay_steps=100,cosine",
    )
    predict.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="output folders of the runs")
    predict.add_argument(
        "--schedules",
        metavar="A,B",
        help="names (constant,linear,cosine,wsd,infinite_lr); "
        "refined takes the norms that the first run recorded",
    )
    predict.add_argument("--steps", type=int, metavar="N", help="updates of each schedule (those of the run)")
    predict.add_argument("--learning-rate", type=float, metavar="LR", help="their peak (that of the runs)")
    predict.add_argument("--warmup-steps", type=int, metavar="N", help="their warm-up (that of the run)")
    predict.add_argument("--lam", type=float, default=0.999, help="decay of the annealing momentum (0.999)")
    predict.add_argument("--fit-lambda", action="store_true", help="take the best of 0.99, 0.995 and 0.999")
    predict.add_argument("--level", type=float, default=0.9, help="share within the intervals (0.9)")
    predict.add_argument("--allow-peak-change", action="store_true", help="allow a peak above the fitted one")

    merge = _command(
        commands,
        "merge",
        _merge,
        help="merge models or adapters",
        description="Merge models or adapters as a YAML file says; files for mergekit are read too. The same "
        "command goes on with a merge that was interrupted.",
    )
    merge.add_argument("config", metavar="CONFIG.yaml", help="what to merge; examples/merge.yaml is one")
    merge.add_argument("out", metavar="OUT", help="folder to write")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier merge in OUT")
    merge.add_argument("--restart", action="store_true", help="discard an unfinished merge of another plan")
    merge.add_argument("--threads", type=int, metavar="N", help="workers; left out, what the file says")

    _add_recover_command(commands)
    _add_adapter_commands(commands)
    _add_signature_commands(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], **texts: str
) -> argparse.ArgumentParser:
    """Return the parser of a command that `run` carries out; what all commands take is there."""
    parser = commands.add_parser(name, allow_abbrev=False, **texts)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_recover_command(commands: Any) -> None:
    recover = _command(
        commands,
        "recover",
        _recover,
        help="rebuild lost layers of a saved model (CheckFree)",
        description="Write a copy of a saved model in which lost layers are rebuilt from those one stage "
        "before and after, weighted by gradient norms.",
    )
    recover.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the model")
    recover.add_argument("out", metavar="OUT", help="folder to write")
    recover.add_argument("--layers", metavar="A-B,C", help="numbers of the lost layers, such as 3-5")
    recover.add_argument(
        "--stage", type=int, action="append", metavar="I", help="or: a lost stage, from 1 on"
    )
    recover.add_argument("--stages", type=int, metavar="S", help="stages of the model, for --stage")
    recover.add_argument("--stage-size", type=int, metavar="N", help="layers of a stage, for --layers")
    recover.add_argument(
        "--norms",
        metavar="FOLDER",
        help="checkpoint with gradient norms that StageRecoveryCallback recorded, or 'none' for equal "
        "weights; left out, those in CHECKPOINT where there are any",
    )
    recover.add_argument("--norm-power", type=float, default=1.0, metavar="P", help="exponent of norms (1)")
    recover.add_argument("--eps", type=float, default=1e-4, help="added to norms (1e-4)")
    recover.add_argument("--prefix", help="name of the list of layers, such as model.layers")
    recover.add_argument(
        "--swapped",
        action="store_true",
        help="outer stages were swapped in training (swap_prob): copy a lost one from its partner",
    )


def _add_adapter_commands(commands: Any) -> None:
    store = _command(
        commands,
        "store",
        _store,
        help="store LoRA adapters as one shared basis (rmm)",
        description="Store LoRA adapters as a basis that they share and coefficients of each; "
        "`hf-ext restore` makes any of them again.",
    )
    store.add_argument("store", metavar="STORE", help="folder to write")
    store.add_argument("adapters", metavar="[NAME=]ADAPTER", nargs="+", help="folders of the adapters")
    store.add_argument("--basis-size", type=int, default=2, metavar="P", help="vectors of each basis (2)")
    store.add_argument("--budget", type=float, metavar="SHARE", help="share of the adapters' bytes, instead")
    store.add_argument("--granularity", default="position", help="position, tensor or layer (position)")
    store.add_argument("--center", action="store_true", help="store means apart")
    store.add_argument("--align", action="store_true", help="turn factors to come near to the first one's")
    store.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (bfloat16)")
    store.add_argument("--overwrite", action="store_true", help="replace an earlier store")
    store.add_argument("--add", action="store_true", help="add to the store, on the bases that are there")

    restore = _command(commands, "restore", _restore, help="restore an adapter from a store (rmm)")
    restore.add_argument("store", metavar="STORE", help="folder of the store")
    restore.add_argument("name", metavar="NAME", help="name of the adapter")
    restore.add_argument("out", metavar="OUT", help="folder to write")
    restore.add_argument("--base", metavar="MODEL", help="merge it into this model, and write the model")
    restore.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")

    export = _command(
        commands, "export-lora", _export_lora, help="turn a saved adapter into an ordinary LoRA"
    )
    export.add_argument("source", metavar="IN", help="folder of the adapter")
    export.add_argument("out", metavar="OUT", help="folder to write")
    export.add_argument("--rank", type=int, help="rank of the LoRA; left out, the smallest that is exact")


def _add_signature_commands(commands: Any) -> None:
    signature = commands.add_parser(
        "signature", help="patches that make a model robust (robust_weight_signature)"
    )
    actions = signature.add_subparsers(dest="action", metavar="ACTION", required=True)
    extract = _command(actions, "extract", _extract, help="extract a signature from three models")
    extract.add_argument("start", metavar="START", help="model that both others were trained from")
    extract.add_argument("clean", metavar="CLEAN", help="model trained on clean data")
    extract.add_argument("robust", metavar="ROBUST", help="model trained on corrupted data")
    extract.add_argument("out", metavar="OUT", help="folder to write")
    extract.add_argument("--label", help="name of the signature; left out, that of ROBUST")
    extract.add_argument("--keep-num", type=int, default=7, metavar="N", help="shallow layers it covers (7)")
    extract.add_argument("--bits", type=int, default=8, help="bits of a number: 2 to 8, 16 or 32 (8)")
    extract.add_argument("--overwrite", action="store_true", help="replace an earlier signature in OUT")
    apply = _command(actions, "apply", _apply, help="patch a model")
    apply.add_argument("model", metavar="MODEL", help="folder of the model")
    apply.add_argument("out", metavar="OUT", help="folder to write")
    apply.add_argument("signatures", metavar="SIGNATURE", nargs="+", help="folders of signatures")
    apply.add_argument("--alpha", type=float, help="strength of each; left out, 1 over their number")
    apply.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")
    remove = _command(actions, "remove", _remove, help="take signatures off a model, bit for bit")
    remove.add_argument("model", metavar="MODEL", help="folder of the patched model")
    remove.add_argument("out", metavar="OUT", help="folder to write")
    remove.add_argument("--label", action="append", help="a signature to take off; left out, all of them")
    remove.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")


# Commands ---------------------------------------------------------------------------------------------------


def _train(parsed: argparse.Namespace) -> int:
    from .training.recipe import read_recipe

    _quiet(parsed)
    job = read_recipe(parsed.recipe, parsed.rest)
    if parsed.num_processes is not None:
        from .training.launch import relaunch

        debug = ["--debug"] if parsed.debug else []
        return relaunch(job, ["train", parsed.recipe, *debug, *parsed.rest], parsed.num_processes)
    from .training.run import EXPECTED, check_job, run_job

    ready = check_job(job)
    try:
        run_job(ready, say=_say)
    except (*EXPECTED, RuntimeError) as error:
        return _fail(error, parsed.debug, code=1, everywhere=True)
    return 0


def _compare(parsed: argparse.Namespace) -> int:
    from .training.recipe import read_recipe

    _quiet(parsed)
    job = read_recipe(parsed.recipe, parsed.rest)
    chosen = None if parsed.methods is None else [name.strip() for name in parsed.methods.split(",")]
    from .training.compare import check_comparison, run_comparison
    from .training.run import EXPECTED

    comparison = check_comparison(job, chosen)
    try:
        run_comparison(comparison, say=_say)
    except (*EXPECTED, RuntimeError) as error:
        return _fail(error, parsed.debug, code=1)
    return 0


def _quiet(parsed: argparse.Namespace) -> None:
    import warnings

    if not parsed.debug:  # what upstream's next versions will rename is not for the users of a command
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")


def _list(parsed: argparse.Namespace) -> int:
    from .core.checks import check_choice
    from .core.registry import KINDS

    try:  # a generated table, so that this answers without torch
        from ._methods import METHODS
    except ImportError:
        METHODS = ()
    if parsed.kind is not None:
        check_choice("KIND", parsed.kind, KINDS)
    rows = [row for row in METHODS if parsed.kind in (None, row[0])]
    widths = [max((len(str(row[column])) for row in rows), default=0) for column in range(3)]
    for kind, name, summary, paper, *_ in rows:
        _say(f"{kind:<{widths[0]}}  {name:<{widths[1]}}  {summary:<{widths[2]}}  {paper or ''}".rstrip())
    return 0


def _info(parsed: argparse.Namespace) -> int:
    from .training.describe import describe

    _say(describe(parsed.name))
    return 0


def _refine(parsed: argparse.Namespace) -> int:
    from .training.refine import refine_run

    found = refine_run(
        parsed.run_dir,
        norm=parsed.norm,
        tau=parsed.tau,
        drop_zero=not parsed.keep_zero,
        allow_partial=parsed.allow_partial,
    )
    for note in found.notes:
        _say(f"note: {note}")
    _say(found.summary())
    for path in found.files:
        _say(f"wrote {path}")
    return 0


def _predict(parsed: argparse.Namespace) -> int:
    from .training.predict import SCHEDULES, predict_runs

    _quiet(parsed)
    found = predict_runs(
        parsed.run_dirs,
        SCHEDULES if parsed.schedules is None else parsed.schedules,
        steps=parsed.steps,
        learning_rate=parsed.learning_rate,
        warmup_steps=parsed.warmup_steps,
        lam=parsed.lam,
        fit_lambda=parsed.fit_lambda,
        level=parsed.level,
        allow_peak_change=parsed.allow_peak_change,
    )
    for note in found.notes:
        _say(f"note: {note}")
    _say(found.table())
    for path in found.files:
        _say(f"wrote {path}")
    return 0


def _merge(parsed: argparse.Namespace) -> int:
    from .merging._config import read_config
    from .merging._merge import merge

    config = read_config(parsed.config, threads=parsed.threads)
    result = merge(config, parsed.out, overwrite=parsed.overwrite, restart=parsed.restart)
    _say(f"wrote {parsed.out}" + (" (went on with an interrupted merge)" if result.resumed else ""))
    return 0


def _recover(parsed: argparse.Namespace) -> int:
    from .merging.checkfree import layers_of_stages, recorded_norms_or_none, recover_checkpoint

    if (parsed.layers is None) == (parsed.stage is None):
        raise ValueError("--layers or --stage must be given, and not both")
    if parsed.stage is None:
        if parsed.stages is not None:
            raise ValueError("--stages goes with --stage; with --layers give --stage-size")
        layers, size = _numbers(parsed.layers), parsed.stage_size
    else:
        if parsed.stages is None or parsed.stage_size is not None:
            raise ValueError("--stages must be given with --stage, and --stage-size not")
        layers, size = layers_of_stages(parsed.checkpoint, parsed.stage, parsed.stages, parsed.prefix)
    norms, source = recorded_norms_or_none(parsed.checkpoint, parsed.norms)
    _say("equal weights: no recorded norms" if source is None else f"gradient norms of {source}")
    found = recover_checkpoint(
        parsed.checkpoint,
        parsed.out,
        layers,
        norms=norms,
        stage_size=size,
        norm_power=parsed.norm_power,
        eps=parsed.eps,
        prefix=parsed.prefix,
        swapped=parsed.swapped,
    )
    for layer, parts in found.layers.items():
        _say(f"layer {layer}: " + " + ".join(f"{w:.6g} x layer {other}" for other, w in parts.items()))
    _say(f"wrote {parsed.out}")
    return 0


def _numbers(text: str) -> list[int]:
    """Return the numbers of a list such as 3-5,8."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or (part.count("-") and not last):
            raise ValueError(f"--layers must be numbers and ranges such as 3-5,8, got {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found


def _store(parsed: argparse.Namespace) -> int:
    from .merging.rmm import add_adapter, store_adapters

    pairs = [given.rpartition("=")[::2] for given in parsed.adapters]
    named = {name or os.path.basename(os.path.realpath(folder)): folder for name, folder in pairs}
    if len(named) < len(pairs):
        raise ValueError("ADAPTER must be given as NAME=FOLDER where two would be called alike")
    if parsed.add:
        report = [add_adapter(parsed.store, folder, name) for name, folder in named.items()][-1]
    else:
        report = store_adapters(
            named,
            parsed.store,
            basis_size=parsed.basis_size,
            budget=parsed.budget,
            granularity=parsed.granularity,
            center=parsed.center,
            align=parsed.align,
            dtype=parsed.dtype,
            overwrite=parsed.overwrite,
        )
    for name, error in report.errors.items():
        _say(f"{name}: relative error of its updates {error:.4f}")
    share = report.stored_bytes / report.adapter_bytes
    _say(f"wrote {parsed.store}: {report.stored_bytes} bytes, {share:.1%} of the adapters'")
    return 0


def _restore(parsed: argparse.Namespace) -> int:
    from .merging.rmm import restore_adapter

    restore_adapter(parsed.store, parsed.name, parsed.out, base=parsed.base, overwrite=parsed.overwrite)
    _say(f"wrote {parsed.out}")
    return 0


def _extract(parsed: argparse.Namespace) -> int:
    from .merging.robust_weight_signature import extract_signature

    found = extract_signature(
        parsed.start,
        parsed.clean,
        parsed.robust,
        parsed.out,
        label=parsed.label,
        keep_num=parsed.keep_num,
        bits=parsed.bits,
        overwrite=parsed.overwrite,
    )
    _say(f"wrote {parsed.out}: {found.label}, {len(found.tensors)} tensors, {found.nbytes} bytes")
    return 0


def _apply(parsed: argparse.Namespace) -> int:
    from .merging.robust_weight_signature import apply_signatures

    alpha = 1.0 / len(parsed.signatures) if parsed.alpha is None else parsed.alpha
    apply_signatures(
        parsed.model, dict.fromkeys(parsed.signatures, float(alpha)), parsed.out, overwrite=parsed.overwrite
    )
    _say(f"wrote {parsed.out}")
    return 0


def _remove(parsed: argparse.Namespace) -> int:
    from .merging.robust_weight_signature import remove_signatures

    remove_signatures(parsed.model, parsed.out, parsed.label, overwrite=parsed.overwrite)
    _say(f"wrote {parsed.out}")
    return 0


def _export_lora(parsed: argparse.Namespace) -> int:
    from .adapters.export import export_to_lora

    export_to_lora(parsed.source, parsed.out, rank=parsed.rank)
    _say(f"wrote {parsed.out}")
    return 0


# Output -----------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(error: BaseException, debug: bool, *, code: int, everywhere: bool = False) -> int:
    """Print one line for an error, and return the exit code.

    Checks fail on every process alike, so the first one speaks; a failure of the work is one process's own.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or everywhere:
        if debug:
            import traceback

            traceback.print_exception(error)
        process = f" [process {rank}]" if rank else ""
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{_NAME}: error:{process} {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
