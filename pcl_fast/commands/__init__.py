"""The commands of `pcl-fast`, one file each: the only code that puts all parts together."""
