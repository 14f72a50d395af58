"""What can be done with a predicted distribution: interpolate, scale components, condition, draw."""
