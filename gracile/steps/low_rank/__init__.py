"""Layers in two factors: their ranks, and the factors themselves."""
