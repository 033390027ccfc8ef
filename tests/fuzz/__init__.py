"""Random programs over the public API and torch's, replayed in float64 (`README.md`)."""
