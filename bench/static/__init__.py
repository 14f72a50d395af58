"""What can be known of the kernels without a GPU: `python -m bench.static`.

launches    which kernels a step launches, and with what, captured without running anything
compiled    ahead-of-time compilation, and what the machine code says
model       what an H100's pipes would allow the main loop: bounds, never a timing
linear      the same of the kernels of a linear factor
requested   bytes that kernels ask for, counted in Triton's interpreter
"""
