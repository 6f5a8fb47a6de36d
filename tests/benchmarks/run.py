"""Measure Torchport beside hand-written PyTorch, accelerate and Lightning Fabric, in one run.

python tests/benchmarks/run.py                      # everything; writes docs/benchmarks.{md,json,png}
python tests/benchmarks/run.py --quick              # fewer rounds; writes runs/benchmarks/
python tests/benchmarks/run.py --only step,launch   # some of it; writes runs/benchmarks/

With --strict, the exit status is 1 if a budget is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import report
from rich.console import Console
from suites import SUITES

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller files")
    parser.add_argument("--only", default=",".join(SUITES), help=f"which of {', '.join(SUITES)}")
    parser.add_argument("--output-dir", type=Path, help="where benchmarks.json and benchmarks.png go")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a budget is missed")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in SUITES]:
        parser.error(f"--only knows {', '.join(SUITES)}; not {', '.join(unknown)}")
    whole = not args.quick and set(chosen) == set(SUITES)
    folder = args.output_dir or (ROOT / "docs" if whole else ROOT / "runs" / "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)

    console = Console()
    load, results = [_load()], []
    for name in chosen:
        started = time.perf_counter()
        with console.status(f"measuring {name} …"):
            results += SUITES[name](args.quick)
        console.print(f"[dim]measured {name} in {time.perf_counter() - started:.0f} s[/]")
    load.append(_load())
    report.show(results, console)
    console.print(f"[dim]load of the machine: {load[0]} before, {load[1]} after[/]")
    (folder / "benchmarks.json").write_text(report.as_json(results, load))
    report.chart(results, folder / "benchmarks.png")
    if (folder / "benchmarks.md").exists():
        report.write_page(folder / "benchmarks.md", report.page(results, load))
    console.print(f"[dim]written to {folder}[/]")
    return int(args.strict and any(result.met is False for result in results))


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
