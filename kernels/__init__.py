"""Triton kernels and their launchers, one file an op. Importing this package does not import Triton; importing a file of it does."""
