"""Where kernels can run: each module says whether its backend is there, and the reason."""
