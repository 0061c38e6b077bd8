"""Choosing configurations by measurement, on the GPU at hand.

    store    what was chosen, kept beside the compiled kernels; what configurations are looked up in
    tune     candidates -> right? -> fast? -> the choice
    bench    whether a configuration's kernel is right, and how long it takes
    report   what of all that is shown

The heuristics choose where nothing was measured (`heuristics`, `prefill_heuristics`).
"""
