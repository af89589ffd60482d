"""What the directing process of a conversion and its workers say to each other."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datasets_prep.conversion.codec import ImageOptions
from datasets_prep.listings.listing import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a worker has to know: which of the workers it is, how images are stored, and where to."""

    slot: int
    options: ImageOptions
    codec: Literal["image", "planes"]
    data: str
    heartbeats: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Prepare the images from number `first` on; `skipped` are images to leave, with the reasons."""

    chunk: int
    first: int
    places: list[Place]
    identities: list[bytes]
    skipped: dict[int, str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The records (RECORD) of a chunk, without offsets, and why images are bad."""

    chunk: int
    records: NDArray[np.void]
    reasons: dict[int, str]


@dataclass(frozen=True, slots=True)
class Write:
    """Write the stored images of a prepared chunk to these offsets."""

    chunk: int
    offsets: list[int]


@dataclass(frozen=True, slots=True)
class Written:
    """A chunk is in the file; or it is not, for this reason."""

    chunk: int
    problem: str | None
