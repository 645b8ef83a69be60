"""Hessian, Gauss-Newton and Fisher matrices as operators.

`base` says what a symmetric operator is. A `NetworkOperator` is one over a network's parameters: it
takes the mean over all batches, and its base, the `linearizer`, chooses how one batch is computed.
`hessian` has the kinds of matrix, `self_check` what they can check of themselves, and
`fisher_diagonal` a diagonal from squared gradients, without products.
"""
