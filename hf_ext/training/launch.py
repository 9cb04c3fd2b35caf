"""Starting the same command in several processes, through Accelerate's launcher."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from ..core.checks import check
from .recipe import EXPECTED_PROCESSES, Job


def relaunch(job: Job, arguments: Sequence[str], num_processes: int) -> int:
    """Run `hf-ext ARGUMENTS` in several processes of this machine, and return the exit code.

    Args:
        job: The recipe, for its `use_cpu`.
        arguments: Arguments of the command, without `--num_processes`.
        num_processes: How many, at least 1.

    Raises:
        ValueError: The number is below 1.
    """
    check(num_processes >= 1, "--num_processes", num_processes, "at least 1")
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .._compat.accelerate import launch_command, launch_command_parser

    on_cpu = bool(job.settings.get("use_cpu")) or not torch.cuda.is_available()
    # `--cpu` would start one process only; `--multi_gpu` with this variable starts gloo processes.
    os.environ.update(
        {EXPECTED_PROCESSES: str(num_processes), **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})}
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    options = ["--num_processes", str(num_processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the recipe decides both
    options += ["--multi_gpu"] if num_processes > 1 else ["--cpu"] if on_cpu else []
    # Each process prints its own error; the agent's report of it would bury the line.
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    parsed = launch_command_parser().parse_args([*options, "-m", "hf_ext.cli", *arguments])
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SystemExit as stop:  # how the launcher reports a single process that failed
        return int(stop.code or 0)
    return 0
