"""The machine that the program runs on: files, processes, locks, GPUs, the console."""
