"""The parts of `tools.gpu_bench`."""
