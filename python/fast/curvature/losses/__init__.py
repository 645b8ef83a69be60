"""What curvature needs to know of a loss."""
