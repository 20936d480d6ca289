"""What metrics share: accumulators that update, merge and compute.

tokens.py            numbers per token: sums per document and position, largest value, histogram
per_document.py      sums over documents, means, differences, and the one interval behind every number
moments.py           means, covariances and cross-covariances of two streams; gaussian.py what is made of them
minibatch.py         HSIC in groups of tokens
pairs.py, logits.py  one batch of two streams; one chunk of two models' log-probabilities
meter.py             all metrics of one site, fed together
readings.py          one number of one metric at one site
"""
