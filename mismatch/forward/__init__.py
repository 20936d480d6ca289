"""Every way to run teacher and student: sites, hooks, the shared prefix, the head, held-out KL, calibration, proofs."""
