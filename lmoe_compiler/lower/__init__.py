"""Stop 5 of the walk: recurrence -> chunk program -> adjoint chunk program."""
