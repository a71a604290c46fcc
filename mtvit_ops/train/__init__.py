"""Losses and training forwards of the methods."""
