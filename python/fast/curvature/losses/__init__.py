"""Losses, with what curvature needs of them: denominators, gradients and Hessians."""
