"""What the suite costs, beside the bare framework, code by hand and other libraries: ratios of one process, interleaved."""
