"""Peer Collaborative Learning (Wu and Gong, AAAI 2021): faithful, fast online knowledge distillation."""

__version__ = "0.1.0"
