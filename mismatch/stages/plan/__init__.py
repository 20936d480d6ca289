"""A plan: which layers to replace, what that should cost, and what it does cost.

config.py     its settings
choose.py     from the cells of a scan to a choice of layers: exactly, within budgets
greedy.py     one layer after another, with a new scan after each
measured.py   the choice together, its parts one at a time, and the control, on text that chose nothing
stage.py      the stage: scan, choice, evaluation
figure.py     the figure and the summary; report.py both for the report
result.py     what comes back
"""
