"""The metrics: a table of names, and `measure` to use one of them on two arrays.

The table holds strings, so listing and explaining metrics imports neither them nor torch.
To add one: write its file, add its line here; the contract test then runs over it.
"""

from __future__ import annotations

from typing import Any

METRICS = {
    "kl": "mismatch.metrics.kl:KL",
    "js": "mismatch.metrics.js:JS",
    "top1": "mismatch.metrics.top1:Top1",
    "top5": "mismatch.metrics.top5:Top5",
    "nll": "mismatch.metrics.nll:NLL",
    "lens_kl": "mismatch.metrics.lens_kl:LensKL",
    "rel_l2": "mismatch.metrics.rel_l2:RelL2",
    "cosine": "mismatch.metrics.cosine:Cosine",
    "angle": "mismatch.metrics.angle:Angle",
    "norm_ratio": "mismatch.metrics.norm_ratio:NormRatio",
    "update_size": "mismatch.metrics.update_size:UpdateSize",
    "massive": "mismatch.metrics.massive:Massive",
    "cka": "mismatch.metrics.cka:CKA",
    "cka_minibatch": "mismatch.metrics.cka_minibatch:MinibatchCKA",
    "mean_shift": "mismatch.metrics.mean_shift:MeanShift",
    "frechet": "mismatch.metrics.frechet:Frechet",
    "gaussian_kl": "mismatch.metrics.gaussian_kl:GaussianKL",
    "effective_rank": "mismatch.metrics.effective_rank:EffectiveRank",
    "participation_ratio": "mismatch.metrics.participation_ratio:ParticipationRatio",
    "kurtosis": "mismatch.metrics.kurtosis:Kurtosis",
}


def load_metric(name: str) -> Any:
    """The class of a metric, of the table or registered by another package (imports torch).

    Raises:
        UsageError: no metric has this name.
    """
    from mismatch.registry import metrics

    return metrics().get(name)


def measure(name: str, teacher: Any, student: Any, **options: Any) -> list:
    """One metric on two arrays; see `mismatch.metrics.measuring.measure`."""
    from mismatch.metrics.measuring import measure as run

    return run(name, teacher, student, **options)
