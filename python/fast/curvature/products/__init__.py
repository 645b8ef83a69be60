"""How products of one batch with a curvature matrix are computed, and in which arithmetic.

* `batch_loss`: the loss of one batch, which all ways start from.
* `looped`: by autograd, one vector after the other. It works wherever autograd does.
* `batched`: all K vectors at once, through a record of the gradient.
* `rules`: the derivative of every operation that such a record understands.
* `programs`: a record as code, which runs on batches that were never recorded.
* `precision`: the arithmetic of matrix products and convolutions.
"""
