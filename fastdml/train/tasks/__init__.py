"""What peers learn: a task a module."""
