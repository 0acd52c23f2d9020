"""What a user would otherwise run, against fastinterp: ``python -m benchmarks`` at the repository's root."""
