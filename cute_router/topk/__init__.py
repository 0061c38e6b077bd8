"""Selection: the one ordering, and kernels that choose the k best."""
