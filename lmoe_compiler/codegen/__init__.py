"""Stop 6 of the walk: chunk program -> plan -> tile program -> Triton source."""
