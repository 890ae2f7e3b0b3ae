"""Adapters for trainers and trackers; each imports its framework, and nothing imports an adapter but its user."""
