"""HTML reports: one self-contained page for a dataset, one for a run."""
