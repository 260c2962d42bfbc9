import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from guardsmith.core import images
from guardsmith.core.errors import RunFailed, UserError
from guardsmith.core.images import (
    FINGERPRINTED_AT,
    MIN_SIDE,
    NEAR_DUPLICATE,
    fingerprint,
    near_duplicates,
    open_image,
    sha256_file,
    square,
    to_pil,
    to_tensor,
)


def blobs(seed, size=64):
    """A smooth random picture; two seeds look nothing alike."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def pixels(image):
    return np.asarray(image).astype(int)


def refuses(path, *words):
    with pytest.raises(UserError) as caught:
        open_image(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
    assert caught.value.exit_code == 2


def test_rgb_is_unchanged(tmp_path):
    blobs(0).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert (pixels(image) == pixels(blobs(0))).all()


def test_bytes_in_memory_are_used_instead_of_the_file():
    buffer = io.BytesIO()
    blobs(0).save(buffer, format="PNG")
    assert (pixels(open_image("nowhere.png", buffer.getvalue())) == pixels(blobs(0))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_pixels(tmp_path, orientation):
    upright = Image.new("RGB", (48, 64), "white")
    upright.paste((255, 0, 0), (0, 0, 24, 32))  # red top left, blue bottom right
    upright.paste((0, 0, 255), (24, 32, 48, 64))
    # How a camera that was held the other way stores it: the inverse of what the viewer has to do.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    opened = open_image(tmp_path / "a.jpg")
    assert opened.size == (48, 64)
    assert np.abs(pixels(opened) - pixels(upright)).mean() < 3
    assert opened.getexif().get(274) is None  # or a later step turns it again


def test_transparency_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 20, 40))
    image.paste((0, 0, 0, 51), (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert opened.getpixel((5, 5)) == (0, 0, 255)
    assert opened.getpixel((30, 30)) == (255, 255, 255)
    assert opened.getpixel((30, 10)) == (204, 204, 204)


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (40, 40), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (0, 0, 20, 40))
    image.save(tmp_path / "a.png", transparency=0)
    opened = open_image(tmp_path / "a.png")
    assert opened.getpixel((5, 5)) == (0, 255, 0)
    assert opened.getpixel((30, 5)) == (255, 255, 255)


def test_greyscale_with_and_without_alpha(tmp_path):
    Image.new("L", (40, 40), 77).save(tmp_path / "l.png")
    Image.new("LA", (40, 40), (0, 51)).save(tmp_path / "la.png")
    assert open_image(tmp_path / "l.png").getpixel((0, 0)) == (77, 77, 77)
    assert open_image(tmp_path / "la.png").getpixel((0, 0)) == (204, 204, 204)


def test_cmyk(tmp_path):
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "a.jpg").getpixel((5, 5))
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_values_are_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    found = pixels(open_image(tmp_path / f"a.{suffix}"))
    assert found.shape == (64, 64, 3)
    assert (found[..., 0] == np.round(values / 257)).all()
    assert (found[..., 0] == found[..., 2]).all()


def test_32_bit_values_are_refused(tmp_path):
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(tmp_path / "a.tif")
    refuses(tmp_path / "a.tif", "32-bit")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animated_and_several_pages_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    blobs(0).save(path, save_all=True, append_images=[blobs(1), blobs(2)])
    refuses(path, "animated", "3 frames")


def test_a_still_gif_is_fine(tmp_path):
    blobs(0).save(tmp_path / "a.gif")
    assert open_image(tmp_path / "a.gif").size == (64, 64)


def test_a_camera_picture_with_a_preview_is_fine(tmp_path):
    blobs(0).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[blobs(1)])
    assert np.abs(pixels(open_image(tmp_path / "a.jpg")) - pixels(blobs(0))).mean() < 10


@pytest.mark.parametrize("size", [(1, 1), (MIN_SIDE - 1, 500), (500, MIN_SIDE - 1)])
def test_too_small(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    refuses(tmp_path / "a.png", f"{size[0]} x {size[1]}", str(MIN_SIDE))


def test_smallest_allowed_size(tmp_path):
    Image.new("RGB", (MIN_SIDE, MIN_SIDE)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (MIN_SIDE, MIN_SIDE)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.9])
def test_truncated(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    blobs(0).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refuses(path)


def test_damaged_in_the_middle(tmp_path):
    path = tmp_path / "a.png"
    blobs(0).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    refuses(path, "damaged")


def test_not_a_picture_missing_and_a_folder(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    refuses(tmp_path / "a.png", "not a picture")
    refuses(tmp_path / "b.png", "does not exist")
    refuses(tmp_path, "folder")


@pytest.mark.parametrize("side", [9_000, 15_000])  # Pillow warns from 89 megapixels on and refuses from 179
def test_decompression_bomb(tmp_path, side, recwarn):
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    refuses(tmp_path / "a.png", "million pixels")
    assert not recwarn.list


def test_square_takes_the_centre():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 255, 0), (100, 0, 200, 100))
    assert square(wide, 64).size == (64, 64)
    for image in (wide, wide.rotate(90, expand=True)):
        assert np.abs(pixels(square(image, 64))[4:-4, 4:-4] - (0, 255, 0)).max() <= 3


def test_square_is_antialiased_and_leaves_the_right_size_alone():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    small = pixels(square(Image.fromarray(stripes), 64))
    assert np.abs(small[:, 4:-4] - 127).max() <= 8
    assert (pixels(square(blobs(0), 64)) == pixels(blobs(0))).all()


def test_tensor_range_shape_and_round_trip():
    torch = pytest.importorskip("torch")
    ramp = np.zeros((32, 64, 3), np.uint8)
    ramp[..., 0] = np.arange(64) * 4
    ramp[..., 1] = 255
    image = Image.fromarray(ramp)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 32, 64)
    assert tensor.dtype == torch.float32
    assert tensor[1].unique().tolist() == [1.0]
    assert tensor[2].unique().tolist() == [-1.0]
    assert tensor[0, 5, 63].item() == pytest.approx(252 / 127.5 - 1)
    assert to_tensor([image, image]).shape == (2, 3, 32, 64)
    every_value = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(12).reshape(32, 32, 3))
    assert (pixels(to_pil(to_tensor(every_value))) == pixels(every_value)).all()


def test_to_pil_clamps_rounds_and_refuses_nan():
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([-3.0, 0.0, 7.0]).reshape(3, 1, 1).expand(3, 32, 32)
    assert to_pil(tensor).getpixel((0, 0)) == (0, 128, 255)
    assert to_pil(tensor.half()).getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(RunFailed, match="NaN"):
        to_pil(tensor * float("nan"))


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer)


COPIES = {
    "jpeg 40": lambda image: jpeg(image, 40),
    "half size": lambda image: image.resize((32, 32), Image.Resampling.LANCZOS),
    "enlarged": lambda image: image.resize((500, 500), Image.Resampling.BICUBIC),
    "stretched": lambda image: image.resize((96, 64), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "greyscale": lambda image: image.convert("L"),
    "mirrored": ImageOps.mirror,
    "mirrored jpeg": lambda image: jpeg(ImageOps.mirror(image), 75),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_near_duplicates(copy):
    for seed in range(5):
        pair = [fingerprint(blobs(seed)), fingerprint(COPIES[copy](blobs(seed)))]
        assert [found[:2] for found in near_duplicates(pair)] == [(0, 1)]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_photograph_is_decoded_small_for_its_fingerprint(tmp_path, share):
    whole, file = blobs(1, 1100), tmp_path / "a.jpg"
    whole.save(file, quality=90)
    small = open_image(file, at_least=FINGERPRINTED_AT)
    assert small.size == (275, 275) and open_image(file).size == (1100, 1100)
    assert np.abs(fingerprint(small) - fingerprint(whole)).max() < 0.01
    assert open_image(file, at_least=1101).size == (1100, 1100), "never scaled up"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    for at_least in (None, FINGERPRINTED_AT):
        with pytest.raises(UserError, match="damaged"):
            open_image(file, at_least=at_least)


def test_a_smooth_picture_is_still_a_near_duplicate_of_its_copy():
    """A sign hash (imagehash's phash) fails here: most frequencies are zero and their signs are noise."""
    yy, xx = np.mgrid[:256, :256]
    disc = 220 - 150 * (np.hypot(xx - 128, yy - 120) < 60)
    image = Image.fromarray(disc.astype(np.uint8)).convert("RGB")
    assert near_duplicates([fingerprint(image), fingerprint(jpeg(image, 75))])


def test_different_pictures_are_not_near_duplicates():
    assert near_duplicates([fingerprint(blobs(seed)) for seed in range(30)]) == []
    assert near_duplicates([]) == []
    assert near_duplicates([fingerprint(blobs(0)), fingerprint(ImageOps.flip(blobs(0)))]) == []


def test_the_same_figure_one_pixel_aside_is_not_a_near_duplicate():
    """Two renders of one avatar may differ by little more than this, and must be accepted."""

    def figure(left, mouth):
        image = Image.new("RGB", (64, 64), "white")
        image.paste((200, 30, 30), (left, 10, left + 24, 60))
        image.paste((0, 0, 0), (left + 8, 40, left + 16, 40 + mouth))
        return image

    assert near_duplicates([fingerprint(figure(20, 2)), fingerprint(figure(21, 4))]) == []


def test_distance_is_symmetric_and_zero_for_mirrors():
    (found,) = near_duplicates([fingerprint(blobs(3)), fingerprint(ImageOps.mirror(blobs(3)))])
    assert found[2] == pytest.approx(0, abs=1e-2)


def test_near_duplicates_are_those_of_comparing_every_pair(monkeypatch):
    """The bounds leave none out, whatever the number of pictures that are compared at once."""
    pictures = [blobs(seed) for seed in range(150)]
    pictures += [ImageOps.mirror(picture) for picture in pictures[::5]] + [
        jpeg(picture, 40) for picture in pictures[::7]
    ]
    pictures += [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    prints = [fingerprint(picture) for picture in pictures]
    # Every distance up to twice the limit, so that some lie close to it on either side.
    rng = np.random.default_rng(0)
    for size in np.linspace(0.1, 0.4, 120):
        even, move = prints[int(rng.integers(150))][0], rng.normal(size=256)
        moved = even + size * move / np.linalg.norm(move)
        moved /= np.linalg.norm(moved)
        prints.append(np.stack([moved, (moved.reshape(16, 16) * (-1.0) ** np.arange(16)).ravel()]))
    expected = [
        (i, j)
        for i in range(len(prints))
        for j in range(i + 1, len(prints))
        if np.linalg.norm(prints[i][0] - prints[j], axis=1).min() <= NEAR_DUPLICATE
    ]
    assert 80 < len(expected) < 200
    for at_once in (1, 5000, 2**22):
        monkeypatch.setattr(images, "_COMPARED_AT_ONCE", at_once)
        assert [pair[:2] for pair in near_duplicates(prints)] == expected


def test_a_single_colour_has_no_fingerprint():
    assert np.allclose(fingerprint(Image.new("RGB", (64, 64), "red")), 0)
    assert near_duplicates([fingerprint(Image.new("RGB", (64, 64), "red")), fingerprint(blobs(0))]) == []
