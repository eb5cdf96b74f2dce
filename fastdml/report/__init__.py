"""What a run leaves to read: its log, its summary, tables and pictures."""
