"""Speed benchmarks: each times rivals in one process and prints the ceilings of the same run beside them."""
