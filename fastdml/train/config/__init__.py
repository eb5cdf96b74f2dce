"""The settings of a run: fields, defaults, limits, and the sources of their values."""
