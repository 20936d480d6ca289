"""A diagnosis: correct one thing at a time in what a swapped module adds to the stream, and see how much damage goes.

config.py        its settings
places.py        the swapped places, and the site where each is corrected
forced.py        one batch: the teacher's update, the student's on the same input, a student that runs with it changed
fits.py          corrections that are fitted on calibration text, by weighed least squares
corrections.py   every correction by name, from the simplest to the richest, under the three causes
fitted.py        all places fitted, heads and branches too; the students that result
heldout.py       KL of many students on evaluation text, through one teacher
shapley.py       what each correction recovers, Shapley shares of the causes, intervals; which correction leads
numbers.py       what was found: plain numbers, JSON; rows.py the same for the long table
verdict.py       the words, and the next command
earlier_run.py   what an earlier run shows of the same swap
stage.py         the stage: from settings to table and findings
figure.py        the figure and the summary; report.py both for the report
result.py        what comes back
"""
