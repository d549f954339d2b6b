"""Stop 4 of the walk: from traced expressions to a proved recurrence (index polynomials, classification, emission)."""
