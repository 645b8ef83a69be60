"""Products with curvature matrices: one vector after the other, or all K at once."""
