"""Products with curvature matrices, looped and batched."""
