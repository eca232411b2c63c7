"""A batch becomes an update: `step` shows a whole step in order."""
