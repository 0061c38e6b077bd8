"""A functional simulator of the PTX that the kernels compile to; a test tool, CPU only.

    parser -> operations, program     text to basic blocks, each a Python function over 32 lanes
    machine, warp                     clusters, CTAs, warps and the loop that runs them
    access, copies, collectives,      what a warp does beyond arithmetic: to memory, among its
    synchronisation, mma              lanes, with other warps, and with the tensor cores
    memory, barriers, tensor          shared, global and tensor memory; mbarriers; TMA and MMA
    proxies                           what needs a fence between threads and TMA or MMA
    races                             accesses to shared memory that nothing orders
    engine                            asynchronous operations: eager, lazy or in random order
    launch, launch_*                  a configuration and its inputs to outputs
    calibration                       what a Hopper GPU runs too, and how the two compare

It reads PTX, as the DSL's documented option keeps it, by the public PTX ISA, and nothing else. What
it shows is that a kernel is right if the simulator's reading of the ISA is: functionally simulated,
not validated on a GPU. It knows no time, and approximate functions to fp32's precision only.
"""
