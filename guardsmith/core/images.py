"""Pictures: open them safely, crop them square, hash them, and pass them to and from tensors."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from guardsmith.core.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

MIN_SIDE = 32
"""Pictures with a side shorter than this many pixels are refused."""

MAX_PIXELS = 64_000_000
"""Larger pictures are refused as decompression bombs (a 45-megapixel camera still fits)."""

SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
    ".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".heic", ".heif", ".hif",
})  # fmt: skip
"""Files with these suffixes, in any case, count as pictures when a folder is listed. Others are opened only by their names."""

KINDS = "PNG, JPEG, WebP, AVIF, JPEG 2000, BMP, GIF, TIFF, HEIC"
"""The same for messages."""

# Measured distances (`fingerprint`), mirror images included, on 12 900 pairs of different renders of one avatar (90
# identities in 5 styles, 16 to 20 views each, 64 px) and 61 pairs of photographs of one subject (6 subjects, 512 px).
#   different renders      0.157 once (same pose and crop, other expression and background), the rest from 0.284,
#                          0.302 in the shipped registry's set; median 1.07
#   different photographs  from 0.585; median 1.37
#   copies, worst (95 %)   renders                photographs
#     JPEG 95 / 75 / 40    .053 / .092 / .130     .007 / .013 / .021
#     half / 8 x size      .040 / .026            .027 / -
#     brightness x 1.1     .221 (.103)            .067
#     brightness x 0.8     .055                   .040
#     contrast x 1.2       .096                   .069
#     blurred by 1 px      .142                   .013
#     noise of 8 levels    .192 (.100)            -
#     64 colours, grey     .065, 0                .095, 0
#     mirrored + JPEG 50   .120                   .017
#     cropped by 2 px      .833 (.705)            .122
# Cropping a 64 px render is as large a change as another view, so only crops of real photographs are caught.
NEAR_DUPLICATE = 0.2
"""Two pictures are near-duplicates if their fingerprints are at most this far apart (0 is equal, 1.41 unrelated)."""


HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"mif1", b"msf1"})
"""Bytes 8 to 12 of HEIF files."""


def open_image(path: str | Path, data: bytes | None = None, *, at_least: int | None = None) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    EXIF orientation is applied, transparency is composited on white, greyscale, palette and CMYK are converted, and
    16-bit values are scaled to 8 bits.

    Args:
        path: The file.
        data: Its bytes, if they are already in memory; `path` is then only its name in error messages.
        at_least: A JPEG may come out scaled down by 2, 4 or 8, as long as both sides have so many pixels. That takes a
            fraction of the time, and a damaged file is refused all the same.

    Returns:
        A loaded picture of mode RGB, without metadata.

    Raises:
        UserError: The file is missing, unreadable, not a picture, damaged, animated, smaller than `MIN_SIDE` or larger
            than `MAX_PIXELS`, or has 32-bit values.
    """
    if data is None:
        data = read_bytes(path)
    try:
        with warnings.catch_warnings():
            # Pillow only warns from 89 megapixels on; the check below refuses earlier, in our words.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            _heif_is_known()
            image: Image.Image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and not _heif_is_known():
            raise UserError(f"{path} is HEIC, which needs pillow-heif: pip install guardsmith[heic]") from None
        raise UserError(f"{path} is not a picture: give a file of {KINDS}") from None
    except Exception as error:  # Pillow's plugins raise anything on damaged headers
        raise _damaged(path, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    # MPO is how many cameras save a photograph with its preview, HEIF how phones save it with others: the first is the picture.
    if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "HEIF"):
        frames = getattr(image, "n_frames", 1)
        raise UserError(f"{path} is animated or has several pages ({frames} frames): save one frame as PNG")
    if min(image.size) < MIN_SIDE:
        size = f"{image.width} x {image.height}"
        raise UserError(f"{path} is {size} pixels: use a larger picture, each side must have at least {MIN_SIDE}")
    try:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _from_deep_grey(path, image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (MemoryError, UserError):
        raise
    except Exception as error:  # as above, for damaged pixels and metadata
        raise _damaged(path, error) from error
    image.info = {}
    return image


@cache
def _heif_is_known() -> bool:
    """Teach Pillow HEIC, if pillow-heif is installed; says whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _from_deep_grey(path: str | Path, image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    # Pillow opens 16-bit PGM files as 32-bit integers, so the values decide, not the mode.
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path} has 32-bit pixel values: save it with 8 or 16 bits per channel")
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8)).convert("RGB")


def _too_large(path: str | Path) -> UserError:
    return UserError(f"{path} has more than {MAX_PIXELS // 1_000_000} million pixels: scale it down")


def _damaged(path: str | Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"{path} is damaged or incomplete ({reason}): copy the file again")


def square(image: Image.Image, size: int) -> Image.Image:
    """The central square of a picture, scaled (Lanczos, antialiased) to size x size pixels."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures as numbers.

    Args:
        image: One RGB picture, or several of the same size.

    Returns:
        float32 in [-1, 1], of shape (3, height, width), or (n, 3, height, width) for a sequence.
    """
    import torch

    if not isinstance(image, Image.Image):
        return torch.stack([to_tensor(one) for one in image])
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def open_pictures(
    paths: Sequence[str | Path], size: int, change: Callable[[Image.Image], Image.Image] | None = None
) -> torch.Tensor:
    """Open pictures at the size of a model.

    Args:
        paths: the files.
        size: side in pixels; see `square`.
        change: applied to every picture afterwards.

    Returns:
        float32 (n, 3, size, size) in [-1, 1].

    Raises:
        UserError: pictures cannot be used (see `open_image`), one sentence a line for each.
    """
    return to_tensor(
        open_each(paths, lambda image: square(image, size) if change is None else change(square(image, size)))
    )


def open_each(paths: Sequence[str | Path], change: Callable[[Image.Image], Value]) -> list[Value]:
    """Open pictures one after the other; only what is made of each stays in memory.

    Args:
        paths: the files.
        change: applied to every picture.

    Returns:
        The results, in order.

    Raises:
        UserError: pictures cannot be used (see `open_image`), one sentence a line for each.
    """
    results = []
    problems = []
    for path in paths:
        try:
            results.append(change(open_image(path)))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return results


def to_pil(tensor: torch.Tensor) -> Image.Image:
    """One tensor of shape (3, height, width), any float type, as an RGB picture; values outside [-1, 1] are clamped.

    Raises:
        RunFailed: The tensor holds NaN or infinity, which has no colour: whatever made it diverged.
    """
    import torch

    values = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise RunFailed("a generated picture holds NaN or infinity: the model diverged; lower its learning rate")
    pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 lowercase hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: There is no such file, it is a folder, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a picture: name a file in it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValueError:  # a zero byte in its name
        raise UserError(f"{str(path)!r} is no file name: correct it") from None


def is_whole_png(file: Path) -> bool:
    """Whether a PNG file is there with its end, which it lacks if it was cut short or left empty by a power loss."""
    try:
        with file.open("rb") as data:
            data.seek(-8, os.SEEK_END)
            return data.read(4) == b"IEND"
    except OSError:
        return False


FINGERPRINTED_AT = 256
"""`open_image(at_least=...)` for `fingerprint`: at most 0.014 away from that of the whole picture (12 photographs of 512 px)."""


def fingerprint(image: Image.Image) -> NDArray[np.float64]:
    """A perceptual hash: nearly the same for copies of a picture in another size, encoding, brightness or contrast.

    The 16 x 16 lowest frequencies of its luminance (DCT of 32 x 32 pixels) without the mean, each multiplied by its
    frequency so that details count as much as large shapes, scaled to length 1. This is imagehash's `phash` before it
    keeps the signs only: the signs are noise where a picture is smooth (54 to 68 of 256 bits flip when a photograph
    before a plain wall is saved as JPEG again; different renders start at 16), and `phash` needs SciPy, which takes
    longer to import than the rest of `guardsmith check` takes to run.

    Args:
        image: A picture of any size.

    Returns:
        float64 of shape (2, 256): the picture and its mirror image. Zero for a picture of one single colour.
    """
    luminance = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    frequencies = (_DCT @ luminance @ _DCT.T) * _WEIGHTS
    frequencies /= max(float(np.linalg.norm(frequencies)), 1.0)
    mirrored = frequencies * (-1.0) ** np.arange(16)  # mirroring negates the odd horizontal frequencies
    return np.stack([frequencies.ravel(), mirrored.ravel()])


_DCT = np.cos(np.pi * np.outer(np.arange(16), 2 * np.arange(32) + 1) / 64) / 4
_DCT[0] /= np.sqrt(2)  # orthonormal
_WEIGHTS = np.hypot(*np.indices((16, 16)))


def near_duplicates(fingerprints: Sequence[NDArray[np.float64]]) -> list[tuple[int, int, float]]:
    """Pairs of pictures that are copies of each other, mirrored or not.

    All pairs are looked at, but by bounds: a distance takes 512 products, and 80,000 pictures are 3 billion pairs.

    Args:
        fingerprints: One `fingerprint` per picture.

    Returns:
        (i, j, distance) for all i < j whose distance is at most `NEAR_DUPLICATE`, in order.
    """
    if not fingerprints:
        return []
    stack = np.stack(fingerprints)
    bounds = _bounds(stack[:, 0])
    order = np.argsort(bounds[:, 0], kind="stable")  # pairs that differ in the first bound alone are never compared
    bounds = bounds[order]
    squares = (bounds**2).sum(axis=1)
    rounding = 1e-3  # of float32, with room to spare
    rows = max(1, _COMPARED_AT_ONCE // len(bounds))
    candidates = []
    for start in range(0, len(bounds), rows):
        some = bounds[start : start + rows]
        end = np.searchsorted(bounds[:, 0], some[-1, 0] + NEAR_DUPLICATE + rounding, side="right")
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
        distances = squares[start : start + rows, None] + squares[None, start:end] - 2 * some @ bounds[start:end].T
        first, second = np.nonzero(distances <= NEAR_DUPLICATE**2 + rounding)
        later = second > first
        candidates.append(np.sort(np.stack([order[first[later] + start], order[second[later] + start]]), axis=0))
    pairs = []
    for i, j in sorted(zip(*np.concatenate(candidates, axis=1).tolist(), strict=True)):
        distance = float(np.linalg.norm(stack[i, 0] - stack[j], axis=1).min())
        if distance <= NEAR_DUPLICATE:
            pairs.append((i, j, distance))
    return pairs


_COMPARED_AT_ONCE = 2**22  # pairs: 16 MiB of distances
_KEPT = 16  # numbers of each half of a fingerprint


def _bounds(fingerprints: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows whose distance is at most that of their fingerprints, mirrored or not; float32 (n, 2 * (_KEPT + 1)).

    Mirroring leaves the even horizontal frequencies and negates the odd ones. So a row has the leading components of the even
    half and the absolute values of those of the odd half (||x| - |y|| is at most |x - y| and at most |x + y|), each with the
    length of what is left of its half.
    """
    halves = fingerprints.reshape(len(fingerprints), 16, 8, 2)
    parts = []
    for number in range(2):
        half = halves[..., number].reshape(len(fingerprints), -1)
        centred = half if number else half - half.mean(axis=0)
        leading = half @ np.linalg.eigh(centred.T @ centred)[1][:, : -_KEPT - 1 : -1]
        left = np.sqrt(np.maximum((half**2).sum(axis=1) - (leading**2).sum(axis=1), 0))
        parts += [np.abs(leading) if number else leading, left[:, None]]
    return np.concatenate(parts, axis=1).astype(np.float32)
