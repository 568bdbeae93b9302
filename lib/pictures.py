"""Opening picture files of unknown origin: check the size first, then decode, turn upright, convert to RGB."""
import base64
import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from lib.common import visible_name

MAX_PIXELS = 89_478_485             # Pillow's own limit, but checked before decoding: 268 MB as RGB
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")             # JPEG includes the MPO files of phones
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}                      # EXIF orientation -> what makes the picture upright
warnings.filterwarnings("ignore", module="PIL")             # about odd EXIF data and the like in images that open fine
# Pillow refuses a PNG with a text or color profile of more than 1 MB, whose pixels may be fine. This is its limit for
# all texts of a file together, which still stops a bomb.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def open_rgb(source: str | Path | BinaryIO | Image.Image, size: int, mode: str, decode: bool = True) -> Image.Image:
    """Open as upright RGB. Alpha is dropped and only the first frame of an animation is read, as in LLaVA.

    Image files are untrusted: their dimensions are checked before anything is decoded. decode=False stops there.
    """
    problem = detail = ""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        w, h = image.size
        # The largest picture on the way. A strip of a million pixels by one is a small file, but padded to a square,
        # or with its shortest edge resized to `size`, it would exhaust any memory.
        pixels = w * h
        if mode == "pad":
            pixels = max(w, h) ** 2
        elif mode == "crop":
            pixels = max(pixels, (size * w // min(w, h)) * (size * h // min(w, h)))
        if pixels > MAX_PIXELS:
            problem = "too large"
            detail = (f" is {w} x {h} and takes {pixels:,} pixels on the way to {size} x {size} (mode {mode}), more "
                      f"than {MAX_PIXELS:,}")
        elif decode:
            image.load()
            image = upright(image)
            if image.mode[0] in "IF":
                image = to_8_bits(image)
            image = image.convert("RGB")
    except FileNotFoundError:
        problem = "missing"
        if "://" in str(source):
            problem, detail = "is an address", "; download it and give the file"
    except UnidentifiedImageError:
        problem, detail = "unreadable", f": not a {', '.join(FORMATS)} file, or cut short"
    except Exception as e:          # Pillow's decoders raise a dozen kinds of exception on bad bytes
        problem, detail = "unreadable", f": {e}"
    if problem:
        name = str(source) if isinstance(source, (str, Path)) else getattr(source, "name", "the given picture")
        raise ValueError(f"image {problem}: {visible_name(name)}{detail}")
    return image


def upright(image: Image.Image) -> Image.Image:
    """Turn a photo as its EXIF data says. Phones store most photos on their side; annotators saw them upright.

    Only the orientation is read. ImageOps.exif_transpose also writes the other tags anew, and fails on odd ones.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:               # broken EXIF data in a good image
        return image
    return image if turn is None else image.transpose(turn)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a 16-bit or floating-point picture to 0..255. Pillow would clip it there, which makes most of it white.

    Pillow's other deep modes do not say what their white is. It is 1 (if floating-point), 255 or 65,535, whichever is
    the first that no value exceeds, else the largest value.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    largest = float(values.max())
    whites = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))         # else 16 bits
    white = next((white for white in whites if largest <= white), largest)
    return Image.fromarray(np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8))


def png_address(image: Image.Image) -> str:
    """A data: address of a picture, for pages that need no other file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
