"""What came of the decisions: counts and averages, gated schedulers, and scores of who disagreed."""
