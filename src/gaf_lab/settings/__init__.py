"""What is to run: configurations, presets and plans. It knows nothing of torch."""
