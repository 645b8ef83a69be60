"""Batches of any form, data sets, labels and the files that they come from."""
