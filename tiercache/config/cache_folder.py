"""Makes folders of the cache, with the tag that tells backup programs to leave it out (https://bford.info/cachedir/)."""

from pathlib import Path

from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError

TAG_FILE = "CACHEDIR.TAG"
_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# This file is a cache directory tag created by tiercache: everything here can be made again.
# For information about cache directory tags, see https://bford.info/cachedir/
"""


def made_folder(folder: Path) -> Path:
    """`folder`, made where it is not there; if it is the cache folder or lies in it, the tag is there as well.

    Raises:
        UsageError: $TIERCACHE_HOME is relative.
        EnvironmentUnsupportedError: the folder or the tag cannot be written.
    """
    home = home_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_relative_to(home) and not (home / TAG_FILE).exists():
            (home / TAG_FILE).write_text(_TAG, encoding="ascii")
    except OSError as error:
        way_out = "set TIERCACHE_HOME to" if folder.is_relative_to(home) else "name"
        raise EnvironmentUnsupportedError(
            f"{folder} cannot be written ({error}); {way_out} a folder that can be written"
        ) from error
    return folder
