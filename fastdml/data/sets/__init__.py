"""A file a data set: it registers itself, and everything else finds it by name."""
