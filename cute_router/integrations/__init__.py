"""Models of other libraries with the routers of this package; none of them is imported here."""
