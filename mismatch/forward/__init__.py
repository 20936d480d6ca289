"""Every way to run teacher and student, and the KL between them.

sites.py             what is measured, and where it is found in a model
hooks.py             run (a part of) a model and look at its sites; nnsight_backend.py the same in nnsight
shared_prefix.py     the teacher once, each student from its first swapped block on
paired_sites.py      every site of every student beside the teacher's, on one batch
head.py              final states to predictions, in chunks: students compared, tokens scored, KL with a gradient
heldout.py           KL and NLL difference of students on held-out text
calibrate.py         the teacher's inputs and outputs, shown to mechanisms that set themselves from them
verify.py            proves on the loaded model that all of this is true of it
"""
