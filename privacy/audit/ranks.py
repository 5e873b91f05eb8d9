"""Exposure: how far an inserted secret outranks others that might have been inserted instead.

Carlini, Liu, Erlingsson, Kos, Song 2019, "The Secret Sharer", arXiv:1802.08232, definition 4:
log2 of the number of candidates minus log2 of the secret's rank among them. By chance it is above
b bits with probability 2^-b. An estimate: it says nothing of epsilon by itself.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.audit.bounds import binomial_interval
from sottovoce.privacy.audit.figures import Exposure


def exposure(
    secret: float,
    others: NDArray[np.float64],
    *,
    candidates: int,
    confidence: float = 0.95,
) -> Exposure:
    """Exposure of a secret that scores `secret`, higher for better known.

    `others`: (sample,) scores of candidates that were not inserted: all of them
    (`candidates` - 1), where the rank is exact, or a random sample, where the interval is that of
    the share that outranks the secret (Clopper-Pearson). Ties outrank it. Raises ValueError where
    there are no others, more than candidates, or a score that is no number.
    """
    sample = len(others)
    if not 1 <= sample <= candidates - 1:
        raise ValueError(f"{sample} others of candidates={candidates} - 1: give 1 or more of them")
    if not (math.isfinite(secret) and np.isfinite(others).all()):
        raise ValueError("scores of secrets must be finite numbers")
    above = int((others >= secret).sum())
    most = math.log2(candidates)
    bits = math.log2((sample + 1) / (above + 1))
    if sample == candidates - 1:
        return Exposure(bits, (bits, bits), most, confidence, "rank among all candidates")
    least, highest = binomial_interval(above, sample, confidence)
    low, high = (most - math.log2(1 + share * (candidates - 1)) for share in (highest, least))
    return Exposure(
        bits, (max(0.0, low), high), most, confidence, f"rank among {sample:,} random candidates"
    )
