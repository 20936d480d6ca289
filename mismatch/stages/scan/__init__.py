"""A scan: every mechanism in every layer, one layer at a time, for the price of a few forwards.

config.py   what it is told
cells.py    layers x mechanisms: the cells, and which of them cannot be built
tasks.py    what each cell is asked: text, repeated tokens, a passkey
sweep.py    one batch: the teacher once, then each cell from its block on
sums.py     what is kept of a cell, and the rows of the table made of it
loop.py     batches and cells in an order that can stop and go on, shared between ranks
job.py      the whole: checks, estimate, run folder, table, figures
result.py   what comes back
"""
