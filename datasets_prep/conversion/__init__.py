"""The parts of a conversion to a .beton file; `datasets_prep.convert` puts them together."""
