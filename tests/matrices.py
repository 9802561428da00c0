"""Layers on crossbars for tests of the cost model."""

from aimc_pl.cost import Matrix


def trained(rows, columns, vectors, numbers_in, **kwargs):
    """Return a layer that learns from every vector, and computes the error of its input for each of them."""
    return Matrix(
        "", rows, columns, vectors, numbers_in, **{"vectors_back": vectors, "vectors_learning": vectors}, **kwargs
    )
