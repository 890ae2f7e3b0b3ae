"""What happened: statistics of the steps, schedulers that pause on skipped steps, scores of the samples."""
