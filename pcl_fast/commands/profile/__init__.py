"""`pcl-fast profile`: the speed of a preset's training (`preset`), of loaders (`data`), of a GPU (`gpu`)."""

from pcl_fast.commands.profile.preset import main

__all__ = ["main"]
