"""A plan: which layers to replace, what that should cost, and what it does cost.

config.py   what it is told
choose.py   from the cells of a scan to a choice of layers: exactly, within budgets
judge.py    the choice together, its parts one at a time, and the control, on text that chose nothing
job.py      the whole: scan, choice (or one layer after another), judgement, run folder
result.py   what comes back
"""
