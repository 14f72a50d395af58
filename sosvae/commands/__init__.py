"""Commands of `sosvae`, one module each: `main(args)` returns the exit status, docstring and `USAGE` are its help."""
