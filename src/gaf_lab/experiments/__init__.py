"""The demo, and measurements of disagreement: the probe and the audit."""
