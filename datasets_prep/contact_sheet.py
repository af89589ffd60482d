"""Some images of a .beton file with the names of their classes, on one sheet, to look at."""

import io
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pcl_fast.beton import JPG, BetonFile
from pcl_fast.manifest import Manifest

COLUMNS, ROWS = 8, 8
TILE, CAPTION, GAP = 160, 18, 6
PAPER, INK = "white", "black"


def contact_sheet(beton: BetonFile, manifest: Manifest | None) -> Image.Image:
    """Up to 64 images, spread evenly over the classes; each is captioned with its number and its class."""
    by_label = np.argsort(beton.labels_N, kind="stable")
    count = min(COLUMNS * ROWS, beton.num_samples)
    chosen = by_label[np.linspace(0, beton.num_samples - 1, count).astype(np.int64)]
    rows = -(-count // COLUMNS)
    cell = (TILE + GAP, TILE + CAPTION + GAP)
    sheet = Image.new("RGB", (min(count, COLUMNS) * cell[0] + GAP, rows * cell[1] + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, sample in enumerate(chosen.tolist()):
        left, top = GAP + number % COLUMNS * cell[0], GAP + number // COLUMNS * cell[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of corrupt EXIF and the like
            image = pixels(beton, sample)
        image = ImageOps.contain(image, (TILE, TILE), Image.Resampling.BICUBIC)
        sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
        label = int(beton.labels_N[sample])
        named = manifest is not None and label < len(manifest.classes)
        caption = f"{sample}: {manifest.classes[label] if manifest and named else f'label {label}'}"
        while font.getlength(caption) > TILE:
            caption = caption[:-2] + "…"
        draw.text((left + TILE / 2, top + TILE + 2), caption, INK, font, anchor="ma")
    return sheet


def pixels(beton: BetonFile, sample: int) -> Image.Image:
    """One image, decoded; gray where it cannot be."""
    height, width = (int(side) for side in beton.sizes_N2[sample])
    if beton.modes_N[sample] != JPG:
        return Image.frombytes("RGB", (width, height), bytes(beton.encoded(sample)))
    try:
        return Image.open(io.BytesIO(beton.encoded(sample))).convert("RGB")
    except OSError:  # `verify` names it
        return Image.new("RGB", (width, height), "gray")
