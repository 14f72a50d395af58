"""The paper's table and figures, made again from data at a given path."""
