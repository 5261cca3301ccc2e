"""Published benchmarks, read from the files that their authors give out: one module each."""
