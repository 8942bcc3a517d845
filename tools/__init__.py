"""What writes docs and tables from the program, and measures it. Not part of the package."""
