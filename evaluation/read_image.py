"""Any picture that Pillow opens, as upright 8-bit sRGB on white.

The one place where pictures are decoded.
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from torchvision.transforms.v2.functional import center_crop, resize

from system.paths import stamp_file
from system.text_files import read_json
from utils import UserError, broken_file_error, join_lines, to_printable, write_json

EXTENSIONS = Image.registered_extensions()  # loads Pillow's plugins, which fill Image.OPEN
FORMATS = [kind for kind in Image.OPEN if kind != "EPS"]  # PostScript is a program, and would run
OPENED = {*FORMATS, "MPO"}  # MPO opens as JPEG
SUFFIXES = {suffix for suffix, kind in EXTENSIONS.items() if kind in OPENED}
SRGB = ImageCms.createProfile("sRGB")
# What the colour profile of a mode speaks of; else RGB.
PROFILED = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}
# Of 12 bits: a picture of 32 bits that reaches no higher may be of 8 or 12 in truth.
DARKEST_WHITE = 4095
WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation


def read_image(path: Path, side: int | None = None) -> Image.Image:
    """A picture file, its first frame, as upright 8-bit sRGB (mode RGB) on white.

    Grey of 16 bits is black at 0 and white at 65535, floating point at 0 and 1. A colour profile
    that fits the pixels is converted; one that does not is ignored, as browsers do. With `side` a
    JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its sides stay that long: fast, but not the
    very pixels.

    Raises:
        UserError: not a picture, truncated, more pixels than Pillow takes (179 million), or values
            out of range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata
            with Image.open(path, formats=FORMATS) as image:
                if side:
                    image.draft(None, (side, side))
                return convert_image(image)
    except Exception as error:  # Pillow's plugins raise a dozen kinds
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
        raise broken_file_error(path, error) from error


def convert_image(image: Image.Image) -> Image.Image:
    """Convert an opened picture as `read_image` does."""
    image.load()
    with suppress(SyntaxError):  # EXIF that is none
        ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        image = scale_to_bytes(image)
    elif image.has_transparency_data:
        is_grey = PROFILED.get(image.mode) == "L"
        image = image.convert("LA" if is_grey else "RGBA")
        alpha = image.getchannel("A")
    image = convert_profile(image, profile) if profile else image.convert("RGB")
    if alpha:
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image, mask=alpha)
        image = on_white
    image.info = {}  # or a copy would be saved with the profile that it no longer has
    return image


def scale_to_bytes(image: Image.Image) -> Image.Image:
    """Scale grey of 9 to 16 bits or floating point to 8 bits (mode L).

    A PNG's transparent value becomes white.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    white = 1 if image.mode == "F" else 2 ** min(bits, 16) - 1
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "I" and 0 < high <= DARKEST_WHITE:
        raise ValueError(f"its 32-bit integers reach {high}, and nothing says which value is white")
    if not (low >= 0 and high <= white):
        raise ValueError(f"its values range from {low:g} to {high:g}, not from 0 to {white}")
    pixels = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
        pixels = 255 - pixels
    if "transparency" in image.info:
        pixels[values == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def convert_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert `image` without its alpha from its embedded ICC `profile` to sRGB."""
    plain = image.convert(PROFILED.get(image.mode, "RGB"))
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if plain.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            plain = plain.convert("RGB")
        return ImageCms.profileToProfile(plain, source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # no profile, or one of other pixels
        return plain.convert("RGB")


def check_images(files: list[Path], record: Path) -> dict[Path, str]:
    """Return {file: why it cannot be read}; the file `record` remembers the readable ones."""
    known = read_json(record) if record.exists() else {}
    readable: dict[str, list] = {}
    faults: dict[Path, str] = {}
    for file in files:
        name, *stamp = stamp_file(file)
        fault = None if known.get(name) == stamp else find_fault(file)
        if fault:
            faults[file] = fault
        else:
            readable[name] = stamp
    if readable != known:
        write_json(record, readable)
    return faults


def find_fault(file: Path) -> str | None:
    """Return why a picture cannot be read."""
    try:
        read_image(file, side=1)
    except UserError as error:
        return to_printable(join_lines(error.__cause__))
    return None


def load_images(paths: list[Path]) -> torch.Tensor:
    """Load image files of one size as float [B, 3, H, W] in [0, 1].

    Raises:
        UserError: a broken file, or one of another size than the first.
    """
    arrays = [np.asarray(read_image(path)) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise broken_file_error(path, f"another size than {paths[0]}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def load_squares(files: list[Path], height: int, width: int) -> torch.Tensor:
    """Load image files of any size as float [B, 3, height, width] in [0, 1].

    They are resized by the short side and cropped in the middle.
    """
    cropped = []
    for file in files:
        resized = resize(load_images([file]), max(height, width), antialias=True)
        cropped.append(center_crop(resized, [height, width]))
    return torch.cat(cropped)
