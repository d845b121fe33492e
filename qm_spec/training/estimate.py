"""What acceptance to expect of a drafter before it is trained."""

from __future__ import annotations

import numpy as np

# Rows learned and the acceptance length reached on held-out answers of all kinds (K = 4, greedy, without lookup) by
# drafters of SmolLM2; docs/results/smollm2.md. Of one kind alone more is reached: with maths as half of it, 2.4.
MEASURED = ((280_000, 1.74), (559_000, 1.84), (1_117_000, 2.09), (3_899_000, 2.22))


def expected_acceptance_length(rows: int) -> float:
    """Return the acceptance length, in tokens, that `MEASURED` suggests after learning so many rows.

    It grows with the logarithm of the rows. Nothing is promised beyond what was measured: more rows get the last value,
    and fewer the line from 1 token at no training. Another target or kind of text lies some tenths off.
    """
    places, lengths = zip((1, 1.0), *MEASURED, strict=True)
    return float(np.interp(np.log(max(rows, 1)), np.log(places), lengths))
