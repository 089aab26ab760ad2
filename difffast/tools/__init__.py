"""The command line, the demos and the profiler."""
