"""The settings of a run: what they are, their limits, and where they come from."""
