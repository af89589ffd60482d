"""Data sets on the disk: fetched, checked, read and converted. Sees only the leaves of `pcl_fast`."""
