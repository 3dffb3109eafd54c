"""A drawn world of children's-book pages in which the exact answer to every edit is known."""
