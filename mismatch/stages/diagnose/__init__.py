"""A diagnosis: correct one thing at a time in what a swapped part adds to the stream, and see how much damage goes.

config.py       what it is told
places.py       the swapped places, and the site where each is corrected
sides.py        one batch: the teacher's update, the student's on the same input, and how a student runs with it changed
fits.py         corrections that are fitted on calibration text, by weighed least squares
corrections.py  every correction by name, from the simplest to the richest, under the three causes
taken_apart.py  all places fitted, heads and branches too; the students that result
judge.py        KL of many students on held-out text, through one teacher
shares.py       what each correction returns, Shapley shares of the causes, intervals; which correction leads
found.py        what was found: plain numbers, JSON; rows.py the same for the long table
verdict.py      the words, and the next command; evidence.py what an earlier run says about the same swap
job.py          the whole; start.py how it begins; result.py what comes back
"""
