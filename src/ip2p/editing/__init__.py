"""Editing pictures: one, many, in a chain, over a grid."""
