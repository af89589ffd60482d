"""The last step of a conversion: the structure of the file, its manifest, and both under their names."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets_prep.conversion.codec import ORIGINAL, PIXELS, REENCODED, SHRUNK
from datasets_prep.conversion.state import STORED, ConversionState
from datasets_prep.conversion.writer import finish_file
from pcl_fast import atomic
from pcl_fast.beton import SAMPLE, open_beton
from pcl_fast.errors import PclError
from pcl_fast.manifest import Manifest, Quarantined, manifest_path

HOWS = {"original bytes": ORIGINAL, "encoded anew": REENCODED, "raw": PIXELS, "shrunk": SHRUNK}


def finish(
    state: ConversionState, plan: Mapping[str, Any], quarantine: tuple[Quarantined, ...], page_size: int
) -> Manifest:
    """Complete the data file and put it in place, after its manifest; the work folder is removed."""
    good_N: NDArray[np.intp] = np.flatnonzero(state.records_N["status"] == STORED)
    records, labels = state.records_N[good_N], state.listing.labels_N[good_N]
    samples = np.zeros(len(records), SAMPLE)
    for name in ("mode", "width", "height", "offset"):
        samples[name] = records[name]
    samples["label"] = labels
    try:
        finish_file(state.data, page_size, samples, records["length"].astype(np.int64))
        with open_beton(state.data) as beton:
            facts = {"file_size": beton.file_size, "structure_crc32": beton.structure_crc32}
        classes = state.listing.classes
        manifest = Manifest(
            num_samples=len(records),
            page_size=page_size,
            classes=classes,
            class_counts=tuple(int(count) for count in np.bincount(labels, minlength=len(classes))),
            source=state.listing.title,
            source_digest=_source_digest(state),
            options=plan["options"],
            stored={name: int((records["how"] & bit > 0).sum()) for name, bit in HOWS.items()},
            versions=plan["versions"],
            quarantine=quarantine,
            checksums_N=records["crc32"],
            **facts,
        )
        # The file comes last: where it is, its manifest is, too.
        atomic.write_text(manifest_path(state.destination), manifest.to_json())
        os.replace(state.data, state.destination)
        atomic.sync(state.destination.parent)
    except OSError as error:
        raise PclError(
            f"{state.destination} cannot be written: {error.strerror}; every image is converted and kept in "
            f"{state.folder}: make room and run the same command to go on"
        ) from error
    state.remove()
    return manifest


def _source_digest(state: ConversionState) -> str:
    """SHA-256 over path, size and content digest of every image, in order."""
    digest = hashlib.sha256()
    digests = state.records_N["digest"]
    for index, (name, size) in enumerate(zip(state.listing.names, state.listing.sizes_N, strict=True)):
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape") + digests[index].tobytes())
    return digest.hexdigest()
