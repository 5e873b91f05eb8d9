"""Attacks on trained models, and what they prove about their privacy.

The bounds are plain functions of counts and need numpy and scipy only:

    from sottovoce.privacy.audit import one_run_lower_bound
    one_run_lower_bound(m=1000, guesses=100, correct=90, delta=1e-5, confidence=0.95)  # 1.626

`sottovoce.privacy.audit.run` attacks a finished run and writes the verdict.
"""

from sottovoce.privacy.audit.bounds import (
    best_one_run_lower_bound,
    binomial_interval,
    clopper_pearson_ceiling,
    clopper_pearson_lower_bound,
    one_run_ceiling,
    one_run_lower_bound,
    one_run_p_value,
)
from sottovoce.privacy.audit.figures import Estimate, Exposure, LowerBound
from sottovoce.privacy.audit.gaussian import (
    gaussian_epsilon,
    gaussian_mu,
    one_run_gaussian_lower_bound,
    two_gaussians_epsilon,
)
from sottovoce.privacy.audit.pooled import pooled_gaussian_estimate, pooled_gaussian_lower_bound
from sottovoce.privacy.audit.ranks import exposure

__all__ = [
    "Estimate",
    "Exposure",
    "LowerBound",
    "best_one_run_lower_bound",
    "binomial_interval",
    "clopper_pearson_ceiling",
    "clopper_pearson_lower_bound",
    "exposure",
    "gaussian_epsilon",
    "gaussian_mu",
    "one_run_ceiling",
    "one_run_gaussian_lower_bound",
    "one_run_lower_bound",
    "one_run_p_value",
    "pooled_gaussian_estimate",
    "pooled_gaussian_lower_bound",
    "two_gaussians_epsilon",
]
