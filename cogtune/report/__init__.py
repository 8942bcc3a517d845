"""What people would rather look at than read: one self-contained HTML page for a dataset, one for a run."""
