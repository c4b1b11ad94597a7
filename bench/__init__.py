"""Benchmarks. Each starts its own server, compares within one run, and gives medians and ratios; see docs/performance.md."""
