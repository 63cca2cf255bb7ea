"""Small photo-like JPEG folders in ImageNet's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

VAL = [
    {"type": "LoadImageFromFile"},
    {"type": "ResizeEdge", "scale": 256, "edge": "short"},
    {"type": "CenterCrop", "crop_size": 224},
    {"type": "PackInputs"},
]
TRAIN = [
    {"type": "LoadImageFromFile"},
    {"type": "RandomResizedCrop", "scale": 64},
    {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
    {"type": "PackInputs"},
]
SIZES = [(500, 375), (333, 500), (90, 61), (120, 201), (257, 256), (64, 300), (500, 334)]


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coloured clouds with a little noise."""
    clouds = rng.integers(0, 255, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def make_photos(root: Path, classes: int = 3, each: int = 7) -> Path:
    """``root/train`` and ``root/val``, a folder per class, and ``root/meta/val.txt`` for two images of each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            folder = root / split / f"n{label:04d}"
            folder.mkdir(parents=True)
            for index in range(each):
                photo(rng, *SIZES[index % len(SIZES)]).save(folder / f"{index}.JPEG", quality=90)
    # What ImageNet holds too: a grey image, a progressive one, a turned one, a PNG that is called JPEG.
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = photo(rng, 140, 100)
    odd = root / "val" / f"n{classes - 2:04d}"
    picture.convert("L").save(odd / "grey.JPEG")
    picture.save(odd / "progressive.JPEG", progressive=True)
    picture.save(odd / "turned.JPEG", exif=turned)
    picture.save(odd / "png.JPEG", format="PNG")
    (root / "meta").mkdir()
    lines = [f"n{label:04d}/{index}.JPEG {label}" for index in (1, 0) for label in reversed(range(classes))]
    (root / "meta" / "val.txt").write_text("\n".join(lines))
    return root
