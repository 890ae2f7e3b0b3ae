"""What is to run: configurations, presets and plans. It does not import torch."""
