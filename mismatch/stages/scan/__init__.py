"""A scan: every mechanism in every layer, one layer at a time, for the price of a few forwards.

config.py     its settings
cells.py      layers x mechanisms: the cells, and which of them cannot be built
tasks.py      what each cell is asked: text, repeated tokens, a passkey, needles, a list
prepared.py   what is worked out before weights are loaded: cells, tasks, text, time
sweep.py      one batch: the teacher once, then each cell from its block on
sums.py       what is kept of a cell, and the rows of the table made of it
unit_sums.py  what cells lost in each document, and draws of them; reliability.py how sure a ranking is
batches.py    batches and cells in an order that can stop and go on, shared between ranks
stage.py      the stage: from settings to table and plan
atlas.py      the figure; words.py the summary; report.py both for the report
result.py     what comes back
"""
