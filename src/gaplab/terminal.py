"""Tables for terminals of any width."""

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text


class Table(RichTable):
    """A table of rich's that, where its numbers would be cut off, lists each row as lines of `heading  value`."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if sum(_width(column) + 2 for column in self.columns) + 2 <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text.from_markup(str(self.title), style="bold")
        headings = [_text(column.header).plain for column in self.columns]
        for row in zip(*(column.cells for column in self.columns), strict=True):
            first, *others = map(_text, row)
            yield Text.assemble(f"{headings[0]} " if headings[0] else "", first)
            for heading, value in zip(headings[1:], others, strict=True):
                if value.plain:
                    yield Text.assemble(f"  {heading}  " if heading else "  ", value)


def _text(cell: object) -> Text:
    return Text.from_markup(str(cell))


def _width(column: Column) -> int:
    """Characters that a column needs at least: its longest cell, or word where it may be wrapped."""
    texts = [_text(cell).plain for cell in (column.header, *column.cells)]
    return max(cell_len(part) for text in texts for part in ([text] if column.no_wrap else text.split() or [""]))
