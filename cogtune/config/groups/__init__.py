"""The fields of a run's configuration, in groups. Their names are the flags and the keys of ``run.yaml``."""
