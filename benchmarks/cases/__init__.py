"""The cases, one file per analysis. To add one: write its ``Case`` and list it in its file's ``CASES``."""

from benchmarks.cases import ablate, direct_logit_attribution
from benchmarks.harness import Case

CASES: dict[str, Case] = {case.name: case for case in (*direct_logit_attribution.CASES, *ablate.CASES)}
