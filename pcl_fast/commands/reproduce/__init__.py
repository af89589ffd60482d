"""`pcl-fast reproduce TABLE`: the paper's tables, from the runs that are missing to the comparison."""

from pcl_fast.commands.reproduce.command import main

__all__ = ["main"]
