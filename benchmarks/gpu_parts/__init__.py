"""What benchmarks/gpu.py runs, a process for each part."""
