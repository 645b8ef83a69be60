"""Eigenpairs, traces, densities and solves of any symmetric operator."""
