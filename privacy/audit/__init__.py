"""Attacks on trained models, and what they prove about their privacy.

The bounds are plain functions of counts and need numpy and scipy only:

    from sottovoce.privacy.audit import one_run_lower_bound
    one_run_lower_bound(m=1000, guesses=100, correct=90, delta=1e-5, confidence=0.95)  # 1.626

`sottovoce.privacy.audit.run` attacks a finished run and writes the verdict.
"""

from sottovoce.privacy.audit.bounds import (
    Estimate,
    LowerBound,
    binomial_interval,
    clopper_pearson_ceiling,
    clopper_pearson_lower_bound,
    one_run_ceiling,
    one_run_lower_bound,
    one_run_p_value,
)
from sottovoce.privacy.audit.gaussian import (
    gaussian_epsilon,
    one_run_gaussian_lower_bound,
    pooled_gaussian_estimate,
    two_gaussians_epsilon,
)

__all__ = [
    "Estimate",
    "LowerBound",
    "binomial_interval",
    "clopper_pearson_ceiling",
    "clopper_pearson_lower_bound",
    "gaussian_epsilon",
    "one_run_ceiling",
    "one_run_gaussian_lower_bound",
    "one_run_lower_bound",
    "one_run_p_value",
    "pooled_gaussian_estimate",
    "two_gaussians_epsilon",
]
