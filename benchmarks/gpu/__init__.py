"""jaxfed on one GPU: which lowering, how many clients at once, and how far from the device's limit.

    python -m benchmarks.gpu [--out FILE.json] [--jobs SECTION ...] [--seconds N] [--tiny]

Needs Python 3.11 or newer and jax (with CUDA), flax, optax, numpy and jaxtyping; run it in the
folder that holds `jaxfed/` and `benchmarks/` (or after `pip install -e .`). PyTorch and
scikit-learn are used if they are there. It also runs on a CPU; `--tiny` is for that.

    ceiling    matrix products and copies: what the device can do
    jobs       rounds as users run them, one client after another, in chunks, or all at once
    lowerings  one layer's training step of many clients, several ways
    published  three jobs of other frameworks' benchmarks, by their shapes, on random images
    torch      the same work in a PyTorch loop over clients
    sweep      64 learning rates as one program
    precision  what TF32 and bfloat16 do to accuracy

`--seconds` (default 450) is shared out: a section begins no case when its share is used, and what
is left goes to the cases that were left out, in the order above. A case that fails becomes a row
with an `error`, and the rest goes on. `--out` is written after every case.

How to read it. `ms` is the median of several runs, on the host's clock, compilation excluded.
`tflops` counts the arithmetic of the unpadded work; `of_ceiling` is that over the matrix product
in the same precision; `of_bandwidth` is the time to read and write every operand once, over the
time that it took: the nearer to 1 the larger of the two, the less there is to gain.

- lowerings: ms of one step (forward and backward) of all clients. `grouped` is `vmap` of
  `lax.conv`, `sequential` is `lax.map` of it; `patches` (dense) and `shifts` (depthwise) are `vmap`
  of `jaxfed.models.conv.patches_conv`, with `sequential` `lax.map` of it. Outputs and gradients
  have to be those of `sequential` in float32, within rounding (`gap`); anything else is an error.
- jobs: `ms` of a round of the compiled program; `user_ms` of the same round through
  `jaxfed.segments.segments`, planning on the host included (`plan_ms`). What `parallel` is fastest
  for 100 clients and more is what `AUTO_CHUNK["gpu"]` should be; chunks as large as the cohort are
  `vmap`, and left out.
- torch: `speedup` is PyTorch's `ms` over `jaxfed_ms`; both have the same images on the device and
  the same batches, and for the CNN the same weights (`gap` of the loss of the first round). On a
  CPU that others use too, its threads wait for one another: OMP_NUM_THREADS=1.
- sweep: `speedup` is the time of as many single runs over that of all points together.
- "default" precision is what jax does if nothing is said, and so what jaxfed's float32 is: TF32 on
  GPUs that have it.
"""
