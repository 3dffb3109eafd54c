"""Edit pictures: one, a batch, a chain, a grid."""
