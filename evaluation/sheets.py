"""Pictures for people to look at: labelled sheets, animations, and images inlined into a page."""

import base64
import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from evaluation.read_image import read_image
from system.tensor_files import save_image

INK, PAPER, GAP = (30, 30, 34), (255, 255, 255), 4
LEFT = 8  # pixels of margin
TITLE_HEIGHT = 34
FRAME_MS, LAST_MS = 400, 2000  # of an animation
SMALL = 128  # pixels up to which an image is inlined without loss


def draw_sheet(
    rows: list[tuple[str, list[Path | Image.Image]]], path: Path, cell: int = 96, title: str = ""
):
    """Write a PNG of labelled rows of pictures, `cell` pixels high and wide."""
    font = ImageFont.load_default(15)
    longest_label = max(int(font.getlength(label)) for label, _ in rows)
    margin = 2 * LEFT + longest_label
    columns = max(len(images) for _, images in rows)
    top = TITLE_HEIGHT if title else GAP
    size = (margin + columns * (cell + GAP), top + len(rows) * (cell + GAP))
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((LEFT, 8), title, INK, font)
    for i, (label, images) in enumerate(rows):
        y = top + i * (cell + GAP)
        pen.text((LEFT, y + cell / 2), label, INK, font, anchor="lm")
        for j, image in enumerate(images):
            x = margin + j * (cell + GAP)
            picture = image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
            canvas.paste(ImageOps.fit(picture, (cell, cell), Image.LANCZOS), (x, y))
    save_image(canvas, path)


def shrink_image(path: Path, side: int) -> Image.Image:
    """Reduce an image file to at most `side` pixels in height and width."""
    image = read_image(path, 2 * side)
    image.thumbnail((side, side), Image.LANCZOS)
    return image


def caption_image(path: Path, text: str) -> Image.Image:
    """Add a line of text below an image."""
    canvas = Image.new("RGB", (192, 214), PAPER)
    canvas.paste(read_image(path).resize((192, 192), Image.LANCZOS))
    pen = ImageDraw.Draw(canvas)
    pen.text((96, 203), text, INK, ImageFont.load_default(14), anchor="mm")
    return canvas


def save_animation(frames: list[Image.Image], target):
    """Write a GIF, its last frame held, to a path or an open file."""
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    first, *others = frames
    first.save(
        target, format="GIF", save_all=True, append_images=others, loop=0, duration=durations
    )


def inline_image(path: Path, side: int) -> str:
    """Encode an image as a data: address, at most `side` pixels per side; small ones losslessly."""
    image = shrink_image(path, side)
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    data = io.BytesIO()
    image.save(data, format=kind, quality=88)
    return encode_address(kind, data)


def encode_address(kind: str, data: io.BytesIO) -> str:
    """Return the data: address of an encoded image."""
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
