"""Write a linear sequence model's recurrence once, for one token; the compiler derives the rest."""
