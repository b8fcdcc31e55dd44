"""Five scenes of the split `test`, with a sentence that names one object of each."""
