"""Start-up: what `import hf_ext` adds to `import peft`, and how long `hf-ext --help` takes.

Run: python benchmarks/start_up.py [--runs 7] [--out FILE]

Each figure is a process of its own; the two imports take turns, and the added time is the median of the
paired differences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "import peft": ["-c", "import peft"],
    "import hf_ext, peft": ["-c", "import hf_ext, peft"],
    "import hf_ext": ["-c", "import hf_ext"],
    "python -c pass": ["-c", "pass"],
    "hf-ext --help": ["-m", "hf_ext.cli", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Return the wall time of one Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=120)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print; with --out write the numbers as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(options.runs + 1):
        for name, arguments in COMMANDS.items():
            elapsed = seconds(arguments)
            if turn:  # the first turn fills the file cache
                taken[name].append(elapsed)
    pairs = zip(taken["import hf_ext, peft"], taken["import peft"], strict=True)
    result = {name: statistics.median(values) for name, values in taken.items()}
    result["hf_ext adds to peft"] = statistics.median(both - alone for both, alone in pairs)
    for name, value in result.items():
        print(f"{name:24s} {value * 1e3:8.0f} ms")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
