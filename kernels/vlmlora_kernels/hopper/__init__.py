"""Kernels for Hopper GPUs (compute capability 9.0), written with Pallas Mosaic GPU."""
