"""Figures, one module for each kind of result; they draw from the JSON alone."""
