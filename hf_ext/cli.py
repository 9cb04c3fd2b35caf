"""`hf-ext`: train a recipe, compare methods on it, list and explain methods, export adapters.

Only the standard library is imported here; each command imports what it needs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

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
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        parents=[common],
        allow_abbrev=False,
        help="train a recipe",
        description="Train a recipe: check it, train, evaluate, save, export, merge, reload.",
        epilog="Every key of a recipe can be given as --key value; --adapter.r 8 sets one of the adapter.",
    )
    train.add_argument("recipe", help="YAML file; examples/quickstart.yaml needs no network")
    train.add_argument("--num_processes", "--num-processes", type=int, metavar="N", help="run in N processes")
    train.set_defaults(run=_train)

    compare = commands.add_parser(
        "compare",
        parents=[common],
        allow_abbrev=False,
        help="compare methods on a recipe",
        description="Train methods times seeds on a recipe's data, each at a tuned learning rate.",
        epilog="Every key of a recipe can be given as --key value; --compare.seeds 5 sets one of the "
        "comparison. The same command continues a comparison that was interrupted.",
    )
    compare.add_argument("recipe", help="YAML file; examples/compare.yaml needs no network")
    compare.add_argument("--methods", metavar="A,B", help="methods to compare, the baseline first")
    compare.set_defaults(run=_compare)

    listing = commands.add_parser("list", parents=[common], help="list the methods")
    listing.add_argument("kind", nargs="?", help="adapter, callback, trainer, optimizer or merge")
    listing.set_defaults(run=_list)

    info = commands.add_parser("info", parents=[common], help="explain a method and its settings")
    info.add_argument("name")
    info.set_defaults(run=_info)

    schedule = commands.add_parser("schedule", help="learning-rate schedules from finished runs")
    schedules = schedule.add_subparsers(dest="action", metavar="ACTION", required=True)
    refine = schedules.add_parser(
        "refine",
        parents=[common],
        allow_abbrev=False,
        help="make the refined schedule of a recorded run",
        description="Write refined_schedule.json and .png into the folder of a run that recorded gradient "
        "norms (RefinedLinearDecayCallback).",
    )
    refine.add_argument("run_dir", metavar="RUN_DIR", help="output folder of the run")
    refine.add_argument("--norm", default="auto", help="l1, l2, or auto for what suits the optimizer")
    refine.add_argument("--tau", type=float, default=0.1, help="median window as a share of the run (0.1)")
    refine.add_argument("--keep-zero", action="store_true", help="end with a rate of 0, as in the paper")
    refine.set_defaults(run=_refine)

    export = commands.add_parser(
        "export-lora", parents=[common], help="turn a saved adapter into an ordinary LoRA"
    )
    export.add_argument("source", metavar="IN", help="folder of the adapter")
    export.add_argument("out", metavar="OUT", help="folder to write")
    export.add_argument("--rank", type=int, help="rank of the LoRA; left out, the smallest that is exact")
    export.set_defaults(run=_export_lora)
    return parser


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

    try:  # a generated table, so that this answers without torch
        from ._methods import METHODS
    except ImportError:
        METHODS = ()
    kinds = ("adapter", "callback", "trainer", "optimizer", "merge")
    if parsed.kind is not None:
        check_choice("KIND", parsed.kind, kinds)
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

    written = refine_run(parsed.run_dir, norm=parsed.norm, tau=parsed.tau, drop_zero=not parsed.keep_zero)
    for path in written:
        _say(f"wrote {path}")
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
