"""Starts a part of `make gpu`: imports what all parts need, waits for a line on standard input, then runs the part.

    python -m benchmarks.gpu_start MODULE [ARGUMENT...]

So the seconds that imports take pass while the part before is at work. No CUDA context is made before the line.
"""

import runpy
import sys


def main() -> None:
    """Import, wait, run the module as `python -m` would."""
    module, *arguments = sys.argv[1:]
    if module.startswith(("benchmarks", "tiercache")):  # pytest's workers import for themselves
        import transformers.models.llama.modeling_llama  # noqa: F401

        import tiercache.bench.model
        import tiercache.engine.offload  # noqa: F401
    if not sys.stdin.readline():
        return  # nobody waits any more
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
