"""A folder of images as people have them: `python -m tests.acceptance.messy OUT`.

Three classes of photos and drawings in folders of any depth, with all that phones, cameras, downloads and operating
systems leave beside them: Exif orientation, HEIC, animations, CMYK, deep gray, cut and empty files, wrong and missing
endings, duplicates, links, AppleDouble, thumbnails of the system.
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pillow_heif import register_heif_opener

SIZE = 96


def scene(kind: str, seed: int) -> Image.Image:
    """A photo of a thing: a filled shape on an uneven ground."""
    rng = np.random.default_rng(seed)
    ground = np.linspace(120, 230, SIZE)[:, None, None] + rng.normal(0, 12, (SIZE, SIZE, 1)) * np.ones(3)
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    _shape(ImageDraw.Draw(image), kind, seed, fill=("firebrick", "seagreen", "navy")[seed % 3])
    return image


def drawing(kind: str, seed: int) -> Image.Image:
    """The outline of the thing, black on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    _shape(ImageDraw.Draw(image), kind, seed, outline="black", width=3)
    return image


def _shape(pen: ImageDraw.ImageDraw, kind: str, seed: int, **how: Any) -> None:
    box = (10 + seed % 7, 12, 70 + seed % 7, 76)
    if kind == "tower":
        pen.rectangle((box[0] + 18, 5, box[2] - 18, 90), **how)
    elif kind == "ball":
        pen.ellipse(box, **how)
    else:
        pen.polygon([(box[0], box[3]), ((box[0] + box[2]) / 2, box[1]), (box[2], box[3])], **how)


def save(path: Path, image: Image.Image, kind: str = "", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind or None, **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(root: Path) -> None:
    """Write the folder below `root`."""
    register_heif_opener()
    balls, towers, sails = (root / "photo" / name for name in ("ball", "Tower Räder", "sail"))
    for number in range(6):
        save(balls / "2024" / "07 summer" / f"IMG {number}.JPG", scene("ball", number))
        save(towers / f"turm ä{number}.jpg", scene("tower", number))
        save(root / "sketch" / "ball" / f"{number}.png", drawing("ball", number))
        save(root / "sketch" / "Tower Räder" / "deep" / f"{number}.PNG", drawing("tower", number))
    save(sails / "only one.webp", scene("sail", 1))
    _phone(balls)
    _formats(towers)
    _damaged(balls / "downloads")
    _of_the_system(root)


def _phone(folder: Path) -> None:
    turned = Image.Exif()
    turned[0x112] = 6  # upright once it is turned by a quarter to the right
    save(folder / "phone" / "turned.jpg", scene("ball", 11).transpose(Image.Transpose.ROTATE_90), exif=turned)
    save(folder / "phone" / "IMG_0001.HEIC", scene("ball", 12), "HEIF")
    frames = [scene("ball", 13), scene("ball", 14)]
    save(folder / "phone" / "funny.gif", frames[0], save_all=True, append_images=frames[1:])
    save(folder / "phone" / "moving.webp", frames[0], save_all=True, append_images=frames[1:])


def _formats(folder: Path) -> None:
    image = scene("tower", 21)
    save(folder / "print.jpg", image.convert("CMYK"))
    save(folder / "web.jpg", image, progressive=True)
    save(folder / "palette.png", image.quantize(16))
    save(folder / "scan.tif", image)
    save(folder / "paint.bmp", image)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    save(folder / "deep.png", Image.fromarray(deep))
    (folder / "no ending").write_bytes(encoded(image, "PNG"))
    (folder / "really a png.jpg").write_bytes(encoded(image, "PNG"))
    (folder / "logo.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')


def _damaged(folder: Path) -> None:
    folder.mkdir(parents=True)
    whole = encoded(scene("ball", 31).resize((400, 300)), "JPEG")
    (folder / "copy.jpg").write_bytes(whole)
    (folder / "copy (1).jpg").write_bytes(whole)
    (folder / "last bytes missing.jpg").write_bytes(whole[:-2])
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "not found.jpg").write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")


def _of_the_system(root: Path) -> None:
    photos = root / "photo" / "ball"
    (photos / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (photos / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (photos / "._IMG 0.JPG").write_bytes(b"\0\5\26\7\0\2\0\0")
    (photos / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 64)
    (photos / "notes.txt").write_text("where these are from")
    (photos / "linked.jpg").symlink_to(photos / "downloads" / "copy.jpg")
    (photos / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "photo" / "album").symlink_to(root / "photo" / "sail")


def looks_like_an_image(path: Path) -> bool:
    """By its ending or first bytes; what systems and cameras write beside images is none."""
    if path.name.startswith(".") or path.name == "Thumbs.db":
        return False
    endings = ("jpg", "jpeg", "png", "webp", "gif", "heic", "tif", "bmp", "svg")
    return path.suffix.lower()[1:] in endings or (path.is_file() and path.read_bytes()[:4] == b"\x89PNG")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    write(Path(sys.argv[1]))
