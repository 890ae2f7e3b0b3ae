"""What came of the decisions: counts and averages, gated schedulers, scores of who disagreed."""
