"""Train the swapped module to match the teacher's, cheaply, and measure what was recovered.

config.py              its settings
texts.py               the texts in their roles; training_text.py, self_generated.py what is trained on
trainable.py           the student that is trained
ladder.py              one stage after the other, each kept only if it helped; ladder_stages/ the stages
trained_controls.py    the same steps spent on a control
knockout.py            the repaired student without each branch
before_after.py        probes and shifts, before and after
gates.py               where the gates stand
rows.py                the numbers as rows of the table; plan.py the rest
stage.py               the stage: from settings to table and checkpoint
report/                the figures and words; result.py what comes back
"""
