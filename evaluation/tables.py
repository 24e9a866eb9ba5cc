"""A table, as text and as Markdown; report.html shows it as HTML."""

from typing import NamedTuple


class Table(NamedTuple):
    """Cells of any type, shown by `str`; the note stands below the table."""

    header: list
    rows: list[list]
    title: str = ""
    note: str = ""

    def to_text(self) -> str:
        """Format as aligned columns, followed by the note."""
        cells = [list(map(str, row)) for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Format as Markdown, without the note."""
        rule = ["---"] * len(self.header)
        lines = []
        for row in (self.header, rule, *self.rows):
            lines.append(f"| {' | '.join(map(str, row))} |")
        return "\n".join(lines)
