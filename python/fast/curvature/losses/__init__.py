"""Losses, with what curvature needs of them: denominators, gradients and Hessians.

`loss` is any function of output and target, `closed_forms` those of torch whose Hessian is known,
and `recognise` finds which of the two a user's loss is. `denominators` measures what a mean divides
by.
"""
