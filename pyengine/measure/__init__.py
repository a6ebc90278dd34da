"""What `pyengine bench` and the benchmarks share."""
