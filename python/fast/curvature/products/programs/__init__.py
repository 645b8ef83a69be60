"""Programs: the record of one batch becomes code, which then runs on every batch like it.

Recording a batch costs Python for each operation. A program costs none: the passes over a first
batch are traced, operation by operation, and written down as a function of the parameters, the
inputs and the vectors.

The modules, in the order of the work: `tracer` writes every operation down, `simplify` leaves out
what nobody needs, `code` makes functions of what is left, `program` runs them on a batch, and
`programs` finds the program that fits a batch by its `conditions`. `cached_record` has code for the
passes over a single batch. `trace` is what the tracer writes, `traits` what it asks of operations,
and `reads` looks for what it cannot see.
"""
