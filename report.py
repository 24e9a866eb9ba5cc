"""Pictures a person looks at: grids of images side by side, labelled."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils import replacing

INK, PAPER, GAP = (30, 30, 34), (255, 255, 255), 4


def sheet(rows: list[tuple[str, list[Path | Image.Image]]], path: Path, cell: int = 96, title: str = ""):
    """Write a PNG of labelled rows of pictures, each `cell` pixels high and wide."""
    font = ImageFont.load_default(15)
    margin = 16 + max(int(font.getlength(label)) for label, _ in rows)
    columns = max(len(images) for _, images in rows)
    top = 34 if title else GAP
    canvas = Image.new("RGB", (margin + columns * (cell + GAP), top + len(rows) * (cell + GAP)), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((8, 8), title, INK, font)
    for i, (label, images) in enumerate(rows):
        y = top + i * (cell + GAP)
        pen.text((8, y + cell / 2), label, INK, font, anchor="lm")
        for j, image in enumerate(images):
            picture = image if isinstance(image, Image.Image) else Image.open(image)
            canvas.paste(picture.convert("RGB").resize((cell, cell), Image.LANCZOS), (margin + j * (cell + GAP), y))
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")


def side_by_side(folder: Path, title: str, real: list[Path], columns: int = 10):
    """Write folder/grid.png: the first seeds without the token, the same with it, and real pictures where given."""
    def first(where):
        return sorted(where.glob("*.png"), key=lambda path: int(path.stem))[:columns]

    rows = [("without", first(folder / "without")), ("with token", first(folder / "with"))]
    sheet(rows + [("real", real[:columns])] * bool(real), folder / "grid.png", title=title)
