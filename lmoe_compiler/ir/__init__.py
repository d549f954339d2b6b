"""Stop 3 of the walk: the recurrence IR (nodes.py), its text (text.py) and its interpreter (interpret.py)."""
