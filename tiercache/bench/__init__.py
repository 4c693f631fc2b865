"""`tiercache bench`: a model, the kernels and the drafters, each timed beside what the same machine could do then."""
