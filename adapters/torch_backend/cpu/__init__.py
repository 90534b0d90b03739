"""The compiled kernels for CPUs: C++ in `src`, built at first use."""
