"""`pcl-fast report RUN...`: runs side by side, as pictures and one page."""

from pcl_fast.commands.report.command import main

__all__ = ["main"]
