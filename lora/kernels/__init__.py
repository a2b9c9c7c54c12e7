"""Every fast path. A method states an equation; what computes it faster is here."""
