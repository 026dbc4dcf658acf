"""Defaults that several functions and commands share: each has one value, and stands here alone."""

BATCH_SIZE = 32
MAX_LENGTH = 128
SEED = 0
DENSE_EPOCHS = 3.0
"""Of `train`; the others take a model that is fine-tuned."""
DENSE_LEARNING_RATE = 5e-5
CALIBRATION_SAMPLES = 1024
"""Training rows on which heads are scored."""
SIGNATURE_SIZE = 32
MIN_HEADS_PER_LAYER = 1
KEEP_EXPERTS = 1
MAX_TRIALS = 6
"""Candidates that `compress` trains at most."""
DSP_EPOCHS = 1.0
TOLERANCE = 0.25
"""Of regression: predictions so close agree."""
ROUNDS = 15
"""In which models take turns while they are timed."""
VOCABULARY_FLOOR = 4000
MIN_AGREEMENT = 0.9
"""Share of a rounded file's predictions that must be PyTorch's."""
SERVED_SHAPE = (8, 128)
"""Sequences and tokens per call at which speed is measured."""
