"""What acceptance to expect of a drafter before it is trained."""

from __future__ import annotations

import numpy as np

# Rows learned and the acceptance length reached on held-out answers (K = 4, greedy, without lookup) by SmolLM2's
# drafter; docs/results/smollm2/train-first.log. Half of that text was maths; on broader text it is some tenths less.
MEASURED = ((164_000, 1.96), (328_000, 2.12), (492_000, 2.20), (962_000, 2.40))


def expected_acceptance_length(rows: int) -> float:
    """Return the acceptance length, in tokens, that `MEASURED` suggests after learning so many rows.

    It grows with the logarithm of the rows. Nothing is promised beyond what was measured: more rows get the last value,
    and fewer the line from 1 token at no training. Another target or kind of text lies some tenths off.
    """
    places, lengths = zip((1, 1.0), *MEASURED, strict=True)
    return float(np.interp(np.log(max(rows, 1)), np.log(places), lengths))
