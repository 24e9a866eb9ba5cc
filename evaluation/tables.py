"""A table, as text and as Markdown; report.html shows it as HTML."""

from typing import NamedTuple


class Table(NamedTuple):
    """Cells of any kind, shown by `str`; the note stands below."""

    header: list
    rows: list[list]
    title: str = ""
    note: str = ""

    def to_text(self) -> str:
        """Aligned columns, then the note."""
        lines = [[str(cell) for cell in line] for line in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                         for line in lines)
        return f"{text}\n{self.note}" if self.note else text

    def to_markdown(self) -> str:
        return "\n".join(f"| {' | '.join(map(str, line))} |"
                         for line in (self.header, ["---"] * len(self.header), *self.rows))
