"""Kernels of our own, each with its reference in plain torch."""
