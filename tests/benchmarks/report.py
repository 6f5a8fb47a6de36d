"""Show results: a table on the terminal, JSON, a page and a bar chart."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sampling import Result

PACKAGES = ("torchport-core", "torch", "accelerate", "lightning-fabric")
PLACE = re.compile(r"(<!-- measured: .*?-->\n).*?(<!-- end of what was measured -->)", re.DOTALL)


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def show(results: Sequence[Result], console: Console) -> None:
    """Print a table."""
    table = Table(title="Torchport beside hand-written PyTorch and its neighbours")
    for column, justify in (
        ("", "left"), ("median", "right"), ("ratio", "right"), ("quartiles", "right"), ("budget", "left"),
    ):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for result in results:
        table.add_section()
        rounds = len(next(iter(result.taken.values())))
        table.add_row(
            f"[bold]{result.title}[/] ({rounds} rounds, ratio to {result.baseline})", "", "", "", ""
        )
        for name in result.taken:
            ratio = result.ratio(name)
            own = name == "torchport"
            quartiles = "" if name == result.baseline else f"{ratio.low:.3g} to {ratio.high:.3g}"
            table.add_row(
                f"  {'[cyan]' if own else ''}{name}", _amount(result, name), f"{ratio.median:.3g}", quartiles,
                _verdict(result) if own else "",
            )  # fmt: skip
    console.print(table)
    for result in results:
        for note in result.notes:
            console.print(f"[dim]{result.name}: {note}[/]")


def _amount(result: Result, name: str) -> str:
    value = result.shown(name)
    digits = 3 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {result.unit}"


def _verdict(result: Result) -> str:
    if result.budget is None:
        return ""
    value = result.budget.value(result.taken)
    low, high = result.budget.interval(result.taken)
    verdict = "met" if result.met else "MISSED"
    return f"{result.budget.describe()}: {verdict} ({value:.3f}; {low:.3f} to {high:.3f})"


def as_json(results: Sequence[Result], load: Sequence[str]) -> str:
    """Return machine, load and results."""
    entry = {"machine": machine(), "load": list(load), "results": [result.as_json() for result in results]}
    return json.dumps(entry, indent=1, ensure_ascii=False) + "\n"


def page(results: Sequence[Result], load: Sequence[str]) -> str:
    """Return the generated part of the page, in Markdown."""
    facts = machine()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"Measured on {facts['cores']} cores ({facts['processor']}), {facts['memory_gib']} GiB,"
        f" Python {facts['python']}; {versions}.",
        f"Load of the machine (1-minute average of waiting and running processes): {load[0]} before, {load[1]} after"
        " the run.",
        "",
        "![Bar chart of the results](benchmarks.png)",
        "",
    ]
    for result in results:
        rounds = len(next(iter(result.taken.values())))
        lines += [
            f"### {result.title}",
            "",
            f"| | median | ratio to {result.baseline} | quartiles |",
            "|---|---:|---:|---:|",
        ]
        for name in result.taken:
            ratio = result.ratio(name)
            quartiles = "" if name == result.baseline else f"{ratio.low:.3g} to {ratio.high:.3g}"
            shown = f"**{name}**" if name == "torchport" else name
            lines.append(f"| {shown} | {_amount(result, name)} | {ratio.median:.3g} | {quartiles} |")
        lines.append("")
        if result.budget is not None:
            lines += [f"Budget: {_verdict(result)}. {rounds} rounds.", ""]
        lines += [" ".join(result.notes), ""] if result.notes else []
    return "\n".join(lines)


def write_page(path: Path, text: str) -> None:
    """Replace the generated part of a page.

    Raises:
        ValueError: if the page has no place for it.
    """
    old = path.read_text()
    if not PLACE.search(old):
        raise ValueError(f"{path} has no `<!-- measured: … -->` and `<!-- end of what was measured -->`")
    path.write_text(PLACE.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", old))


COLOURS = {
    "torchport": "#0b7285",
    "accelerate": "#f59f00",
    "fabric": "#9c36b5",
    "lightning_fabric": "#9c36b5",
}


def chart(results: Sequence[Result], path: Path) -> None:
    """Draw ratios on the left and seconds on the right, with Torchport's budgets as red lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    ratios = [r for r in results if r.unit != "s" and not r.name.endswith("-processor")]
    seconds = [r for r in results if r.unit == "s"]
    figure, sides = pyplot.subplots(1, 2, figsize=(12, 6.5), layout="constrained")
    _bars(sides[0], ratios, lambda result, name: result.ratio(name).median)
    sides[0].set_xlabel("time as a ratio to the baseline (shorter is better)")
    sides[0].axvline(1.0, color="#868e96", linewidth=0.8, linestyle=":")
    _bars(sides[1], seconds, lambda result, name: result.shown(name))
    sides[1].set_xscale("log")
    sides[1].set_xlabel("seconds, logarithmic (shorter is better)")
    figure.suptitle(
        "Torchport beside hand-written PyTorch, accelerate and Lightning Fabric; red: Torchport's budget"
    )
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _bars(axes: Any, results: Sequence[Result], value: Any) -> None:
    place, ticks, labels = 0.0, [], []
    for result in results:
        axes.text(0.0, place - 0.7, result.title.replace("`", ""), fontsize=8, fontweight="bold",
                  transform=axes.get_yaxis_transform(), va="center")  # fmt: skip
        for name in result.taken:
            length = value(result, name)
            axes.barh(place, length, height=0.8, color=COLOURS.get(name, "#adb5bd"))
            axes.text(length, place, f" {length:.3g}", va="center", fontsize=7)
            if name == "torchport" and result.budget is not None:
                axes.plot([_limit(result)] * 2, [place - 0.5, place + 0.5], color="#e03131", linewidth=2)
            ticks.append(place)
            labels.append(name)
            place += 1
        place += 1.2
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(place - 0.6, -1.4)
    axes.margins(x=0.15)


def _limit(result: Result) -> float:
    """Where the budget lies on the axis of the result: in seconds, or as a ratio to the result's baseline."""
    budget = result.budget
    assert budget is not None
    if budget.kind == "difference":
        return result.shown(budget.against) + budget.limit
    if budget.kind == "ratio" and result.unit == "s":
        return result.shown(budget.against) * budget.limit
    return budget.limit
