"""A plan: which layers to replace, what that should cost, and what it does cost.

config.py     its settings
scores.py     the table of scores: what layers are chosen by; numbers.py what each costs
choose.py     from the prices of layers to a choice: exactly, within budgets
greedy.py     one layer after another, with a new scan after each
restore.py    all layers replaced, and one after the other given back
answers.py    whether the teacher can answer, where a score needs that
ways.py       from a score to a choice, and how sure it is
published.py  layer lists that others published, beside the choice
measured.py   the choice together, its parts one at a time, and the control, on text that chose nothing
stage.py      the stage: scan, choice, evaluation
figure.py     the figure and the summary; report.py both for the report
result.py     what comes back
"""
