"""`python -m tiercache` is the same as `tiercache`."""

from tiercache.cli import main

main()
