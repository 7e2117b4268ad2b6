"""Weights that know how to multiply, dense or quantised, and the bitsandbytes file layout."""
