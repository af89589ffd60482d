"""Backbones, the cut of any network into trunk and branch, and the multi-branch network made of them."""
