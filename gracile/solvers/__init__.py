"""Solvers: how weights are rounded, and how what remains is repaired."""
