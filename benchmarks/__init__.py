"""whet beside its peers on the same work, in one run; see docs/benchmarks.md."""
