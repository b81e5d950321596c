"""JAX and PyTorch on one GPU: environment => environment in which both find memory."""

import os


def share_gpu_memory():
    """Lets JAX's GPU memory grow with need, up to 80 %, instead of taking 75 % at its first use.

    The VAE runs in PyTorch beside JAX. Left to itself, JAX claims its share when its backend starts
    and never returns it, and a share that the user has raised can leave PyTorch nothing to decode
    with. With these settings JAX takes what it uses, and a fifth of the memory stays out of its
    reach. They count only until JAX's first computation, so the package calls this on import.
    What the user has set in the environment wins; JAX refuses both spellings of the fraction at
    once, so either of them is respected. Without a GPU nothing changes.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", ".80")
