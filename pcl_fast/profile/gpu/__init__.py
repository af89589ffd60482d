"""Checks and measurements of a GPU: every part in a process of its own, every sample kept."""
