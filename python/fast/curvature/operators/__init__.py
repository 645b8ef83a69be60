"""Hessian, Gauss-Newton and Fisher matrices as operators."""
