"""What can be known of the kernels without a GPU: `python -m bench.static`.

launches      which kernels a step launches, and with what, captured without running anything
children      compiles them in child processes that may hang or die
compiled      ahead-of-time compilation, and what the result says of itself
machine_code  the main loop in a listing, and the widths of its loads and stores
banks         bank conflicts in shared memory, from the addresses in the PTX
model         what an H100's pipes would allow the main loop: bounds, never a timing
requested     bytes that kernels ask for, counted in Triton's interpreter
verdict       what is to be reached, and whether it is
"""
