"""The audit of scores that any other system made: a file instead of a run.

Needs numpy, scipy, matplotlib and jinja2, and none of what trains models.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from sottovoce.privacy.audit.claims import Claim
from sottovoce.privacy.audit.outcome import Audit, Facts, weigh
from sottovoce.privacy.audit.score_file import read_scores
from sottovoce.privacy.audit.settings import DEFAULT_DELTA, AuditConfig, design_of
from sottovoce.privacy.audit.verdict import judge, judge_claim

THREAT_MODEL = (
    "Whatever the system that made the scores let its attacker see: observer {observer}. The "
    "attacker asks of each candidate: was it in the training data?"
)
NOTE = "scores are taken as given: how they were made is for whoever made them to say"
INVERTED = (
    "members score lower than non-members: a score must be higher where the attacker believes in "
    "membership; turn their sign around if that was meant"
)


def audit_scores(path: Path, cfg: AuditConfig) -> Audit:
    """Weigh the scores of `path` against `cfg.claim_epsilon`; nothing is printed or written.

    Raises DataError for a file that cannot be used.
    """
    started = time.perf_counter()
    scored = read_scores(path)
    design = design_of(cfg)
    delta = DEFAULT_DELTA if cfg.delta is None else cfg.delta
    stated = math.inf if cfg.claim_epsilon is None else cfg.claim_epsilon
    claim = Claim(
        cfg.unit, cfg.observer, stated, delta,
        relation=design.relation, exchanged=stated, gaussian=design.gaussian,
    )
    facts = Facts(
        path.stem, cfg.unit, cfg.observer,
        sees=f"what {path.name} was made from",
        cost="none here: the file held the scores",
        relation=design.relation,
        note=NOTE,
    )
    result = weigh(
        facts, scored, [claim],
        delta=delta, confidence=cfg.confidence, tests=1, design=design,
        generator=np.random.default_rng(cfg.seed), invalid=None, seconds=0.0,
    )
    found = result.membership
    inverted = found is not None and found.auc_interval[1] < 0.5
    findings = [result.finding]
    return Audit(
        source=path,
        judgement=judge([claim], findings),
        claims=(claim,),
        by_claim=(judge_claim(claim, findings),),
        results=(result,),
        skipped={},
        confidence=cfg.confidence,
        seed=cfg.seed,
        seconds=time.perf_counter() - started,
        threat_model=THREAT_MODEL.format(observer=cfg.observer),
        notes=(INVERTED,) if inverted else (),
    )
