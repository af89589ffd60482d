"""The views of a batch of decoded images, by whatever is fastest where they lie."""

from pipelines.normalisation import NORMALISATIONS, Normalisation

__all__ = ["NORMALISATIONS", "Normalisation"]
