"""Many training runs."""
