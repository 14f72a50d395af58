"""One file for each command of `sosvae`."""
