"""Tables on the terminal. Piped output is never cut or wrapped, so that reasons can be searched for whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 100_000


def make_console() -> Console:
    """Return a console on standard output: as wide as the terminal, or as the text where it is piped."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=_PIPE_WIDTH)
    return console


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    style: str = "bold",
) -> None:
    """Print a table of plain texts; nothing at all if there are no rows.

    Args:
        console: Where to print.
        title: Heading above the table.
        columns: Headings of the columns; the last takes what width is left.
        rows: One text for each column.
        style: Style of the title.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    if not rows:
        return
    table = Table(title=Text(title, style), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0 and console.is_terminal)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
