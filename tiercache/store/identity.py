"""Which tensors a checkpoint holds, as a hash of their names, dtypes, shapes and samples of their bytes."""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from tiercache.errors import permissions_named
from tiercache.store.header import TensorRef

_SAMPLES, _SAMPLE_BYTES = 9, 64


def fingerprint(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], read: Callable[[str, int, int], bytes]) -> str:
    """A hash of tensors' names, dtypes, shapes, and a sample of their bytes.

    `tensors` has the header's dtype, the shape and the bytes of each; `read` takes a name, an offset and a length.
    """
    digest = hashlib.sha256()
    for name, (dtype, shape, nbytes) in sorted(tensors.items()):
        digest.update(f"{name} {dtype} {list(shape)}\n".encode())
        for place in range(_SAMPLES):
            digest.update(read(name, max(0, nbytes - _SAMPLE_BYTES) * place // (_SAMPLES - 1), _SAMPLE_BYTES))
    return digest.hexdigest()


def of_files(tensors: Mapping[str, TensorRef]) -> str:
    """The fingerprint of tensors that lie in files; the same when these are copied, sharded otherwise or moved."""
    with ExitStack() as stack:
        files = {}
        for path in {ref.path for ref in tensors.values()}:
            with permissions_named(path):
                files[path] = stack.enter_context(path.open("rb"))

        def read(name: str, offset: int, nbytes: int) -> bytes:
            ref = tensors[name]
            return os.pread(files[ref.path].fileno(), nbytes, ref.offset + offset)

        return fingerprint({name: (ref.dtype, ref.shape, ref.nbytes) for name, ref in tensors.items()}, read)
