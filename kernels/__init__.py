"""Triton kernels and their launchers, one file an op. Importing the package alone does not import Triton."""
