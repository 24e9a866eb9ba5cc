"""Pictures of every kind come out as upright 8-bit sRGB on white, or are refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from evaluation.read_image import SUFFIXES, read_image
from system.tensor_files import save_image
from utils import UserError

RAMP = np.array([[0, 64, 128], [191, 255, 32]], dtype=np.uint8)  # [2, 3]: which way is up shows
GREY, GREY_16 = Image.fromarray(RAMP), Image.fromarray(RAMP.astype(np.uint16) * 257)
COLOUR = Image.merge("RGB", [GREY, Image.fromarray(255 - RAMP), Image.new("L", (3, 2), 90)])
HIDDEN = COLOUR.copy()  # the colour below a transparent left column
HIDDEN.putalpha(Image.fromarray(np.array([[0, 255, 255]] * 2, dtype=np.uint8)))
ON_WHITE = COLOUR.copy()
ON_WHITE.paste("white", (0, 0, 1, 2))
GREY_ON_WHITE = GREY.copy()
GREY_ON_WHITE.paste(255, (0, 0, 1, 2))
PALETTE = Image.new("P", (3, 2), 1)
PALETTE.putpalette([200, 0, 0, 0, 100, 50])
PALETTE.putpixel((0, 0), 0)
PALETTE_ON_WHITE = Image.new("RGB", (3, 2), (0, 100, 50))
PALETTE_ON_WHITE.putpixel((0, 0), (255, 255, 255))
BITS = Image.fromarray(RAMP > 100)


def float_picture(scale: float) -> Image.Image:
    return Image.fromarray(RAMP.astype(np.float32) / 255 * scale)


def swap_red_and_green() -> bytes:
    """An ICC profile whose red is sRGB's green, and the reverse."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", data[128:132])[0]):
        start = 132 + 12 * i
        name = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(data[start : start + 4]))
        data[start : start + 4] = name or data[start : start + 4]
    return bytes(data)


def list_pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


SWAPPED = Image.merge("RGB", [COLOUR.getchannel(band) for band in "GRB"])
READ = {  # name: picture, file's suffix, options of save, what is expected
    "RGB": (COLOUR, "png", {}, COLOUR),
    "grey": (GREY, "png", {}, GREY),
    "1 bit": (BITS, "png", {}, BITS),
    "1 bit TIFF": (BITS, "tiff", {}, BITS),
    "16-bit PNG": (GREY_16, "png", {}, GREY),
    "16-bit TIFF": (GREY_16, "tiff", {}, GREY),
    "16-bit TIFF, white is 0": (
        GREY_16,
        "tiff",
        {"tiffinfo": {262: 0}},
        Image.fromarray(255 - RAMP),
    ),
    "16-bit PGM": (GREY_16, "pgm", {}, GREY),
    "16-bit transparent": (GREY_16, "png", {"transparency": 255 * 257}, GREY),
    "32-bit integers": (Image.fromarray(RAMP.astype(np.int32) * 257), "tiff", {}, GREY),
    "float TIFF": (float_picture(1), "tiff", {}, GREY),
    "RGBA": (HIDDEN, "png", {}, ON_WHITE),
    "RGBA WebP": (HIDDEN, "webp", {"lossless": True}, ON_WHITE),
    "RGBA TIFF": (HIDDEN, "tiff", {}, ON_WHITE),
    "LA": (Image.merge("LA", [GREY, HIDDEN.getchannel("A")]), "png", {}, GREY_ON_WHITE),
    "palette": (PALETTE, "png", {}, PALETTE.convert("RGB")),
    "palette, transparent": (PALETTE, "png", {"transparency": 0}, PALETTE_ON_WHITE),
    "GIF, transparent": (PALETTE, "gif", {"transparency": 0}, PALETTE_ON_WHITE),
    "GIF, animated": (
        COLOUR.quantize(),
        "gif",
        {"save_all": True, "append_images": [Image.new("P", (3, 2))]},
        COLOUR,
    ),
    "RGB, a transparent colour": (COLOUR, "png", {"transparency": (0, 255, 90)}, None),
    "CMYK": (
        Image.new("CMYK", (3, 2), (0, 255, 255, 0)),
        "tiff",
        {},
        Image.new("RGB", (3, 2), "red"),
    ),
    "LAB": (
        Image.new("LAB", (3, 2), (255, 128, 128)),
        "tiff",
        {},
        Image.new("RGB", (3, 2), "white"),
    ),
    "profile": (COLOUR, "png", {"icc_profile": swap_red_and_green()}, SWAPPED),
    "profile, transparent": (HIDDEN, "png", {"icc_profile": swap_red_and_green()}, None),
    "profile of colours, grey": (GREY, "png", {"icc_profile": swap_red_and_green()}, GREY),
    "profile that is none": (COLOUR, "png", {"icc_profile": b"no profile"}, COLOUR),
    "profile of other pixels": (
        Image.new("CMYK", (3, 2)),
        "tiff",
        {"icc_profile": swap_red_and_green()},
        Image.new("RGB", (3, 2), "white"),
    ),
    "EXIF that is none": (COLOUR, "png", {"exif": b"garbage"}, COLOUR),
    "AVIF": (Image.new("RGB", (3, 2), "white"), "avif", {}, Image.new("RGB", (3, 2), "white")),
    **{
        f"turned PNG {i}": (COLOUR, "png", {"exif": turned(i)}, COLOUR.transpose(way))
        for i, way in (
            (2, Image.Transpose.FLIP_LEFT_RIGHT),
            (3, Image.Transpose.ROTATE_180),
            (4, Image.Transpose.FLIP_TOP_BOTTOM),
            (5, Image.Transpose.TRANSPOSE),
            (6, Image.Transpose.ROTATE_270),
            (7, Image.Transpose.TRANSVERSE),
            (8, Image.Transpose.ROTATE_90),
        )
    },
    "turned 16-bit PNG": (
        GREY_16,
        "png",
        {"exif": turned(6)},
        GREY.transpose(Image.Transpose.ROTATE_270),
    ),
    "turned TIFF": (
        COLOUR,
        "tiff",
        {"exif": turned(6)},
        COLOUR.transpose(Image.Transpose.ROTATE_270),
    ),
    "turned nowhere": (COLOUR, "png", {"exif": turned(77)}, COLOUR),
}
EXPECTED = {
    "RGB, a transparent colour": [(255, 255, 255), *list_pixels(COLOUR)[1:]],
    "profile, transparent": [
        (255, 255, 255) if i % 3 == 0 else pixel for i, pixel in enumerate(list_pixels(SWAPPED))
    ],
}


@pytest.mark.parametrize("name", READ)
def test_pictures_come_out_upright_in_srgb_on_white(tmp_path, name):
    picture, suffix, options, expected = READ[name]
    file = tmp_path / f"picture.{suffix}"
    picture.save(file, **options)
    found = read_image(file)
    assert found.mode == "RGB" and (expected is None or found.size == expected.size)
    pixels = EXPECTED.get(name) or list_pixels(expected.convert("RGB"))
    assert np.abs(np.array(list_pixels(found)) - np.array(pixels)).max() <= 2
    save_image(found, tmp_path / "copy.png")  # which must not be turned or converted once more
    assert list_pixels(read_image(tmp_path / "copy.png")) == list_pixels(found)


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG file that says it is so large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 1000)
        + b"IDAT"
        + zlib.compress(bytes(100))
    )


def to_bytes(picture: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


REFUSED = {  # name: the file's suffix, its bytes, the reason
    "float above 1": (
        "tiff",
        to_bytes(float_picture(255), "TIFF"),
        "from 0 to 255, not from 0 to 1",
    ),
    "float below 0": ("tiff", to_bytes(float_picture(-1), "TIFF"), "from -1 to"),
    "not a number": ("tiff", to_bytes(float_picture(float("nan")), "TIFF"), "nan"),
    "integers above 16 bits": (
        "tiff",
        to_bytes(Image.fromarray(np.full((2, 3), 70000, np.int32)), "TIFF"),
        "from 70000 to 70000, not from 0 to 65535",
    ),
    "truncated": ("png", to_bytes(Image.effect_noise((64, 64), 50), "PNG")[:2000], "truncated"),
    "truncated JPEG": (
        "jpg",
        to_bytes(Image.effect_noise((640, 640), 50), "JPEG")[:20000],
        "truncated",
    ),
    "huge, truncated": ("png", png_of(9000, 9000), "truncated"),
    "bomb": ("png", png_of(60000, 60000), "decompression bomb"),
    "empty": ("jpg", b"", "cannot identify"),
    "text": ("jpg", b"<html>not found</html>", "cannot identify"),
    "PostScript, a program": ("eps", to_bytes(COLOUR, "EPS"), "cannot identify"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_brought_there_is_refused(tmp_path, name):
    suffix, data, reason = REFUSED[name]
    (tmp_path / f"picture.{suffix}").write_bytes(data)
    with pytest.raises(UserError, match=r"picture\.\w+") as error:
        read_image(tmp_path / f"picture.{suffix}")
    assert reason in str(error.value)


def test_what_pillow_reads_is_looked_for():
    assert {
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".gif",
        ".avif",
        ".webp",
        ".tif",
        ".mpo",
        ".jp2",
        ".ppm",
    } <= SUFFIXES
    assert not {".pdf", ".eps", ".txt"} & SUFFIXES


def test_a_jpeg_may_be_decoded_at_a_fraction(tmp_path):
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.jpg", exif=turned(6))
    assert read_image(tmp_path / "a.jpg").size == (200, 400)
    assert read_image(tmp_path / "a.jpg", side=90).size == (100, 200)


def test_grey_of_12_bits(tmp_path):
    """Packed by hand, a row of three values in five bytes: Pillow reads such a TIFF and does not
    write one.
    """
    rows = b"".join(
        (int("".join(f"{value << 4 | value >> 4:012b}" for value in row) + "0000", 2)).to_bytes(
            5, "big"
        )
        for row in RAMP.tolist()
    )
    tags = [
        (256, 3),
        (257, 2),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 2),
        (279, len(rows)),
    ]
    directory = (
        struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
        + bytes(4)
    )
    (tmp_path / "12.tiff").write_bytes(
        struct.pack("<2sHI", b"II", 42, 8 + len(rows)) + rows + directory
    )
    assert np.array_equal(np.asarray(read_image(tmp_path / "12.tiff").convert("L")), RAMP)


def test_whole_numbers_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "32.tiff")
    with pytest.raises(UserError, match="32-bit integers reach 255"):
        read_image(tmp_path / "32.tiff")
