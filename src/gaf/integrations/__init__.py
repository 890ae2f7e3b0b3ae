"""Adapters for trainers and trackers. Each imports its framework, and only users import one."""
