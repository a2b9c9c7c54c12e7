"""The colours of methods in curves and reports."""

from __future__ import annotations

# Okabe and Ito's palette, distinct for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
