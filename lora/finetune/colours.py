"""The colours of methods in curves and reports."""

from __future__ import annotations

# Okabe and Ito's palette, distinct for colour-blind readers. Its orange is darker here, and grey
# takes the place of its light blue, so that each line can be seen on white and on a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07A00", "#7A7A7A")
