"""A network as a pure function of its parameters.

`network` evaluates a model and leaves no trace on it, in the state that `evaluation` sets up;
`parameter_space` has the vectors over its parameters, and `batches` its data. `snapshot` tells
whether any of this has changed, `double_backward` which module has no second derivative.
"""
