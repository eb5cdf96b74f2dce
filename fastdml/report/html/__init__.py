"""A run, or several, as one HTML page that needs nothing else: no script, no network, no fonts."""
