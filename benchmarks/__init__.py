"""Side-by-side measurements against peers: ratios within one process run, never absolute times."""
