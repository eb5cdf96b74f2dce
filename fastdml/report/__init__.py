"""The reports of a run: its log, summary, tables and pictures."""
